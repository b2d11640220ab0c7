"""Where an experiment's numbers and picture go, and how both look: ``NAME.json`` and ``NAME.png`` in one directory."""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")  # no screen

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DEFAULT_OUT = Path(__file__).parent.parent / "docs" / "paper"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
"""Okabe and Ito's, which the colour-blind can tell apart."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every experiment has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=DEFAULT_OUT, help="directory for the JSON and the picture")
    made.add_argument("--full", action="store_true", help="the paper's size, for a GPU")
    return made


def axes(
    columns: int = 1, rows: int = 1, *, width: float = 5.0, height: float = 3.6, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure and a list of its axes, each ``width`` by ``height`` inches; options: those of ``subplots``."""
    size = (width * columns, height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    found: list[Axes] = list(grid.flat)
    for axis in found:
        axis.grid(visible=True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, found


def style(index: int) -> dict[str, Any]:
    """Return colour and marker of the ``index``-th series."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def legend_below(figure: Figure, axis: Axes, columns: int = 6) -> None:
    """Write the legend of one panel, which is that of all, below the figure."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)


def save(name: str, numbers: dict[str, Any], figure: Figure | None, out: Path) -> None:
    """Write the numbers, with what they were computed on, and the picture, if there is one."""
    out.mkdir(parents=True, exist_ok=True)
    content = {**numbers, "machine": machine()}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if figure is not None:
        figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


def load(name: str, out: Path) -> dict[str, Any] | None:
    """Return the numbers that an earlier run wrote, None if there was none."""
    path = out / f"{name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def machine() -> dict[str, Any]:
    """Return what the numbers were computed on."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
