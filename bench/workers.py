"""What workers gain and cost: one run alone, the same on one worker and on several, and as many runs at once.

    python bench/workers.py run MODEL --data c4.jsonl --method sparsegpt --samples 32 --seq-len 512 --workers 2
    python bench/workers.py simulate llama-8b

``run`` prunes one after the other, each with one CPU thread a worker: in one process; on one worker, which shows what
Ray costs; on N workers; and N independent runs at once, which shows what the machine itself gives when N threads are
busy. The last two are compared: 1.0 means that N workers finish one run in the N-th part of the time in which N
independent runs finish side by side. That all write the same bytes is checked.

``simulate`` says how a run on many machines would go, from counted operations and bytes, the rates of a worker (those
of one large GPU where nobody says; nothing of it was measured on one), and a network of 10 and 100 Gbit/s. It is a sum:
the steps of a block follow one another, nothing overlaps, and nothing is lost.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.checkpoint.durable import sha256_of
from halve.forecast import operations
from halve.forecast.foreseen import foresee
from halve.run.request import Request

_GIGABIT = 1e9 / 8
_SECONDS_OF_PRUNING = ("capture", "collect", "solve", "reconstruct", "replay", "commit")
NETWORKS = (10, 100)
CREWS = (8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("model")
    run.add_argument("--data", required=True)
    run.add_argument("--method", default="sparsegpt")
    run.add_argument("--refit", default="none")
    run.add_argument("--samples", type=int, default=32)
    run.add_argument("--seq-len", type=int, default=512)
    run.add_argument("--shards", type=int)
    run.add_argument("--workers", type=int, default=2)
    run.add_argument("--rounds", type=int, default=1)
    run.add_argument("--results", type=Path, help="a file that a line of JSON is added to for each run")
    run.set_defaults(action=measure)
    simulation = commands.add_parser("simulate", help="add up")
    simulation.add_argument("model", help="a preset of halve plan, or the settings of a model")
    simulation.add_argument("--samples", type=int, default=128)
    simulation.add_argument("--seq-len", type=int, default=2048)
    simulation.add_argument("--method", default="sparsegpt")
    simulation.add_argument("--refit", default="none")
    simulation.add_argument("--flops", type=float, default=4e14, help="of a worker, in forward passes, a second")
    simulation.add_argument("--float32", type=float, default=4e13, help="the same in float32 products")
    simulation.add_argument("--factorising", type=float, default=1e13, help="the same in factorisations")
    simulation.add_argument("--bandwidth", type=float, default=2e12, help="bytes of a worker's memory a second")
    simulation.set_defaults(action=simulate)
    given = parser.parse_args()
    given.action(given)


@dataclass(frozen=True)
class _Run:
    """One finished run: seconds of the whole command, of pruning, and by phase; what each worker did; its bytes."""

    whole: float
    pruning: float
    phases: dict[str, float]
    workers: list[dict[str, Any]]
    bytes: str


def measure(given: argparse.Namespace) -> None:
    """Run everything in turns, and print medians and ratios."""
    ways: dict[str, tuple[int, list[str]]] = {
        "alone": (1, []),
        "one worker": (1, ["--workers", "1", "--worker-threads", "1"]),
        f"{given.workers} workers": (1, ["--workers", str(given.workers), "--worker-threads", "1"]),
        f"{given.workers} runs at once": (given.workers, []),
    }
    found: dict[str, list[_Run]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="halve-workers-", dir=".") as folder:
        for _ in range(given.rounds):
            for name, (at_once, more) in ways.items():
                for result in _runs(given, at_once, more, Path(folder)):
                    found[name].append(result)
                    line = {"way": name, **result.__dict__}
                    print(f"{name}: {result.whole:.1f} s, {result.pruning:.1f} s of pruning", flush=True)
                    if given.results:
                        with given.results.open("a") as file:
                            file.write(json.dumps(line) + "\n")
    if len({result.bytes for results in found.values() for result in results}) != 1:
        raise SystemExit("the runs wrote different bytes")
    print("all runs wrote the same bytes")
    for what in ("whole", "pruning"):
        seconds = {name: statistics.median(getattr(each, what) for each in results) for name, results in found.items()}
        alone, one, several, at_once = seconds.values()
        count = given.workers
        print(
            f"{what}: one worker takes {one / alone:.3f} times as long as none; {count} workers are "
            f"{alone / several:.2f} times as fast as one process, where {count} runs at once do "
            f"{count * alone / at_once:.2f} times the work of one: {at_once / (count * several):.2f} of it"
        )
    last = found[f"{given.workers} workers"][-1]
    print("the driver's phases:", {name: round(value, 1) for name, value in last.phases.items()})
    for worker in last.workers:
        print(f"worker {worker['number']}, shards {worker['shards']}: {worker['seconds']}, waited {worker['waited']}")


def _runs(given: argparse.Namespace, at_once: int, more: Sequence[str], folder: Path) -> Iterator[_Run]:
    """Prune so many times at once, and yield what each took."""
    outs = [folder / f"out-{index}" for index in range(at_once)]
    began = time.perf_counter()
    processes = [subprocess.Popen(_command(given, out, more), env=_one_thread()) for out in outs]
    for process in processes:
        if process.wait():
            raise SystemExit("a run failed")
    whole = time.perf_counter() - began
    for out in outs:
        taken = json.loads((out / "halve-measured.json").read_text())
        phases = taken["seconds"]
        pruning = sum(value for name, value in phases.items() if name in _SECONDS_OF_PRUNING)
        files = sorted(path for path in out.iterdir() if path.suffix == ".safetensors" or path.name == "halve.json")
        yield _Run(whole, pruning, phases, taken.get("workers", []), " ".join(sha256_of(path)[:16] for path in files))
        shutil.rmtree(out)


def _command(given: argparse.Namespace, out: Path, more: Sequence[str]) -> list[str]:
    shards = ["--shards", str(given.shards)] if given.shards else []
    return [
        *(sys.executable, "-m", "halve", "prune", given.model, "--out", str(out), "--calibration", given.data),
        *("--method", given.method, "--refit", given.refit, "--samples", str(given.samples)),
        *("--seq-len", str(given.seq_len), "--forward-dtype", "float32", *shards, *more),
    ]


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class _Block:
    """Seconds of one worker: forward passes, statistics, and every bundle's solve; bytes of sums, and of weights."""

    forward: float
    statistics: float
    solves: list[float]
    sums: list[float]
    size: float


