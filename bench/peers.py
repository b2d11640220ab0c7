"""Time and loss of the peers' solvers as they ship, beside ours, on the same matrices, machine and threads.

    python -m venv DIR
    DIR/bin/pip install torch==2.13.0  # the CPU build, if the matrices are to be pruned on a CPU
    DIR/bin/pip install llmcompressor nvidia-modelopt
    python bench/peers.py MODEL --environment DIR --calibration c4-calibration.jsonl [--blocks 2 15 27]

The peers, llm-compressor's SparseGPT and Wanda and NVIDIA ModelOpt's SparseGPT, want an older transformers than ours,
so they live in an environment of their own. A worker process there (``peers_worker.py``) calls the functions that the
peers' own modifiers and searchers call, with their defaults, and takes turns with ours on each matrix; the other side
sleeps meanwhile. The time is the solver's alone, from weight and statistics to pruned weight, and the median of
``--repeats`` turns after one to warm up: for ours ``methods.get(NAME).solve``, which is what ``prune_weight`` adds its
checks of input and output to ("whole call"). Losses are measured here on what each side returns. ModelOpt keeps only
the mask of its SparseGPT and applies it to the dense weights, so that is what is judged.

Ratios are theirs over ours: above 1 ours is faster, or has the lower loss. "CPU" is the ratio of processor times, which
says more than that of wall times where the machine is shared and ``--threads`` is 1.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halve import prune_weight
from halve.maths.gram import Statistics
from halve.maths.linalg import full_precision
from halve.maths.pattern import Pattern
from halve.maths.quadratic import relative_loss
from halve.solve import methods
from real_matrices import add_arguments, real_matrices

OURS = {
    "llm-compressor sparsegpt": "sparsegpt",
    "llm-compressor wanda": "wanda",
    "modelopt sparsegpt": "sparsegpt",
}
"""Every peer and what it is compared with."""
PATTERN = "2:4"
TIMES = ("theirs", "ours", "whole", "theirs_processor", "ours_processor")
"""What is measured of a turn, in seconds; the last two are the processor's, which other work disturbs less."""

HEAD = f"{'':28} {'ms':^24} {'CPU':>7} {'loss':^29} {'mask':>7}\n{'':28}" + "".join(
    f" {title:>{width}}"
    for title, width in (
        ("theirs", 8),
        ("ours", 8),
        ("ratio", 7),
        ("ratio", 7),
        ("theirs", 10),
        ("ours", 10),
        ("ratio", 7),
        ("agrees", 7),
    )
)


