"""The picture and the table of the wind tunnel."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wind_tunnel_cells import LINES, Cell, best_rate

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
"""Okabe and Ito's, which the colour-blind can tell apart: one a method."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
"""One a method, for there are more of them than colours."""
STROKES = {"dense": "--", "magnitude": ":", "wanda": "-.", "auto": (0, (5, 1, 1, 1, 1, 1)), "auto+block": "-"}
"""One a start."""

Ratios = dict[str, dict[float, list[float]]]
"""By line and budget, one for each seed."""


def ratios(results: Sequence[Mapping[str, Any]]) -> Ratios:
    """Gather what counts: of every line the cells with the learning rate that was chosen for it.

    Raises:
        ValueError: a cell did not end 2:4.
    """
    by_line: defaultdict[str, list[tuple[Cell, Mapping[str, Any]]]] = defaultdict(list)
    for entry in results:
        if not entry["two_of_four"]:
            raise ValueError(f"{entry['line']} at {entry['budget']} tokens a parameter did not end 2:4")
        cell = Cell(entry["line"], entry["budget"], entry["seed"], entry["rate"])
        by_line[entry["line"]].append((cell, entry))
    found: Ratios = {}
    for line in LINES:
        rate = best_rate(line, by_line[line.name])
        budgets: defaultdict[float, list[float]] = defaultdict(list)
        for cell, entry in by_line[line.name]:
            if cell.rate == rate:
                budgets[cell.budget].append(entry["ratio"])
        if budgets:
            found[line.name] = dict(sorted(budgets.items()))
    return found


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table: the mean over the seeds, and half the range that they span, by line and budget."""
    found = ratios(results)
    budgets = sorted({budget for each in found.values() for budget in each})
    before = {entry["line"]: entry["ratio_before"] for entry in results}
    rates = {line.name: best_rate(line, _cells(results)) for line in LINES}
    best = {
        budget: min(statistics.fmean(each[budget]) for each in found.values() if budget in each) for budget in budgets
    }
    header = ["method and start", "rate", "untrained", *(f"{budget:g}" for budget in budgets)]
    rows = []
    for name, each in found.items():
        cells = [_shown(each.get(budget, []), best[budget]) for budget in budgets]
        untrained = f"{before[name]:.2f}" if before[name] > 1.0005 else ""
        rows.append([name, f"{rates[name]:g}", untrained, *cells])
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(results: Iterable[Mapping[str, Any]]) -> list[tuple[Cell, Mapping[str, Any]]]:
    return [(Cell(entry["line"], entry["budget"], entry["seed"], entry["rate"]), entry) for entry in results]


def _shown(values: Sequence[float], best: float) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    said = f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {(max(values) - min(values)) / 2:.3f}"
    return f"**{said}**" if mean == best else said


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the ratios over tokens a parameter: a colour a method, a stroke a start, bars from the least to the most."""
    import matplotlib as mpl

    mpl.use("agg")  # no screen
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "wind tunnel"}):  # the same bytes every time
        found = ratios(results)
        by_name = {line.name: line for line in LINES}
        methods = list(dict.fromkeys(by_name[name].name.rpartition(" from ")[0] for name in found))
        figure, axis = plt.subplots(figsize=(8.6, 5.2), layout="constrained")
        for name, each in found.items():
            budgets = list(each)
            means = [statistics.fmean(values) for values in each.values()]
            spans = [
                [mean - min(values) for mean, values in zip(means, each.values(), strict=True)],
                [max(values) - mean for mean, values in zip(means, each.values(), strict=True)],
            ]
            method = name.rpartition(" from ")[0]
            axis.errorbar(
                budgets,
                means,
                yerr=spans,
                label=name,
                color=COLOURS[methods.index(method) % len(COLOURS)],
                linestyle=STROKES[by_name[name].start],
                marker=MARKERS[methods.index(method) % len(MARKERS)],
                markersize=5,
                capsize=2,
            )
        every = sorted({budget for each in found.values() for budget in each})
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="tokens a parameter",
            ylabel="perplexity over the dense model's",
            xticks=every,
            xticklabels=[f"{budget:g}" for budget in every],
        )
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.grid(visible=True, which="both", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
