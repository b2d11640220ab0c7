"""The report's charts, as plain figures of Plotly (https://plotly.com/javascript/reference): JSON, drawn in the page.

Series differ by marker as well as by colour. Colours of text and grid are the page's business, which knows its theme.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

from halve.errors import counted
from halve.report.facts import MatrixFacts, RunFacts
from halve.report.training_facts import TrainingFacts

Figure = dict[str, Any]
Quantity = Literal["loss", "kl", "perplexity"]
"""What is known of a step of a training."""

_QUANTITIES = {"loss": "loss", "kl": "held-out KL, nats a token", "perplexity": "held-out perplexity"}

_COLOURS = ("#3b82c4", "#d9730d", "#2a9d6f", "#b05cc6", "#9a8700", "#1797a6", "#8a6d5a", "#7d7d7d")
"""At least 3:1 against white and against the dark page."""
_RED = "#d64550"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "hexagon", "cross")
_DASHES = ("solid", "dash", "dot", "dashdot")


def loss_by_layer(run: RunFacts) -> Figure | None:
    """Relative loss of every matrix by block, a series a kind, the mean over a block's experts; None without losses."""
    series = [_loss_series(index, kind, run) for index, kind in enumerate(run.kinds) if run.mean_losses(kind)]
    if not series:
        return None
    fallen = [matrix for matrix in run.fallbacks if matrix.loss is not None]
    if fallen:
        series.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "fell back",
                "x": [_place(matrix) for matrix in fallen],
                "y": [matrix.loss for matrix in fallen],
                "marker": {"symbol": "x", "size": 13, "color": _RED},
                "text": [_hover(matrix) for matrix in fallen],
                "hovertemplate": "%{text}<extra>fell back</extra>",
            }
        )
    return {"data": series, "layout": _by_block(series, "relative loss")}


def _loss_series(index: int, kind: str, run: RunFacts) -> dict[str, Any]:
    groups: dict[int, list[MatrixFacts]] = {}
    for matrix in run.matrices:
        if matrix.kind == kind:
            groups.setdefault(_place(matrix), []).append(matrix)
    means = run.mean_losses(kind)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(kind),
        "x": list(means),
        "y": list(means.values()),
        "text": [_hover_of_all(kind, groups[place]) for place in means],
        "hovertemplate": "%{text}<extra></extra>",
        **_style(index),
    }


def _place(matrix: MatrixFacts) -> int:
    return -1 if matrix.block is None else matrix.block


def _hover(matrix: MatrixFacts) -> str:
    lines = [f"<b>{escape(matrix.name)}</b>", f"relative loss {matrix.loss:.5f}"]
    if matrix.loss_before_refit is not None:
        lines.append(f"before the refit {matrix.loss_before_refit:.5f}")
    lines.append(f"{matrix.shape[0]} × {matrix.shape[1]}, {escape(matrix.method)}")  # noqa: RUF001 - a times sign
    if matrix.status != "ok":
        lines.append(f"{escape(matrix.status)}: {escape(matrix.reason)}")
    if matrix.iterations is not None:
        lines.append(counted(matrix.iterations, "iteration"))
    if matrix.tokens is not None:
        lines.append(counted(matrix.tokens, "token"))
    if matrix.seconds is not None:
        lines.append(f"{matrix.seconds:.2f} s")
    return "<br>".join(lines)


def _hover_of_all(kind: str, group: Sequence[MatrixFacts]) -> str:
    """Say what there is to say of the matrices of one kind in one block: one, or those of several experts."""
    if len(group) == 1:
        return _hover(group[0])
    losses = [matrix.loss for matrix in group if matrix.loss is not None]
    worst = max((matrix for matrix in group if matrix.loss is not None), key=lambda matrix: matrix.loss or 0.0)
    return (
        f"<b>{escape(kind)}</b><br>relative loss {math.fsum(losses) / len(losses):.5f} on average"
        f"<br>{min(losses):.5f} to {max(losses):.5f} ({escape(worst.name)})"
        f"<br>measured on {len(losses)} of {len(group)} matrices"
    )