def simulate(given: argparse.Namespace) -> None:
    """Print how long a run would take on crews of several sizes, and where their efficiency falls under 90 %."""
    request = Request.of(
        {
            "method": given.method,
            "refit": given.refit,
            "samples": given.samples,
            "seq_len": given.seq_len,
            "device": "cpu",
        }
    )
    foreseen = foresee(given.model, None, request, measured=False)
    plan, shapes = foreseen.plan, foreseen.shapes
    blocks = []
    for block in shapes.blocks:
        forward = operations.forward(block.products, plan.tokens, given.seq_len, shapes.width, 0.0).forward
        gram, solves, sums = 0.0, [], []
        for bundle in block.bundles:
            gram += operations.statistics(bundle, plan.tokens, cross=plan.cross).float32
            chosen = plan.statistics > 1
            options = request.settings.all_options
            solving = operations.solving(bundle, given.method, given.refit, options, shrinkage=chosen)
            if solving is None:
                raise SystemExit(f"what {given.method} takes is not counted")
            busy = solving.float32 / given.float32 + solving.factorisation / given.factorising
            solves.append(busy + solving.forward / given.flops + solving.bytes / given.bandwidth)
            kept = (2 if chosen else 1) + plan.cross
            sums.append(4.0 * bundle.experts * bundle.d_in**2 * kept)
        passes = (2 + plan.paired) * forward / given.flops
        blocks.append(_Block(passes, gram / given.float32, solves, sums, float(block.size)))
    print(f"{given.model}, {given.method} with refit {given.refit}, {given.samples} x {given.seq_len} tokens")
    alone = sum(each.forward + each.statistics + sum(each.solves) for each in blocks)
    print(f"  one worker: {alone / 3600:.2f} h")
    for crew in CREWS:
        for network in NETWORKS:
            rate = network * _GIGABIT
            total, moved = 0.0, 0.0
            for each in blocks:
                gathered = [(crew - 1) * size for size in each.sums]  # a shard for each worker; one's own is there
                copies = math.ceil(math.log2(crew + 1))  # from node to node
                moved += sum(gathered) + each.size * crew
                costs = [busy + size / rate for busy, size in zip(each.solves, gathered, strict=True)]
                total += (each.forward + each.statistics) / crew + _longest(costs, crew) + copies * each.size / rate
            efficiency = alone / (crew * total)
            mark = "" if efficiency >= 0.9 else "  (under 0.9)"
            print(
                f"  {crew} workers and shards, {network} Gbit/s: {total / 3600:.2f} h, {moved / 1e12:.2f} TB moved, "
                f"efficiency {efficiency:.2f}{mark}"
            )


def _longest(costs: Sequence[float], crew: int) -> float:
    """Return when the last of some bundles ends, if the costliest are dealt out first."""
    busy = [0.0] * crew
    for seconds in sorted(costs, reverse=True):
        busy[busy.index(min(busy))] += seconds
    return max(busy)


if __name__ == "__main__":
    main()
