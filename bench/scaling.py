"""Time and peak memory of the methods against d_in, and their exponents.

    python bench/scaling.py [--methods NAME ...] [--sizes D ...] [--json PATH] [--earlier PATH ...]

Statistics are synthetic, with a spectrum like those of language models: ``H = D Q diag(s) Qᵀ D`` with eigenvalues
falling as 1/k, three directions 30 times as large as the first of the others, log-normal scales D, and Q the Kronecker
product of two random orthogonal matrices, which costs d² (d_1 + d_2) to apply. Weights are N(0, 1).

Every method has a fresh process, and prunes at each d_in two matrices, of few and of many rows: what the rows do not
account for is the cost of the matrix (factorisations, about d³, and reading H), the rest is the cost of a row (about
d² an iteration). Memory is the growth of the process's peak during the call with many rows, beyond weights and H.
Methods stop at the d_in of the table below, larger ones at fewer rows: the rest would take this script beyond ten
minutes on two cores. The exponents are least squares in log-log.
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve import prune_weight

CONTENDERS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "wanda": ("wanda", "none", {}, 8192),
    "sparsegpt": ("sparsegpt", "none", {}, 8192),
    "sparsegpt+cg": ("sparsegpt", "cg", {}, 4096),
    "alps+cg": ("alps", "cg", {}, 4096),
    "prox-gradient+cg": ("prox-gradient", "cg", {}, 2048),
    "fast+cg": ("auto", "cg", {"effort": "fast"}, 4096),
    "balanced+cg": ("auto", "cg", {"effort": "balanced"}, 4096),
    "wanda+swap": ("wanda", "swap", {}, 1024),
}
"""Method, refit, options, and the largest d_in. ``auto`` is prox-admm here."""
SIZES = (512, 1024, 2048, 4096, 8192)
FACTS = ("iterations", "row_iterations", "refit_row_iterations", "swaps", "relative_loss")


def row_counts(name: str, d: int) -> tuple[int, int]:
    """Return how many rows the two matrices have."""
    if name.endswith("swap"):
        return 8, 32
    return (64, 512) if d <= 1024 else (64, 256) if d <= 4096 else (32, 128)


def synthetic_gram(d: int, seed: int) -> Tensor:
    """Return H (d, d) float32; d is a power of two from 64 on."""
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = 1.0 / torch.arange(1, d + 1)
    eigenvalues[:3] = 30.0
    eigenvalues = eigenvalues[torch.randperm(d, generator=generator)]
    left = 2 ** (int(math.log2(d)) // 2)
    factors = [torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (left, d // left)]
    gram = torch.diag(eigenvalues)
    for _ in range(2):  # Q diag(s), then Q (Q diag(s))ᵀ
        gram = torch.tensordot(factors[0], gram.mT.reshape(left, d // left, d), dims=1)
        gram = (factors[1] @ gram).reshape(d, d)
    scales = torch.exp(0.5 * torch.randn(d, generator=generator))
    gram *= scales
    gram *= scales.unsqueeze(-1)
    gram = (gram + gram.mT).mul_(0.5)
    return gram.div_(gram.diagonal().mean())


def forget_peak() -> int | None:
    """Give free memory back, reset the process's peak and return the memory in use, in bytes (Linux only)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return read_memory("VmRSS")


def read_memory(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def measure(name: str, sizes: list[int], seed: int, clock: str) -> None:
    """Print one JSON line for every d_in: what a fresh process of one method does."""
    method, refit, options, _ = CONTENDERS[name]
    prune_weight(torch.randn(8, 64), synthetic_gram(64, seed), "2:4", method, refit, **options)  # loads what it loads
    for d in sizes:
        gram = synthetic_gram(d, seed)
        runs = []
        for rows in row_counts(name, d):
            weight = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed))
            before = forget_peak()
            begin, begin_processor = time.perf_counter(), time.process_time()
            outcome = prune_weight(weight, gram, "2:4", method, refit, **options)
            wall, processor = time.perf_counter() - begin, time.process_time() - begin_processor
            peak = read_memory("VmHWM")
            runs.append(
                {
                    "rows": rows,
                    "seconds": processor if clock == "processor" else wall,
                    "wall_seconds": wall,
                    "processor_seconds": processor,
                    "extra_bytes": None if before is None or peak is None else peak - before,
                    "status": outcome.status.name,
                    **{key: outcome.facts[key] for key in FACTS if key in outcome.facts},
                }
            )
        print(json.dumps({"method": name, "d": d, "runs": runs, **split(runs)}), flush=True)