def reconstruction(run: RunFacts) -> Figure | None:
    """Error of every block's output before and after its reconstruction; None if there was none."""
    if not run.blocks:
        return None
    places = list(range(len(run.blocks)))
    series = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": places,
            "y": values,
            "text": [escape(block.name) for block in run.blocks],
            "hovertemplate": "<b>%{text}</b><br>error %{y:.5f}<extra>" + name + "</extra>",
            **_style(index),
        }
        for index, (name, values) in enumerate(
            {"before": [b.before for b in run.blocks], "after": [b.after for b in run.blocks]}.items()
        )
    ]
    return {"data": series, "layout": _by_block(series, "relative error of the block's output")}


def bars(values: Mapping[str, float], unit: str) -> Figure | None:
    """Return horizontal bars, the first on top; None if there are no values."""
    if not values:
        return None
    figure = _layout(unit, "")
    figure["yaxis"] |= {"autorange": "reversed", "type": "category"}
    figure |= {"showlegend": False, "bargap": 0.35}
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": list(values.values()),
        "y": [escape(name) for name in values],
        "marker": {"color": _COLOURS[0]},
        "hovertemplate": "%{y}: %{x:.4g} " + unit + "<extra></extra>",
    }
    return {"data": [bar], "layout": figure}


def training(trainings: Sequence[TrainingFacts], quantity: Quantity, *, most: int) -> Figure | None:
    """Return a curve over tokens, a series a training, each where the one before it ended; None without points.

    Args:
        trainings: in order.
        quantity: what of each point is drawn.
        most: of the trainings, the last ones, that are drawn.
    """
    series, kept, start = [], [], 0
    for index, each in enumerate(trainings):
        points = each.losses if quantity == "loss" else each.held_out
        drawn = [(start + point.tokens, getattr(point, quantity), point.step) for point in points]
        drawn = [point for point in drawn if point[1] is not None]
        start += each.tokens
        if drawn and index >= len(trainings) - most:
            series.append(_curve(f"training {index + 1}", drawn) | _style(index))
            kept += [point for point in drawn if point[2] == each.best_step and quantity != "loss"]
    if not series:
        return None
    if kept:
        star = {"symbol": "star", "size": 14, "color": _RED}
        series.append(_curve("weights that stayed", kept) | {"mode": "markers", "marker": star})
    layout = _layout("tokens trained on", _QUANTITIES[quantity])
    layout["yaxis"]["rangemode"] = "normal"
    return {"data": series, "layout": layout}


def _curve(name: str, points: Sequence[tuple[int, float, int]]) -> dict[str, Any]:
    tokens, values, steps = zip(*points, strict=True)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(tokens),
        "y": list(values),
        "text": [f"step {step}" for step in steps],
        "hovertemplate": "%{text}: %{y:.5f}<extra>" + name + "</extra>",
    }


def losses_of_runs(runs: Mapping[str, RunFacts]) -> Figure | None:
    """Mean relative loss by block, a series a run, named by the keys; None if no run has losses."""
    series = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escape(name),
            "x": list(run.mean_losses()),
            "y": list(run.mean_losses().values()),
            "hovertemplate": "block %{x}: %{y:.5f} on average<extra>" + escape(name) + "</extra>",
            **_style(index),
        }
        for index, (name, run) in enumerate(runs.items())
        if run.mean_losses()
    ]
    return {"data": series, "layout": _by_block(series, "mean relative loss")} if series else None


def _style(index: int) -> dict[str, Any]:
    turn = index // len(_COLOURS)
    return {
        "marker": {"symbol": _SYMBOLS[index % len(_SYMBOLS)], "size": 7, "color": _COLOURS[index % len(_COLOURS)]},
        "line": {"dash": _DASHES[turn % len(_DASHES)], "width": 1.5},
    }


def _by_block(series: Sequence[Mapping[str, Any]], up: str) -> dict[str, Any]:
    """Return the layout of series over blocks, with whole numbers on the axis and room beside the first and last."""
    places = [place for one in series for place in one["x"]]
    first, last = min(places), max(places)
    layout = _layout("block", up)
    step = max(1, round((last - first) / 12))
    layout["xaxis"] |= {"range": [first - 0.5, last + 0.5], "dtick": step, "zeroline": False}
    return layout


def _layout(across: str, up: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": across}, "automargin": True},
        "yaxis": {"title": {"text": up}, "automargin": True, "rangemode": "tozero"},
        "legend": {"orientation": "h", "yanchor": "top", "y": -0.25},
        "margin": {"l": 50, "r": 10, "t": 10, "b": 40},
        "hovermode": "closest",
    }
