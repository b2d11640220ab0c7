"""What a model costs in every precision, dense and at 2:4: perplexity over bytes on disk and over tokens a second.

    python bench/engines_picture.py engines.json --picture docs/assets/engines.svg \
        --point "dense Q4_0" "llama.cpp Q4_0" 91.7 36.03 --point "2:4 int8" "Halve packed int8" 132.3 53.15

engines.json is what bench/engines.py has written for the model. Each point has a name, whose first word is the line it
lies on, the contender that decoded it (none: ""), its weights in MB and its perplexity. The table that is printed names
for each point those that have a lower perplexity and are no larger, or no slower.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wind_tunnel_picture import COLOURS, MARKERS


@dataclass(frozen=True)
class Point:
    """A model in one precision: `megabytes` of weights on disk, `speed` in tokens a second, if it was measured."""

    name: str
    megabytes: float
    perplexity: float
    speed: float | None

    @property
    def line(self) -> str:
        """Return what it is joined with: dense or a pattern."""
        return self.name.split()[0]


def speed(rows: Sequence[dict[str, float | str]], contender: str) -> float | None:
    """Return the geometric mean over threads and contexts of what a contender decodes a second; None has no name.

    Raises:
        SystemExit: it is not among the rows.
    """
    if not contender:
        return None
    found = [float(row["decode"]) for row in rows if row["contender"] == contender]
    if not found:
        known = ", ".join(dict.fromkeys(str(row["contender"]) for row in rows))
        raise SystemExit(f"nothing was measured for {contender!r}: give one of {known}")
    return statistics.geometric_mean(found)


def smaller_and_better(point: Point, points: Sequence[Point]) -> list[str]:
    """Return those of a lower perplexity that are no larger."""
    better = (other for other in points if other.perplexity < point.perplexity)
    return [other.name for other in better if other.megabytes <= point.megabytes]


def faster_and_better(point: Point, points: Sequence[Point]) -> list[str]:
    """Return those of a lower perplexity that are no slower."""
    if point.speed is None:
        return []
    better = (other for other in points if other.perplexity < point.perplexity)
    return [other.name for other in better if other.speed is not None and other.speed >= point.speed]


def show(points: Sequence[Point]) -> None:
    """Print a table for docs/benchmarks.md."""
    print("| | MB | tokens/s | perplexity | lower perplexity, no larger | lower perplexity, no slower |")
    print("|---|---:|---:|---:|---|---|")
    for point in points:
        rate = "" if point.speed is None else f"{point.speed:.1f}"
        smaller, faster = (", ".join(find(point, points)) for find in (smaller_and_better, faster_and_better))
        print(f"| {point.name} | {point.megabytes:.1f} | {rate} | {point.perplexity:.2f} | {smaller} | {faster} |")


def draw(points: Sequence[Point], text: str, path: Path) -> None:
    """Draw both pictures side by side, a line for dense and for each pattern."""
    import matplotlib as mpl

    mpl.use("agg")  # no screen
    with mpl.rc_context({"svg.hashsalt": "engines", "svg.fonttype": "none"}):  # the same bytes every time
        _draw(points, text, path)


def _draw(points: Sequence[Point], text: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    for axis, values, label in (
        (axes[0], [point.megabytes for point in points], "weights on disk, MB"),
        (axes[1], [point.speed for point in points], "tokens a second, batch 1"),
    ):
        for number, line in enumerate(dict.fromkeys(point.line for point in points)):
            pairs = zip(points, values, strict=True)
            drawn = [(value, point) for point, value in pairs if point.line == line and value is not None]
            axis.plot(
                [value for value, _point in drawn],
                [point.perplexity for _value, point in drawn],
                label=line,
                color=COLOURS[number],
                marker=MARKERS[number],
                linewidth=1,
            )
            for value, point in drawn:
                precision = point.name.removeprefix(line).strip()
                axis.annotate(precision, (value, point.perplexity), (4, 5), textcoords="offset points", fontsize=8)
        axis.set(xlabel=label)
        axis.margins(x=0.12, y=0.12)
        axis.grid(visible=True, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel=f"perplexity of {text}")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, print the table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, help="the rows that bench/engines.py has written")
    fields = ("NAME", "CONTENDER", "MB", "PERPLEXITY")
    parser.add_argument("--point", nargs=4, action="append", required=True, metavar=fields, dest="points")
    parser.add_argument("--text", default="WikiText-2", help="what the perplexity is of")
    parser.add_argument("--picture", type=Path, required=True)
    given = parser.parse_args(arguments)
    rows = json.loads(given.engines.read_text(encoding="utf-8"))
    points = [Point(name, float(size), float(loss), speed(rows, who)) for name, who, size, loss in given.points]
    show(points)
    draw(points, given.text, given.picture)


if __name__ == "__main__":
    main()
