"""The path of one group's weights under the proximal operator as λ grows (the paper's illustration of its operator).

    python experiments/group_path.py

For 2:4 a group goes from four non-zeros to three and to two; 1:4 and 4:8 are Halve's generalisation through
``e_{N+1}``. Needs no data; ``--full`` takes ten times as many values of λ.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure

import halve
import results

NAME = "group_path"
GROUPS: dict[str, tuple[float, ...]] = {
    "2:4": (0.55, -1.0, 0.8, -0.3),
    "1:4": (0.55, -1.0, 0.8, -0.3),
    "4:8": (0.7, -1.0, 0.35, 0.9, -0.6, 0.8, -0.5, 0.2),
}
"""Groups in which every size of the support between M and N can be seen."""
SPAN = (0.02, 2.0)
"""First and last λ; its unit is that of the weights to the power 1 - N."""
_BISECTIONS = 25


def follow(pattern: str, z: tuple[float, ...], lambdas: list[float]) -> dict[str, Any]:
    """Return the minimiser at every λ, and the λ at which the support changes, to nine digits.

    Args:
        pattern: ``N:M``.
        z: the M weights of one group.
        lambdas: increasing, > 0.

    Returns:
        dict[str, Any]: ``pattern``, ``z``, ``lambdas``, ``weights`` (one list of M for each λ), ``changes`` (with
            ``lambda``, ``from`` and ``to``, sizes of the support), and whether signs and order of z were kept
            throughout and the support only ever shrank.
    """
    group = torch.tensor(z, dtype=torch.float64)

    def at(lam: float) -> torch.Tensor:
        return halve.prox(group, lam, pattern)

    def size(lam: float) -> int:
        return int((at(lam) != 0).sum())

    weights = torch.stack([at(lam) for lam in lambdas])
    supports = (weights != 0).sum(-1)
    changes = []
    for (low, before), (high, after) in pairwise(zip(lambdas, supports.tolist(), strict=True)):
        changes += _changes_between(size, low, before, high, after)
    order = group.abs().argsort(descending=True)
    return {
        "pattern": pattern,
        "z": list(z),
        "lambdas": lambdas,
        "weights": weights.tolist(),
        "changes": changes,
        "signs_kept": bool((weights * group >= 0).all()),
        "order_kept": bool((weights.abs()[:, order].diff(dim=-1) <= 0).all()),
        "support_only_shrinks": bool((supports.diff() <= 0).all()),
    }


def _changes_between(
    size: Callable[[float], int], low: float, before: int, high: float, after: int
) -> list[dict[str, float]]:
    """Return the changes of the support, from ``before`` at λ = low to ``after`` at λ = high, found by bisection."""
    if before == after:
        return []
    left, right, reached = low, high, after
    for _ in range(_BISECTIONS):
        middle = math.sqrt(left * right)
        found = size(middle)
        if found == before:
            left = middle
        else:
            right, reached = middle, found
    return [{"lambda": right, "from": before, "to": reached}, *_changes_between(size, right, reached, high, after)]


def compute(points: int = 150) -> dict[str, Any]:
    """Return the paths of all groups at ``points`` values of λ each."""
    lambdas: list[float] = torch.logspace(
        math.log10(SPAN[0]), math.log10(SPAN[1]), points, dtype=torch.float64
    ).tolist()
    return {"paths": [follow(pattern, z, lambdas) for pattern, z in GROUPS.items()]}


def picture(numbers: dict[str, Any]) -> Figure:
    """Draw magnitudes against λ, a panel a pattern, with the changes of the support."""
    figure, panels = results.axes(len(numbers["paths"]), width=4.6)
    for axis, path in zip(panels, numbers["paths"], strict=True):
        magnitudes = torch.tensor(path["weights"]).abs()
        points = len(path["lambdas"])
        largest_first = sorted(range(len(path["z"])), key=lambda index: -abs(path["z"][index]))
        for rank, index in enumerate(largest_first):
            style = results.style(rank) | {"markevery": (rank * points // 40, max(1, points // 8))}
            axis.plot(path["lambdas"], magnitudes[:, index], label=f"{path['z'][index]:+g}", **style)
        for change in path["changes"]:
            axis.axvline(change["lambda"], color="black", linestyle=":", linewidth=1)
            axis.annotate(
                f"{change['from']}→{change['to']}",
                (change["lambda"], 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-2, 0),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                fontsize=8,
            )
        axis.set(xscale="log", title=path["pattern"], xlabel="λ", ylabel="magnitude", ylim=(-0.03, 1.18))
        axis.legend(title="weight z", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def markdown(numbers: dict[str, Any]) -> str:
    """Return the table of the changes of the support."""
    rows = []
    for path in numbers["paths"]:
        steps = [f"{change['from']}→{change['to']} at λ = {change['lambda']:.3g}" for change in path["changes"]]
        kept = all(path[fact] for fact in ("signs_kept", "order_kept", "support_only_shrinks"))
        group = ", ".join(f"{weight:g}" for weight in path["z"])
        rows.append([path["pattern"], group, "; ".join(steps), "yes" if kept else "no"])
    return results.table(["pattern", "group z", "support", "signs and order kept, support only shrinks"], rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = results.parser(__doc__ or "")
    parser.add_argument("--points", type=int, help="values of lambda a panel")
    given = parser.parse_args(arguments)
    numbers = compute(given.points or (1500 if given.full else 150))
    results.save(NAME, numbers, picture(numbers), given.out)
    print(markdown(numbers))


if __name__ == "__main__":
    main()
