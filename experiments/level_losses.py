r"""Loss of single matrices by level of sparsity, on tokens that no method saw: `levels.py` in minutes.

    python experiments/level_losses.py MODEL --calibration c4-calibration.jsonl

Every method prunes the same matrices of a dense model to every level, from every second calibration sequence, and is
judged on the others. Small size: 64 rows of four matrices of the middle block, 32 sequences of 512 tokens. ``--full``:
all rows, 1024 sequences of 2048 tokens.
"""

import argparse
import json
import math
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import halve
import levels
import matrices_of_model
import results
from halve.maths.pattern import Pattern
from halve.maths.quadratic import relative_loss
from halve.model.stacks import find_stack
from halve.run.contender import Contender

NAME = "level_losses"
METHODS = ("wanda", "sparsegpt", "wanda+cg", "sparsegpt+cg", "auto+cg")
"""Method and refit; ``auto`` chooses its shrinkage from halves of the training tokens, as it does in a whole model."""
KINDS = ("q_proj", "o_proj", "gate_proj", "down_proj")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Prune every matrix by every method to every level.

    Returns:
        dict[str, Any]: the setting, and ``rows`` with level, method, matrix and relative loss on the held-out tokens.
    """
    loaded, ids = matrices_of_model.load(given)
    block = len(find_stack(loaded.model)[1]) // 2 if given.block is None else given.block
    numbers: dict[str, Any] = {
        "model": Path(given.model).name,
        "sequences": len(ids),
        "seq_len": ids.shape[1],
        "rows_of_a_matrix": given.rows,
        "block": block,
        "rows": [],
    }
    for matrix in matrices_of_model.matrices_of_model(
        loaded.model, ids, [block], rows=given.rows, held_out=True, snapshots=lambda _matrix: (), device=given.device
    ):
        if matrix.kind not in given.kinds:
            continue
        assert matrix.held_out is not None
        for method, level in product(given.methods, given.levels):
            contender = Contender.parse(method)
            pruned = halve.prune_weight(matrix.weight, matrix.fitted, level, contender.method, contender.refit)
            loss = relative_loss(pruned.weight, matrix.weight, matrix.held_out.gram)
            numbers["rows"].append({"level": level, "method": method, "kind": matrix.kind, "loss": loss})
            print(json.dumps(numbers["rows"][-1]), flush=True)
    results.save(NAME, numbers, picture(numbers), given.out)
    return numbers


def means(numbers: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the geometric mean over the matrices, by method and level."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in numbers["rows"]:
        found.setdefault(row["method"], {}).setdefault(row["level"], []).append(math.log(row["loss"]))
    return {
        method: {level: math.exp(statistics.fmean(logs)) for level, logs in by_level.items()}
        for method, by_level in found.items()
    }


def picture(numbers: dict[str, Any]) -> Figure:
    """Draw the loss against the share of zeros, a line a method."""
    figure, (axis,) = results.axes(width=6.4, height=4.0)
    levels.draw_levels(axis, means(numbers))
    axis.set_ylabel("relative loss on held-out tokens")
    results.legend_below(figure, axis)
    return figure


def markdown(numbers: dict[str, Any]) -> str:
    """Return the table of losses; in brackets over that of the tightest level with the same share of zeros."""
    order = levels.ordered([row["level"] for row in numbers["rows"]])
    rows = []
    for method, by_level in means(numbers).items():
        tightest: dict[float, str] = {}
        cells = []
        for level in order:
            first = tightest.setdefault(Pattern(level).sparsity, level)
            share = "" if level == first else f" ({by_level[level] / by_level[first]:.0%})"
            cells.append(f"{by_level[level]:.4f}{share}")
        rows.append([method, *cells])
    return results.table(["relative loss, held-out", *order], rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = results.parser(__doc__ or "")
    matrices_of_model.add_arguments(parser)
    parser.add_argument("--block", type=int, help="which; default: the middle one")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="of matrices")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--levels", nargs="+", default=list(levels.LEVELS))
    given = parser.parse_args(arguments)
    matrices_of_model.complete(given, samples=(32, 1024), rows=64)
    given.levels = [Pattern(level).text for level in given.levels]
    print(markdown(run(given)))


if __name__ == "__main__":
    main()