class Worker:
    """The process in the peers' environment: one request, one answer."""

    def __init__(self, environment: Path, threads: int) -> None:
        python = environment / "bin" / "python"
        if not python.exists():
            sys.exit(f"--environment {environment} has no bin/python: {__doc__}")
        script = Path(__file__).with_name("peers_worker.py")
        self._process = subprocess.Popen(
            [python, script, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def ask(self, **request: str) -> dict[str, Any]:
        if self._process.stdin is None:
            raise RuntimeError("the worker has no input")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            sys.exit(f"the worker ended with status {self._process.wait()}: see its messages above")
        reply: dict[str, Any] = json.loads(line)
        return reply


def run_ours(weight: Tensor, stats: Statistics, method: str, *, whole: bool) -> tuple[float, float, Tensor]:
    """Return seconds, processor seconds and weights of our solver, or of the whole call with checks and losses."""
    row, options = methods.get(method), methods.make_options(method)
    pattern = Pattern(PATTERN)
    begin, begin_processor = time.perf_counter(), time.process_time()
    if whole:
        pruned = prune_weight(weight, stats, pattern, method, "none").weight
    else:
        with full_precision():
            pruned = row.solve(weight, stats, pattern, options).weight
    return time.perf_counter() - begin, time.process_time() - begin_processor, pruned


def compare(worker: Worker, folder: Path, weight: Tensor, stats: Statistics, arguments: argparse.Namespace) -> Any:
    """Return, for every peer, times and losses of both sides on one matrix, or what went wrong."""
    matrix, result = folder / "matrix.safetensors", folder / "result.safetensors"
    scale = torch.tensor(2.0 * stats.tokens / arguments.samples)
    save_file({"weight": weight.contiguous(), "gram": stats.gram.contiguous(), "scale": scale}, matrix)
    found: dict[str, dict[str, Any]] = {peer: {key: [] for key in TIMES} for peer in arguments.peers}
    for turn in range(arguments.repeats + 1):
        for peer, entry in found.items():
            if "error" in entry:
                continue
            if error := worker.facts["errors"].get(peer):
                entry["error"] = error
                continue
            reply = worker.ask(peer=peer, matrix=str(matrix), result=str(result))
            if "error" in reply:
                entry["error"] = reply["error"]
                continue
            ours, ours_processor, pruned = run_ours(weight, stats, OURS[peer], whole=False)
            whole, _, _ = run_ours(weight, stats, OURS[peer], whole=True)
            if turn:
                taken = (reply["seconds"], ours, whole, reply["processor"], ours_processor)
                for key, seconds in zip(TIMES, taken, strict=True):
                    entry[key].append(seconds)
            else:
                theirs = load_file(result)["weight"]
                entry["loss_theirs"] = relative_loss(theirs, weight, stats.gram)
                entry["loss_ours"] = relative_loss(pruned, weight, stats.gram)
                entry["in_pattern"] = Pattern(PATTERN).satisfied_by(theirs)
                entry["same_mask"] = float(((theirs != 0) == (pruned != 0)).float().mean())
    return {peer: summary(entry) for peer, entry in found.items()}


def summary(entry: dict[str, Any]) -> dict[str, Any]:
    if "error" in entry:
        return {"error": entry["error"]}
    seconds = {key: statistics.median(entry[key]) for key in TIMES}
    return {
        **entry,
        **seconds,
        "time_ratio": seconds["theirs"] / seconds["ours"],
        "processor_ratio": seconds["theirs_processor"] / seconds["ours_processor"],
        "loss_ratio": entry["loss_theirs"] / entry["loss_ours"],
    }


def describe(peer: str, entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"  {peer:26} FAILED: {entry['error']}"
    broken = "" if entry["in_pattern"] else f"  NOT {PATTERN}"
    return (
        f"  {peer:26} {1e3 * entry['theirs']:8.1f} {1e3 * entry['ours']:8.1f} {entry['time_ratio']:7.2f}"
        f" {entry['processor_ratio']:7.2f} {entry['loss_theirs']:10.5f} {entry['loss_ours']:10.5f}"
        f" {entry['loss_ratio']:7.3f} {entry['same_mask']:7.4f}"
        f"{broken}"
    )


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def overall(rows: list[dict[str, Any]], peers: list[str]) -> dict[str, dict[str, Any]]:
    """Return the ratios of each peer over all matrices, or how many of them it failed on and why."""
    result: dict[str, dict[str, Any]] = {}
    for peer in peers:
        entries = [row["peers"][peer] for row in rows]
        if failed := [entry["error"] for entry in entries if "error" in entry]:
            result[peer] = {"error": f"on {len(failed)} of {len(entries)} matrices; first: {failed[0]}"}
            continue
        total = {key: sum(entry[key] for entry in entries) for key in TIMES}
        result[peer] = {
            "time_ratio_of_sums": total["theirs"] / total["ours"],
            "time_ratio_of_sums_whole_call": total["theirs"] / total["whole"],
            "processor_ratio_of_sums": total["theirs_processor"] / total["ours_processor"],
            "time_ratio": geometric_mean([entry["time_ratio"] for entry in entries]),
            "least_time_ratio": min(entry["time_ratio"] for entry in entries),
            "least_processor_ratio": min(entry["processor_ratio"] for entry in entries),
            "loss_ratio": geometric_mean([entry["loss_ratio"] for entry in entries]),
            "least_loss_ratio": min(entry["loss_ratio"] for entry in entries),
            "largest_loss_ratio": max(entry["loss_ratio"] for entry in entries),
        }
    return result


def print_overall(totals: dict[str, dict[str, Any]], matrices: int) -> None:
    print(f"\n{matrices} matrices, theirs over ours; times: of all together, mean, least; losses: mean, least, most")
    print(
        f"  {'':26} {'sums':>7} {'whole':>7} {'CPU':>7} {'mean':>7} {'least':>7} {'loss':>7} {'least':>7} {'most':>7}"
    )
    for peer, entry in totals.items():
        if "error" in entry:
            print(f"  {peer:26} FAILED {entry['error']}")
            continue
        print(
            f"  {peer:26} {entry['time_ratio_of_sums']:7.2f} {entry['time_ratio_of_sums_whole_call']:7.2f}"
            f" {entry['processor_ratio_of_sums']:7.2f}"
            f" {entry['time_ratio']:7.2f} {entry['least_time_ratio']:7.2f} {entry['loss_ratio']:7.4f}"
            f" {entry['least_loss_ratio']:7.4f} {entry['largest_loss_ratio']:7.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory, hub id or .gguf file")
    parser.add_argument("--environment", type=Path, required=True, help="virtual environment of the peers")
    add_arguments(parser)
    parser.add_argument("--peers", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    with Worker(arguments.environment, arguments.threads) as worker, tempfile.TemporaryDirectory() as folder:
        versions = {**worker.facts["versions"], "torch": worker.facts["torch"], "torch (ours)": torch.__version__}
        print(", ".join(f"{name} {version}" for name, version in versions.items()), f"; {arguments.threads} threads")
        print(HEAD)
        for name, weight, stats in real_matrices(arguments):
            result = compare(worker, Path(folder), weight, stats, arguments)
            rows.append({"matrix": name, "shape": list(weight.shape), "peers": result})
            print(f"{name} {tuple(weight.shape)}")
            print("\n".join(describe(peer, entry) for peer, entry in result.items()), flush=True)
    totals = overall(rows, arguments.peers)
    print_overall(totals, len(rows))
    if arguments.json:
        facts = {"versions": versions, "threads": arguments.threads, "repeats": arguments.repeats}
        arguments.json.write_text(json.dumps({**facts, "overall": totals, "matrices": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