def split(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of the matrix and those of a row apart."""
    few, many = runs
    per_row = (many["seconds"] - few["seconds"]) / (many["rows"] - few["rows"])
    return {"seconds_per_row": per_row, "seconds_per_matrix": few["seconds"] - few["rows"] * per_row}


def exponent(points: list[tuple[int, float]]) -> str:
    """Fit ``a d^p`` to the points with positive values and return p."""
    logs = [(math.log(d), math.log(value)) for d, value in points if value > 0.0]
    if len(logs) < 3:
        return "-"
    x, y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    slope = sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)
    left_out = len(points) - len(logs)
    return f"{slope:.2f}" + (f" ({left_out} of {len(points)} sizes not positive)" if left_out else "")


def show(entry: dict[str, Any]) -> str:
    few, many = entry["runs"]
    memory = "-" if many["extra_bytes"] is None else f"{many['extra_bytes'] / 2**20:.0f}"
    steps = " + ".join(f"{many[key]:.0f}" for key in ("iterations", "refit_row_iterations") if key in many)
    status = "" if many["status"] == "OK" else f"  {many['status']}"
    return (
        f"{entry['method']:17} {entry['d']:5} {many['rows']:5} {few['seconds']:8.2f} {many['seconds']:8.2f}"
        f" {entry['seconds_per_matrix']:9.3f} {1e3 * entry['seconds_per_row']:8.3f} {memory:>8} {steps:>9}"
        f" {many['relative_loss']:8.4f}{status}"
    )


def print_exponents(entries: list[dict[str, Any]]) -> None:
    print("\nexponents of d_in; peak memory beyond weights and statistics, over that of H, at the largest d_in")
    print(f"{'':17} {'to d_in':>7} {'512 rows':>8} {'a matrix':>8} {'a row':>8} {'peak / H':>8}")
    for name in CONTENDERS:
        mine = [entry for entry in entries if entry["method"] == name]
        if not mine:
            continue
        matrix = [(entry["d"], entry["seconds_per_matrix"]) for entry in mine]
        row = [(entry["d"], entry["seconds_per_row"]) for entry in mine]
        whole = [(d, a + 512 * b) for (d, a), (_, b) in zip(matrix, row, strict=True)]
        largest, extra = mine[-1]["d"], mine[-1]["runs"][-1]["extra_bytes"]
        memory = "-" if extra is None else f"{extra / (4 * largest**2):.1f}"
        fits = " ".join(f"{exponent(points):>8}" for points in (whole, matrix, row))
        print(f"{name:17} {largest:7} {fits} {memory:>8}")


def run(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one method in a process of its own, and show its lines as they come."""
    sizes = [str(d) for d in arguments.sizes if d <= CONTENDERS[name][3]]
    command = [sys.executable, __file__, "--measure", name, "--sizes", *sizes]
    command += ["--seed", str(arguments.seed), "--clock", arguments.clock]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    entries: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            entries.append(json.loads(line))
            print(show(entries[-1]), flush=True)
    if process.returncode:
        print(f"{name:17} FAILED with status {process.returncode} after d_in = {[entry['d'] for entry in entries]}")
    if CONTENDERS[name][3] < max(arguments.sizes):
        print(f"{name:17} not run beyond d_in = {CONTENDERS[name][3]}: it would take too long here")
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="d_in, powers of two")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="what the seconds are; with --threads 1 the processor's are disturbed less by other work",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="what earlier runs wrote to --json, to add")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.sizes, arguments.seed, arguments.clock)
        return
    print(
        f"{arguments.threads} threads, torch {torch.__version__}, {arguments.clock} clock; seconds of few rows and many"
    )
    print(
        f"{'':17} {'d_in':>5} {'rows':>5} {'few s':>8} {'many s':>8} {'matrix s':>9} {'row ms':>8} {'peak MB':>8}"
        f" {'steps':>9} {'loss':>8}"
    )
    entries = [entry for path in arguments.earlier for entry in json.loads(path.read_text())["measured"]]
    for entry in entries:
        print(show(entry))
    facts = {"threads": arguments.threads, "clock": arguments.clock, "torch": torch.__version__}
    for name in arguments.methods:
        entries += run(name, arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps({**facts, "measured": entries}, indent=1) + "\n")
    entries.sort(key=lambda entry: (list(CONTENDERS).index(entry["method"]), entry["d"]))
    print_exponents(entries)
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "measured": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
