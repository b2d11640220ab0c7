r"""Masked gradient steps against conjugate gradients: how far the paper's refit gets, and what it is worth.

    python experiments/masked_gradient.py SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4-calibration.jsonl \
        --data c4-validation.jsonl --data wikitext2-test.txt

Once a method has chosen the mask, the paper takes up to 1600 gradient steps on the kept weights (its Eq. 5); conjugate
gradients solve the same least-squares problem. First the relative loss of all matrices of one block, on statistics of
the dense model's inputs; then perplexity with the first blocks of the model pruned, the others dense. Small size: 128
rows of each matrix, one pruned block and fewer step counts for the perplexities, λ growing by 1.05 an iteration there.
``--full``: all rows, all blocks, all step counts, the paper's 1.01, 128 sequences of 2048 tokens.
"""

import argparse
import copy
import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import halve
import matrices_of_model
import results
from calibration_samples import dense_from
from halve.checkpoint.durable import sha256_of
from halve.checkpoint.load import LoadedModel
from halve.evaluation.perplexity import evaluation_texts, perplexity
from halve.maths.gram import Statistics
from halve.maths.quadratic import relative_loss
from halve.solve.refit import refit_cg, refit_gd
from halve.text.tokens import hash_ids

NAME = "masked_gradient"
METHODS = ("wanda", "sparsegpt", "prox-gradient")
STEPS = (0, 50, 100, 200, 400, 800, 1000, 1600)
SMALL_STEPS = (0, 50, 200, 800)
EXACT = "cg"
PAPER = {
    0: (16.92, 30.63),
    50: (16.70, 29.99),
    100: (16.56, 29.58),
    200: (16.41, 29.12),
    400: (16.31, 28.84),
    800: (16.27, 28.66),
    1000: (16.27, 28.62),
    1600: (16.26, 28.63),
}
"""The paper's perplexities of OpenLlama-3B on C4 and WikiText-2, prox, by number of steps."""


def losses_by_steps(
    weight: torch.Tensor, stats: Statistics, method: str, steps: list[int], **options: Any
) -> dict[str, float]:
    """Return the relative loss after each number of masked gradient steps, and after conjugate gradients.

    Steps have no memory, so each count goes on from the one before.

    Args:
        weight: (d_out, d_in) float32.
        stats: of its inputs.
        method: chooses the mask, 2:4.
        steps: numbers of steps, increasing, the first 0.
        **options: of the method.

    Returns:
        dict[str, float]: by number of steps as text, and ``cg``.
    """
    pruned = halve.prune_weight(weight, stats, "2:4", method, "none", **options).weight
    mask = halve.Pattern("2:4").keep_mask(pruned.abs())
    found = {str(steps[0]): relative_loss(pruned, weight, stats.gram)}
    fitted = pruned
    for before, after in pairwise(steps):
        fitted, _ = refit_gd(fitted, weight, stats.gram, mask, steps=after - before)
        found[str(after)] = relative_loss(fitted, weight, stats.gram)
    exact, _ = refit_cg(pruned, weight, stats.gram, mask)
    return found | {EXACT: relative_loss(exact, weight, stats.gram)}


def on_matrices(given: argparse.Namespace, loaded: LoadedModel, ids: torch.Tensor, numbers: dict[str, Any]) -> None:
    """Measure the losses of one block's matrices into ``numbers["matrices"]``."""
    found = matrices_of_model.matrices_of_model(loaded.model, ids, [given.block], rows=given.rows, device=given.device)
    known = {matrix["kind"] for matrix in numbers["matrices"]}
    for matrix in found:
        if matrix.kind in known:
            continue
        by_method = {
            method: losses_by_steps(matrix.weight, matrix.fitted, method, given.steps, **_options(given, method))
            for method in METHODS
        }
        numbers["matrices"].append({"kind": matrix.kind, "shape": list(matrix.weight.shape), "losses": by_method})
        print(json.dumps(numbers["matrices"][-1]), flush=True)
        results.save(NAME, numbers, None, given.out)


def on_the_model(given: argparse.Namespace, loaded: LoadedModel, ids: torch.Tensor, numbers: dict[str, Any]) -> None:
    """Measure perplexities into ``numbers["rows"]``, the first blocks pruned."""
    cut = {"seq_len": given.seq_len, "max_windows": given.windows, "text_field": "text", "bos": "once"}
    texts = evaluation_texts(loaded, given.data, **cut)
    numbers["data"] = [Path(text.source).name for text in texts]

    def measure(model: torch.nn.Module) -> list[float]:
        return [perplexity(model, text, device=given.device).value for text in texts]

    numbers["dense"] = measure(loaded.model)
    known = {(row["method"], row["steps"]) for row in numbers["rows"]}
    for method, steps in product(given.methods, [*given.perplexity_steps, EXACT]):
        if (method, str(steps)) in known:
            continue
        refit: dict[str, Any] = {EXACT: {"refit": EXACT}, 0: {"refit": "none"}}.get(
            steps, {"refit": "gd", "refit_steps": steps}
        )
        pruned = halve.prune(
            copy.deepcopy(loaded.model),
            method=method,
            calibration=ids,
            skip=dense_from(loaded.model, given.blocks),
            device=given.device,
            **_options(given, method),
            **refit,
        )
        seconds = round(pruned.report.seconds_of_pruning, 1)
        row = {"method": method, "steps": str(steps), "perplexities": measure(pruned.model), "seconds": seconds}
        numbers["rows"].append(row)
        print(json.dumps(row), flush=True)
        results.save(NAME, numbers, None, given.out)


