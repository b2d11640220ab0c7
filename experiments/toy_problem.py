"""One row against the best of all masks, as its inputs' correlation rises (the paper's toy experiment).

    python experiments/toy_problem.py

Rows of 16 weights of N(0, 1); inputs are Gaussian with unit variances, and either every two of them have the same
correlation r, or inputs i and j have r^|i-j|. H is that covariance itself, as from endless data. The optimum is the
least loss over all 6^4 = 1296 masks at 2:4, each with its best weights. ``--full``: 10 seeds of 1000 rows.
"""

import math
import statistics
from itertools import combinations, product
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import halve
import results

NAME = "toy_problem"
INPUTS = 16
KINDS = ("equal", "decaying")
CORRELATIONS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97)
CONTENDERS = (
    "wanda",
    "sparsegpt",
    "prox-gradient",
    "wanda+cg",
    "sparse-swaps+cg",
    "sparsegpt+cg",
    "alps+cg",
    "prox-gradient+cg",
    "prox-admm+cg",
    "prox-admm+swap",
)
"""Method and refit; those without a refit are as the paper has them."""
_OPTIONS: dict[str, dict[str, Any]] = {"cg": {"refit_tolerance": 1e-9}}
_OPTIMAL = 1e-4
"""Excess over the optimum below which a row counts as optimal: what float32 leaves open."""


def covariance(kind: str, correlation: float, inputs: int = INPUTS) -> Tensor:
    """Return H (inputs, inputs) float64, unit diagonal.

    Args:
        kind: ``equal``, all correlations alike, or ``decaying``, r^|i-j|.
        correlation: r in [0, 1).
        inputs: how many.
    """
    places = torch.arange(inputs, dtype=torch.float64)
    if kind == "equal":
        return (1 - correlation) * torch.eye(inputs, dtype=torch.float64) + correlation
    return correlation ** (places - places.unsqueeze(-1)).abs()


def all_supports(inputs: int = INPUTS) -> Tensor:
    """Return the kept places of every 2:4 mask of a row, (6^(inputs / 4), inputs / 2)."""
    pairs = list(combinations(range(4), 2))
    return torch.tensor(
        [
            [4 * group + place for group, pair in enumerate(chosen) for place in pair]
            for chosen in product(pairs, repeat=inputs // 4)
        ]
    )


def losses(pruned: Tensor, rows: Tensor, gram: Tensor) -> Tensor:
    """Return the relative loss of every row: (rows,) float64."""
    error = pruned - rows
    return (error @ gram * error).sum(-1) / (rows @ gram * rows).sum(-1)


def optimal_losses(rows: Tensor, gram: Tensor) -> Tensor:
    """Return the least relative loss of every row over all masks, each with its optimal weights.

    Args:
        rows: (rows, inputs) float64.
        gram: (inputs, inputs) float64, H.

    Returns:
        Tensor: (rows,) float64.
    """
    supports = all_supports(rows.shape[1])
    inverses = torch.linalg.inv(gram[supports.unsqueeze(-1), supports.unsqueeze(-2)])
    products = rows @ gram
    total = (products * rows).sum(-1)
    best = torch.zeros_like(total)
    for support, inverse in zip(supports, inverses, strict=True):
        right = products[:, support]
        best = torch.maximum(best, (right @ inverse * right).sum(-1))
    return (total - best) / total


def excesses(contender: str, rows: Tensor, gram: Tensor, optimum: Tensor) -> list[float]:
    """Return every row's loss over its optimum, 1 at best."""
    method, _, refit = contender.partition("+")
    pruned = halve.prune_weight(rows, gram, "2:4", method, refit or "none", **_OPTIONS.get(refit, {})).weight
    found: list[float] = (losses(pruned, rows, gram) / optimum).tolist()
    return found


def compute(seeds: int, rows: int) -> dict[str, Any]:
    """Return, for every kind, correlation and contender, the geometric mean of loss over optimum for each seed.

    Args:
        seeds: how many sets of rows.
        rows: how many rows each has.
    """
    entries = []
    for kind, correlation in product(KINDS, CORRELATIONS):
        gram = covariance(kind, correlation)
        means: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
        optimal: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
        for seed in range(seeds):
            weights = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            optimum = optimal_losses(weights, gram)
            for contender in CONTENDERS:
                found = excesses(contender, weights, gram, optimum)
                means[contender].append(math.exp(statistics.fmean(math.log(ratio) for ratio in found)))
                optimal[contender].append(statistics.fmean(ratio < 1 + _OPTIMAL for ratio in found))
        entries.append({"kind": kind, "correlation": correlation, "over_optimum": means, "share_optimal": optimal})
    return {"seeds": seeds, "rows": rows, "inputs": INPUTS, "pattern": "2:4", "entries": entries}


def picture(numbers: dict[str, Any]) -> Figure:
    """Draw the excess over the optimum against correlation: a column a kind of covariance, without and with a refit."""
    figure, panels = results.axes(len(KINDS), 2, width=5.6, height=3.8)
    contenders = list(numbers["entries"][0]["over_optimum"])
    kinds = {"equal": "all correlations equal to r", "decaying": "correlation of i and j: r^|i-j|"}
    for axis, (refitted, kind) in zip(panels, product((False, True), KINDS), strict=True):
        entries = [entry for entry in numbers["entries"] if entry["kind"] == kind]
        correlations = [entry["correlation"] for entry in entries]
        for index, contender in enumerate(name for name in contenders if ("+" in name) == refitted):
            found = [entry["over_optimum"][contender] for entry in entries]
            excess = [statistics.fmean(values) - 1 for values in found]
            spread = [_deviation(values) for values in found]
            axis.errorbar(correlations, excess, spread, label=contender, capsize=2, **results.style(index))
        title = "kept weights refitted exactly" if refitted else "no refit, as in the paper"
        axis.set(title=f"{kinds[kind]}\n{title}", xlabel="r", ylabel="loss / optimum - 1")
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_ylim(bottom=-5e-4)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(numbers: dict[str, Any]) -> str:
    """Return the table of loss over optimum, mean ± deviation over seeds."""
    entries = numbers["entries"]
    header = ["method", *[f"{entry['kind']}, r = {entry['correlation']:g}" for entry in _shown(entries)]]
    rows = [
        [
            contender,
            *[
                f"{statistics.fmean(values):.3f} ± {_deviation(values):.3f}"
                for values in (entry["over_optimum"][contender] for entry in _shown(entries))
            ],
        ]
        for contender in entries[0]["over_optimum"]
    ]
    return results.table(header, rows)


def _shown(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return some of the correlations: the table would be too wide with all."""
    return [entry for entry in entries if entry["correlation"] in {0.0, 0.3, 0.6, 0.9, 0.97}]


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = results.parser(__doc__ or "")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--rows", type=int)
    given = parser.parse_args(arguments)
    numbers = compute(given.seeds or (10 if given.full else 5), given.rows or (1000 if given.full else 100))
    results.save(NAME, numbers, picture(numbers), given.out)
    print(markdown(numbers))


if __name__ == "__main__":
    main()
