"""The curves of trainings end to end: perplexity of held-out text over tokens, from the records of checkpoints.

python bench/recovery_picture.py DIR… --picture docs/assets/recovery.svg [--labels "3e-4" "6e-4"]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halve.checkpoint.directory import RECORD
from wind_tunnel_picture import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curve(directory: Path) -> tuple[list[int], list[float]]:
    """Return tokens and perplexities of the last training of a checkpoint, wherever the held-out text was looked at."""
    record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    points = [point for point in record["trainings"][-1]["curve"] if point.get("perplexity") is not None]
    return [point["tokens"] for point in points], [point["perplexity"] for point in points]


def draw(directories: Sequence[Path], labels: Sequence[str], path: Path) -> None:
    """Draw a line for each checkpoint."""
    import matplotlib as mpl

    mpl.use("agg")  # no screen
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "recovery"}):  # the same bytes every time
        figure, axis = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
        for number, (directory, label) in enumerate(zip(directories, labels, strict=True)):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axis.plot(*curve(directory), label=label, color=colour, marker=marker, markersize=5)
        axis.set(xlabel="tokens trained on", ylabel="perplexity of held-out text", yscale="log")
        axis.xaxis.set_major_formatter(lambda tokens, _place: f"{tokens / 1000:g}k" if tokens else "0")
        finish(figure, axis, path)
        plt.close(figure)


def finish(figure: "Figure", axis: "Axes", path: Path) -> None:
    """Give a picture of perplexities its grid and legend, and write it, without the date."""
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(visible=True, which="both", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, help="checkpoints that halve finetune has written")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--labels", nargs="*", help="one for each; the directories' names if none are given")
    given = parser.parse_args(arguments)
    labels = given.labels or [directory.name for directory in given.directories]
    if len(labels) != len(given.directories):
        parser.error(f"{len(labels)} labels are given for {len(given.directories)} directories: give one for each")
    draw(given.directories, labels, given.picture)


if __name__ == "__main__":
    main()
