r"""Perplexity by level of sparsity: what a share of zeros costs, and what the freedom to place them is worth.

    python experiments/levels.py MODEL --calibration c4-calibration.jsonl \
        --data c4-validation.jsonl --data wikitext2-test.txt --rows levels.jsonl

The paper prunes to 2:4 and leaves other levels open. Here every method prunes a copy of the model at every level, with
the same tokens. A row is appended to ``--rows``, one JSON object a line, as soon as it is measured; what an earlier
call has measured there in the same way is kept, so that a sweep that was stopped goes on, and methods, levels and
efforts of ``auto`` can be added one by one. ``--show`` measures nothing, and shows the rows that are there. What a
method does not take is a row that says so. ``--full``: 1024 sequences of 2048 tokens and 64 windows, for a GPU.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import halve
import results
from halve.checkpoint import load as checkpoint
from halve.errors import HalveError
from halve.evaluation.perplexity import evaluation_texts, perplexity
from halve.maths.pattern import Pattern
from halve.model.stacks import find_stack
from halve.run.contender import Contender
from halve.solve.methods.auto import EFFORTS
from halve.text.calibration import Calibration

NAME = "levels"
PICTURE = results.DEFAULT_OUT.parent / "assets" / f"{NAME}.svg"
METHODS = ("wanda", "sparsegpt", "auto+cg")
LEVELS = ("2:4", "4:8", "50%", "3:4", "1:4", "2:8", "8:16", "6:8")
"""Those that tell most come first."""
DENSE = "dense"
_FREEDOM_ON_THE_AXIS = 40.0
"""Percentage points that levels with the same share of zeros lie apart for one bit of their masks."""

Row = dict[str, Any]


def mask_bits(pattern: Pattern) -> float:
    """Return how freely a level places its zeros, in bits a weight: log2 of the number of masks over their size.

    For a percentage it is the entropy of that share, which long rows come near.
    """
    if pattern.keep is None or pattern.group is None:
        share = pattern.sparsity
        return -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return math.log2(math.comb(pattern.group, pattern.keep)) / pattern.group


def ordered(levels: Sequence[str]) -> list[str]:
    """Return levels by their share of zeros, those of one share by their freedom."""
    patterns = [Pattern(level) for level in dict.fromkeys(levels)]
    return [pattern.text for pattern in sorted(patterns, key=lambda each: (each.sparsity, mask_bits(each)))]


def label_of(method: str, effort: str) -> str:
    """Return the name of a series: an effort is part of it where the method is ``auto``."""
    return f"{method}, {effort}" if Contender.parse(method).method == "auto" else method


def kept_share(model: nn.Module) -> float:
    """Return the share of the weights of all matrices in the blocks that are not zero, 0 to 1."""
    _, blocks = find_stack(model)
    matrices = [parameter for parameter in blocks.parameters() if parameter.ndim >= 2]
    return sum(int((matrix != 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)


def read_rows(path: Path) -> list[Row]:
    """Return the rows that earlier calls have written; half a line, of one that was stopped, is taken out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Prune and measure what is missing, appending every row as it is done.

    Returns:
        dict[str, Any]: the setting; ``dense``, perplexities; ``rows``, in the order in which they were measured.
    """
    loaded = checkpoint.load_model(given.model)
    tokens = Calibration(given.calibration, given.samples, given.seq_len, given.seed, bos="once").text_tokens(loaded)
    texts = evaluation_texts(
        loaded, given.data, seq_len=given.seq_len, max_windows=given.windows, text_field="text", bos="once"
    )
    setting = {
        "model": Path(given.model).name,
        "samples": given.samples,
        "seq_len": given.seq_len,
        "windows": given.windows,
        "seed": given.seed,
        "calibration": Path(tokens.source).name,
        "data": [Path(text.source).name for text in texts],
        "tokens_sha256": [tokens.sha256, *(text.sha256 for text in texts)],
    }
    rows = [row for row in read_rows(given.rows) if row["setting"] == setting]

    def measure(model: nn.Module) -> list[float]:
        return [perplexity(model, text, device=given.device).value for text in texts]

    def keep(row: Row) -> None:
        rows.append({**row, "setting": setting})
        given.rows.parent.mkdir(parents=True, exist_ok=True)
        with given.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(row), flush=True)

    def prune(level: str, method: str) -> Row:
        contender = Contender.parse(method)
        options = {"effort": given.effort} if contender.method == "auto" else {}
        begun = time.process_time()
        try:
            pruned = halve.prune(
                copy.deepcopy(loaded.model),
                pattern=level,
                method=contender.method,
                refit=contender.refit,
                calibration=tokens.ids,
                device=given.device,
                **options,
            )
        except HalveError as error:
            return {"error": str(error)}
        cpu_seconds = time.process_time() - begun
        return {
            "kept": kept_share(pruned.model),
            "perplexities": measure(pruned.model),
            "mean_relative_loss": pruned.report.mean_relative_loss,
            "cpu_seconds": round(cpu_seconds, 1),
            "seconds": {phase: round(seconds, 1) for phase, seconds in pruned.report.seconds.items()},
            "by": sorted({matrix.method for matrix in pruned.report.matrices}),
            "warnings": list(pruned.report.warnings),
        }

    known = {(row["level"], row["method"]) for row in rows}
    if (DENSE, DENSE) not in known:
        keep({"level": DENSE, "method": DENSE, "perplexities": measure(loaded.model)})
    for method, level in product(given.methods, given.levels):
        label = label_of(method, given.effort)
        if (level, label) not in known:
            keep({"level": level, "method": label, **prune(level, method)})
    return numbers_of(rows)


def numbers_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what `run` returns, of rows measured in the way of the last one; the dense model's is among them."""
    setting = rows[-1]["setting"]
    alike = [{name: row[name] for name in row if name != "setting"} for row in rows if row["setting"] == setting]
    dense = next(row["perplexities"] for row in alike if row["level"] == DENSE)
    return {**setting, "dense": dense, "rows": [row for row in alike if row["level"] != DENSE]}


