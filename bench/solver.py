"""Layer loss and time of every solver on real matrices, and on small problems whose optimum is known.

    python bench/solver.py MODEL --calibration c4-calibration.jsonl [--blocks 2 15 27] [--methods NAME ...]
    python bench/solver.py --toy

Real matrices: those of a few blocks of a model, with statistics of the dense model's own inputs. Every contender ends
with the same refit (conjugate gradients to 1e-4), but for ``alps``, which takes the ten steps of its paper. Contenders
take turns on each matrix; the median time of ``--repeats`` turns counts. Ratios are to alps: the geometric mean and the
largest of the losses', and that of the times of all matrices together.

Toy problems: rows of 16 weights, inputs correlated by ``(1 - r) I + r 11ᵀ`` or by r^|i-j|, against the best of all
1296 masks; all refits there go to 1e-9.
"""

import argparse
import json
import math
import statistics
import time
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve import prune_weight
from halve.maths.gram import Statistics
from real_matrices import add_arguments, real_matrices

CONTENDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wanda": ("wanda", "cg", {}),
    "sparse-swaps": ("sparse-swaps", "cg", {}),
    "sparsegpt": ("sparsegpt", "cg", {}),
    "alps": ("alps", "cg", {"refit_max_iterations": 10}),
    "prox-gradient": ("prox-gradient", "cg", {}),
    "fast": ("auto", "cg", {"effort": "fast"}),
    "balanced": ("auto", "cg", {"effort": "balanced"}),
    "best": ("auto", "cg", {"effort": "best"}),
}
BASE = "alps"


def contend(weight: Tensor, stats: Statistics, names: list[str], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the relative loss and the median seconds of every contender."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    for _ in range(repeats):
        for name in names:
            method, refit, options = CONTENDERS[name]
            begin = time.perf_counter()
            outcome = prune_weight(weight, stats, "2:4", method, refit, **options)
            seconds[name].append(time.perf_counter() - begin)
            losses[name] = outcome.facts["relative_loss"]
    return {name: (losses[name], statistics.median(seconds[name])) for name in names}


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def on_real_matrices(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for name, weight, stats in real_matrices(arguments):
        result = contend(weight, stats, arguments.methods, arguments.repeats)
        rows.append({"matrix": name, "shape": list(weight.shape), **{key: list(pair) for key, pair in result.items()}})
        base = result[BASE][0]
        print(
            f"{name} {tuple(weight.shape)}: {BASE} {base:.5f}; "
            + ", ".join(f"{key} {loss / base:.3f} {taken:.1f} s" for key, (loss, taken) in result.items()),
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{len(rows)} matrices; ratios to {BASE}\n{'':14} {'loss':>7} {'worst':>7} {'time':>7}")
    for key in arguments.methods:
        losses = [row[key][0] / row[BASE][0] for row in rows]
        total = sum(row[key][1] for row in rows) / sum(row[BASE][1] for row in rows)
        print(f"{key:14} {geometric_mean(losses):7.4f} {max(losses):7.4f} {total:7.2f}")


def best_of_all_masks(row: Tensor, gram: Tensor) -> float:
    """Return the least relative loss of one row over all 2:4 masks, each with its optimal weights."""
    pairs = [list(pair) for pair in combinations(range(4), 2)]
    kept = torch.tensor(
        [
            [4 * group + place for group, pair in enumerate(chosen) for place in pair]
            for chosen in product(pairs, repeat=len(row) // 4)
        ]
    )
    right = (gram @ row)[kept]
    explained = (right * torch.linalg.solve(gram[kept.unsqueeze(-1), kept.unsqueeze(-2)], right)).sum(-1)
    total = row @ gram @ row
    return float((total - explained.max()) / total)


def toy_gram(kind: str, correlation: float, d: int = 16) -> Tensor:
    places = torch.arange(d, dtype=torch.float64)
    if kind == "equal":
        return (1 - correlation) * torch.eye(d, dtype=torch.float64) + correlation
    return correlation ** (places - places.unsqueeze(-1)).abs()


def on_toy_problems(arguments: argparse.Namespace) -> None:
    print(f"loss over the optimum of all masks, geometric mean over {arguments.toy_rows} rows of 16\n")
    print(f"{'inputs':>16} " + " ".join(f"{name:>13}" for name in arguments.methods))
    generator = torch.Generator().manual_seed(arguments.seed)
    weights = torch.randn(arguments.toy_rows, 16, generator=generator, dtype=torch.float64)
    for kind in ("equal", "decaying"):
        for correlation in (0.0, 0.3, 0.6, 0.9, 0.97):
            gram = toy_gram(kind, correlation)
            optimum = [best_of_all_masks(row, gram) for row in weights]
            ratios = []
            for name in arguments.methods:
                method, _, options = CONTENDERS[name]
                options = {key: value for key, value in options.items() if not key.startswith("refit_")}
                pruned = prune_weight(weights, gram, "2:4", method, "cg", refit_tolerance=1e-9, **options).weight
                error = pruned - weights
                losses = (error @ gram * error).sum(-1) / (weights @ gram * weights).sum(-1)
                excess = [float(loss) / best for loss, best in zip(losses, optimum, strict=True)]
                ratios.append(geometric_mean(excess))
            print(f"{kind:>9} {correlation:6.2f} " + " ".join(f"{ratio:13.3f}" for ratio in ratios), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint directory, hub id or .gguf file")
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--toy", action="store_true", help="problems with known optimum instead of a model")
    parser.add_argument("--toy-rows", type=int, default=100)
    arguments = parser.parse_args()
    if BASE not in arguments.methods:
        arguments.methods.append(BASE)
    if arguments.toy:
        on_toy_problems(arguments)
    elif arguments.model is None:
        parser.error("give a model, or --toy")
    else:
        on_real_matrices(arguments)


if __name__ == "__main__":
    main()
