"""The curve of what stays dense: perplexity over the share of weights pruned, from what `bench/keep_dense.py` measured.

python bench/keep_dense_picture.py DIR/results.jsonl --picture docs/assets/keep-dense.svg
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recovery_picture import finish
from wind_tunnel_picture import COLOURS, MARKERS

_FAMILIES = {
    "by measured damage": ("nothing", "measured", "dense"),
    "the first blocks": ("first",),
    "the last blocks": ("last",),
    "at random": ("at random",),
    "one kind everywhere": ("all",),
}
"""How the names of choices begin that belong together; the first are joined by a line."""


def draw(entries: Sequence[Mapping[str, Any]], text: str, path: Path) -> None:
    """Draw the perplexity of one text for every choice, and a line through those by measured damage.

    Args:
        entries: of ``results.jsonl``, of one method.
        text: by its name there.
        path: of the picture.
    """
    import matplotlib as mpl

    mpl.use("agg")  # no screen
    with mpl.rc_context({"svg.hashsalt": "keep-dense", "svg.fonttype": "none"}):  # the same bytes every time
        from matplotlib import pyplot as plt

        figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
        points = [(100 * (1 - entry["dense"]), entry["perplexity"][text], entry["name"]) for entry in entries]
        for number, (family, beginnings) in enumerate(_FAMILIES.items()):
            chosen = sorted(point for point in points if point[2].startswith(beginnings))
            axis.plot(
                [x for x, _, _ in chosen],
                [y for _, y, _ in chosen],
                label=family,
                color=COLOURS[number],
                marker=MARKERS[number],
                linestyle="none" if number else "-",
            )
            for x, y, name in chosen:
                if name.startswith("all "):
                    axis.annotate(name[4:], (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axis.set(xlabel="share of the prunable weights pruned to 2:4, %", ylabel=f"perplexity of {text}", yscale="log")
        finish(figure, axis, path)
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--text", help="whose perplexity is drawn; the first one if none is named")
    parser.add_argument("--method", help="of the entries that are drawn; that of the first choice if none is named")
    given = parser.parse_args(arguments)
    entries = [json.loads(line) for line in given.results.read_text(encoding="utf-8").splitlines()]
    method = given.method or next(entry["method"] for entry in entries if entry["method"])
    drawn = [entry for entry in entries if entry["method"] in ("", method)]
    draw(drawn, given.text or next(iter(entries[0]["perplexity"])), given.picture)


if __name__ == "__main__":
    main()