def ratios(numbers: dict[str, Any], row: Row) -> list[float]:
    """Return a row's perplexities over the dense model's."""
    return [value / dense for value, dense in zip(row["perplexities"], numbers["dense"], strict=True)]


def excess(numbers: dict[str, Any], method: str, level: str) -> float | None:
    """Return what a level costs, in nats a token, mean of the texts; None where it was not measured."""
    for row in numbers["rows"]:
        if (row["method"], row["level"]) == (method, level) and "error" not in row:
            logs = [math.log(ratio) for ratio in ratios(numbers, row)]
            return sum(logs) / len(logs)
    return None


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Draw perplexity over the dense model's against the share of zeros, a panel a text and a line a method."""
    with mpl.rc_context({"svg.hashsalt": NAME, "svg.fonttype": "none"}):  # the same bytes every time
        figure = picture(numbers)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def picture(numbers: dict[str, Any]) -> Figure:
    """Return the picture, a panel a text."""
    figure, panels = results.axes(len(numbers["data"]), width=5.6, height=4.2, sharey=True)
    for panel, (axis, data) in enumerate(zip(panels, numbers["data"], strict=True)):
        found: dict[str, dict[str, float]] = {}
        for row in numbers["rows"]:
            if "error" not in row:
                found.setdefault(row["method"], {})[row["level"]] = ratios(numbers, row)[panel]
        axis.axhline(1.0, color="black", linestyle=":", label=DENSE)
        draw_levels(axis, found)
        axis.set_title(data)
    panels[0].set_ylabel("perplexity / dense model's")
    results.legend_below(figure, panels[0])
    return figure


def draw_levels(axis: Axes, values: dict[str, dict[str, float]]) -> None:
    """Draw a line a method: levels with one share of zeros side by side, the more freedom the further right.

    Args:
        axis: to draw on; its vertical scale becomes logarithmic.
        values: positive, by method and level.
    """
    places = _places([level for found in values.values() for level in found])
    for index, (method, found) in enumerate(values.items()):
        shares = sorted({Pattern(level).sparsity for level in found})
        for share in shares:
            some = [level for level in places if level in found and Pattern(level).sparsity == share]
            label = method if share == shares[0] else None
            axis.plot([places[at] for at in some], [found[at] for at in some], label=label, **results.style(index))
    axis.margins(x=0.08, y=0.15)
    axis.set(yscale="log", xlabel="level, by its share of zeros and the freedom to place them")
    axis.set_xticks(list(places.values()), list(places), fontsize=8)
    for share in sorted({Pattern(level).sparsity for level in places}):
        name = f"{100 * share:g} % zeros"
        axis.text(100 * share, 0.99, name, transform=axis.get_xaxis_transform(), ha="center", va="top", fontsize=8)
    ticks = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
    low, high = axis.get_ylim()
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def _places(levels: Sequence[str]) -> dict[str, float]:
    """Return where levels lie on the axis of shares of zeros, in percent, sorted."""
    order = [Pattern(level) for level in ordered(levels)]
    centres = {}
    for share in {pattern.sparsity for pattern in order}:
        bits = [mask_bits(pattern) for pattern in order if pattern.sparsity == share]
        centres[share] = (min(bits) + max(bits)) / 2
    return {
        pattern.text: 100 * pattern.sparsity + _FREEDOM_ON_THE_AXIS * (mask_bits(pattern) - centres[pattern.sparsity])
        for pattern in order
    }