def _options(given: argparse.Namespace, method: str) -> dict[str, Any]:
    return {"beta": given.beta} if method == "prox-gradient" else {}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Run both parts; what an earlier run in the same directory measured in the same way is kept."""
    loaded, ids = matrices_of_model.load(given)
    setting = {
        "model": Path(given.model).name,
        "tokens": ids.numel(),
        "seq_len": given.seq_len,
        "beta": given.beta,
        "block": given.block,
        "rows_of_a_matrix": given.rows,
        "pruned_blocks": given.blocks,
        "windows": given.windows,
        "seed": given.seed,
        "steps": given.steps,
        "calibration_sha256": hash_ids(ids),
        "texts": [sha256_of(Path(text)) if Path(text).exists() else text for text in given.data],
    }
    numbers: dict[str, Any] = {**setting, "data": [], "dense": None, "matrices": [], "rows": []}
    earlier = results.load(NAME, given.out)
    if earlier is not None and {key: earlier.get(key) for key in setting} == setting:
        numbers |= {key: earlier[key] for key in numbers}
    on_matrices(given, loaded, ids, numbers)
    if given.data:
        on_the_model(given, loaded, ids, numbers)
    results.save(NAME, numbers, picture(numbers), given.out)
    return numbers


def _counts(entries: list[str]) -> list[str]:
    """Return the numbers of steps in order, without the exact refit."""
    return sorted({entry for entry in entries if entry != EXACT}, key=int)


def mean_losses(numbers: dict[str, Any], method: str) -> dict[str, float]:
    """Return the mean over the matrices of loss / loss after ``cg`` of a method, by number of steps."""
    ratios = [matrix["losses"][method] for matrix in numbers["matrices"]]
    return {count: sum(found[count] / found[EXACT] for found in ratios) / len(ratios) for count in ratios[0]}


def picture(numbers: dict[str, Any]) -> Figure:
    """Draw loss over that of ``cg`` against the number of steps, and the perplexity of every text."""
    figure, panels = results.axes(1 + len(numbers["data"]), width=4.8)
    for index, method in enumerate(METHODS):
        means = mean_losses(numbers, method)
        counts = _counts(list(means))
        panels[0].plot(counts, [means[count] for count in counts], label=method, **results.style(index))
    panels[0].axhline(1.0, color="black", linestyle=":", label="cg")
    title = f"mean of {len(numbers['matrices'])} matrices, block {numbers['block']}"
    panels[0].set(title=title, ylabel="loss / loss after cg")
    for place, (axis, data) in enumerate(zip(panels[1:], numbers["data"], strict=True)):
        for index, method in enumerate(METHODS):
            found = {row["steps"]: row["perplexities"][place] for row in numbers["rows"] if row["method"] == method}
            counts, style = _counts(list(found)), results.style(index)
            if counts:
                axis.plot(counts, [found[count] for count in counts], label=method, **style)
            if EXACT in found:
                axis.axhline(found[EXACT], color=style["color"], linestyle="--", label=f"{method}, cg")
        axis.axhline(numbers["dense"][place], color="black", linestyle=":", label="dense")
        which = "all blocks" if numbers["pruned_blocks"] is None else f"first {numbers['pruned_blocks']}"
        axis.set(title=f"{data}, {which} pruned", ylabel="perplexity")
    for axis in panels:
        axis.set_xlabel("masked gradient steps")
        axis.legend(fontsize=8, loc="upper right")
    return figure


def markdown(numbers: dict[str, Any]) -> str:
    """Return the table of losses, and that of perplexities beside the paper's."""
    means = {method: mean_losses(numbers, method) for method in METHODS}
    counts = _counts(list(means[METHODS[0]]))
    rows = [[count, *[f"{means[method][count]:.3f}" for method in METHODS]] for count in counts]
    tables = [results.table(["steps", *[f"{method}: loss / loss after cg" for method in METHODS]], rows)]
    if numbers["rows"]:
        cells = {
            (row["method"], row["steps"]): " / ".join(f"{score:.2f}" for score in row["perplexities"])
            for row in numbers["rows"]
        }
        shown = [*counts, EXACT]
        of_paper = {str(count): " / ".join(f"{score:.2f}" for score in scores) for count, scores in PAPER.items()}
        methods = [method for method in METHODS if any(row["method"] == method for row in numbers["rows"])]
        rows = [
            [count, *[cells.get((method, count), "") for method in methods], of_paper.get(count, "")] for count in shown
        ]
        dense = " / ".join(f"{score:.2f}" for score in numbers["dense"])
        rows.append(["dense", dense, *[""] * len(methods)])
        tables.append(results.table(["steps", *methods, "paper: prox, OpenLlama-3B, all blocks"], rows))
    return "\n\n".join(tables)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = results.parser(__doc__ or "")
    matrices_of_model.add_arguments(parser)
    parser.add_argument("--data", action="append", default=[], help="texts for perplexity; none leaves that part out")
    parser.add_argument("--block", type=int, default=15, help="whose matrices' losses are measured")
    parser.add_argument("--blocks", type=int, help="how many blocks are pruned for the perplexities")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--perplexity-steps", nargs="+", type=int)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="for the perplexities")
    parser.add_argument("--beta", type=float, help="growth of prox-gradient's lambda; 1.01 is the paper's")
    given = parser.parse_args(arguments)
    matrices_of_model.complete(given, samples=(32, 128), rows=128)
    given.steps = sorted({0, *given.steps})
    given.blocks = given.blocks or (None if given.full else 1)
    given.perplexity_steps = given.perplexity_steps or list(STEPS if given.full else SMALL_STEPS)
    given.beta = given.beta or (1.01 if given.full else 1.05)
    print(markdown(run(given)))


if __name__ == "__main__":
    main()