def markdown(numbers: dict[str, Any]) -> str:
    """Return two tables: every level by every method, and what freedom is worth at one share of zeros."""
    methods = list(dict.fromkeys(row["method"] for row in numbers["rows"]))
    order = ordered([row["level"] for row in numbers["rows"]])
    by_level = sorted(numbers["rows"], key=lambda row: (order.index(row["level"]), methods.index(row["method"])))
    rows = [
        [DENSE, "", "", "", *[f"{value:.2f}" for value in numbers["dense"]], "", "", ""],
        *([row["level"], _bits(row["level"]), row["method"], *_cells(numbers, row)] for row in by_level),
    ]
    header = ["level", "mask bits a weight", "method", "kept", *numbers["data"], "/ dense", "layer loss", "seconds"]
    tables = [results.table(header, rows), _costs(numbers, methods, order)]
    refused = [f"{row['method']} at {row['level']}: {row['error']}" for row in numbers["rows"] if "error" in row]
    if refused:
        tables.append("Not measured: " + "; ".join(refused) + ".")
    return "\n\n".join(tables)


def _bits(level: str) -> str:
    return f"{mask_bits(Pattern(level)):.2f}"


def _cells(numbers: dict[str, Any], row: Row) -> list[str]:
    """Return what stands behind level, freedom and method."""
    if "error" in row:
        return ["not measured"] + [""] * (len(numbers["data"]) + 3)
    times_dense = " / ".join(f"{ratio:.2f}" for ratio in ratios(numbers, row))
    values = [f"{value:.2f}" for value in row["perplexities"]]
    return [f"{row['kept']:.1%}", *values, times_dense, f"{row['mean_relative_loss']:.4f}", f"{row['cpu_seconds']:.0f}"]


def _costs(numbers: dict[str, Any], methods: Sequence[str], order: Sequence[str]) -> str:
    """Return what every level costs in nats, and in brackets which share of its tightest neighbour's cost that is."""
    rows = []
    for method in methods:
        cells = []
        for level in order:
            cost = excess(numbers, method, level)
            tightest = next(other for other in order if Pattern(other).sparsity == Pattern(level).sparsity)
            base = excess(numbers, method, tightest)
            cell = "" if cost is None else f"{cost:.3f}"
            cells.append(cell if not base or cost is None or level == tightest else f"{cell} ({cost / base:.0%})")
        rows.append([method, *cells])
    return results.table(["nats a token over dense", *order], rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = results.parser(__doc__ or "")
    parser.add_argument("model", help="checkpoint directory, hub id or .gguf file")
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--data", action="append", help="text that perplexity is measured on; repeat the flag")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), help="N:M keeps N of M; 50%% makes half zeros")
    parser.add_argument("--effort", choices=EFFORTS, default="fast", help="of auto")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=Path, required=True, help="file of rows, one JSON object a line; added to")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--show", action="store_true", help="what is there, measured as the last row was")
    given = parser.parse_args(arguments)
    if given.show and not read_rows(given.rows):
        parser.error(f"--show: {given.rows} has no rows yet: leave --show out, and they are measured")
    if not (given.show or given.data):
        parser.error("give at least one text to measure perplexity on, with --data")
    given.samples = given.samples or (1024 if given.full else 32)
    given.seq_len = given.seq_len or (2048 if given.full else 512)
    given.windows = given.windows or (64 if given.full else 16)
    given.levels = [Pattern(level).text for level in given.levels]
    numbers = numbers_of(read_rows(given.rows)) if given.show else run(given)
    results.save(NAME, numbers, None, given.out)
    draw(numbers, given.picture)
    print(markdown(numbers))


if __name__ == "__main__":
    main()
