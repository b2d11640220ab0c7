r"""Perplexity by number of calibration sequences: the paper's ablation (its Table 2) on a real model.

    python experiments/calibration_samples.py MODEL --calibration c4-calibration.jsonl \
        --data c4-validation.jsonl --data wikitext2-test.txt

The smaller sets are the first sequences of the largest. What an earlier run in the same directory has measured in the
same way is kept, so that methods and sizes can be added one by one. Small size: the first eight blocks are pruned and
sequences have 256 tokens. ``--full``: all blocks, 1 to 2048 sequences of 2048 tokens.
"""

import argparse
import copy
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import halve
import results
from halve.checkpoint import load as checkpoint
from halve.evaluation.perplexity import evaluation_texts, perplexity
from halve.model.stacks import find_stack
from halve.run.contender import Contender
from halve.text.calibration import Calibration

NAME = "calibration_samples"
METHODS = ("wanda", "wanda+cg", "sparsegpt", "sparsegpt+cg", "prox-gradient+cg", "auto+cg")
SMALL = (1, 8, 32, 128)
FULL = (1, 16, 128, 1024, 2048)


def dense_from(model: torch.nn.Module, blocks: int | None) -> list[str]:
    """Return skip patterns for all blocks but the first ones."""
    name, stack = find_stack(model)
    return [] if blocks is None else [f"{name}.{index}.*" for index in range(blocks, len(stack))]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune and measure what is missing, writing after every method."""
    loaded = checkpoint.load_model(arguments.model)
    most = max(arguments.samples)
    calibration = Calibration(arguments.calibration, most, arguments.seq_len, arguments.seed, bos="once")
    tokens = calibration.text_tokens(loaded)
    texts = evaluation_texts(
        loaded,
        arguments.data,
        seq_len=arguments.seq_len,
        max_windows=arguments.windows,
        text_field="text",
        bos="once",
    )
    setting = {
        "model": Path(arguments.model).name,
        "blocks": arguments.blocks,
        "seq_len": arguments.seq_len,
        "windows": arguments.windows,
        "seed": arguments.seed,
        "beta": arguments.beta,
        "calibration": Path(tokens.source).name,
        "data": [Path(text.source).name for text in texts],
        "tokens_sha256": [tokens.sha256, *(text.sha256 for text in texts)],
    }
    found = results.load(NAME, arguments.out)
    numbers: dict[str, Any] = {**setting, "dense": None, "rows": []}
    if found is not None and {key: found.get(key) for key in setting} == setting:
        numbers |= {"dense": found["dense"], "rows": found["rows"]}

    def measure(model: torch.nn.Module) -> list[float]:
        return [perplexity(model, text, device=arguments.device).value for text in texts]

    numbers["dense"] = numbers["dense"] or measure(loaded.model)
    known = {(row["method"], row["samples"]) for row in numbers["rows"]}
    for method, samples in product(arguments.methods, arguments.samples):
        if (method, samples) in known:
            continue
        contender = Contender.parse(method)
        options = {"beta": arguments.beta} if contender.method == "prox-gradient" else {}
        pruned = halve.prune(
            copy.deepcopy(loaded.model),
            method=contender.method,
            refit=contender.refit,
            calibration=tokens.ids[:samples],
            skip=dense_from(loaded.model, arguments.blocks),
            device=arguments.device,
            **options,
        )
        row = {
            "method": method,
            "samples": samples,
            "perplexities": measure(pruned.model),
            "mean_relative_loss": pruned.report.mean_relative_loss,
            "seconds": round(pruned.report.seconds_of_pruning, 1),
        }
        numbers["rows"].append(row)
        print(json.dumps(row), flush=True)
        results.save(NAME, numbers, picture(numbers), arguments.out)
    return numbers


def picture(numbers: dict[str, Any]) -> Figure:
    """Draw perplexity against the number of sequences, a panel a text."""
    figure, panels = results.axes(len(numbers["data"]))
    methods = list(dict.fromkeys(row["method"] for row in numbers["rows"]))
    for panel, (axis, data) in enumerate(zip(panels, numbers["data"], strict=True)):
        for index, method in enumerate(methods):
            points = sorted(
                (row["samples"], row["perplexities"][panel]) for row in numbers["rows"] if row["method"] == method
            )
            axis.plot(*zip(*points, strict=True), label=method, **results.style(index))
        axis.axhline(numbers["dense"][panel], color="black", linestyle=":", label="dense")
        axis.set(xscale="log", yscale="log", title=data, ylabel="perplexity")
        axis.set_xlabel(f"calibration sequences of {numbers['seq_len']} tokens")
        axis.set_xticks(sorted({row["samples"] for row in numbers["rows"]}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        scores = sorted(row["perplexities"][panel] for row in numbers["rows"])
        top = 2 * scores[len(scores) // 2]
        if scores[-1] > top:  # what a single sequence can do would hide everything else
            axis.set_yscale("linear")
            axis.set_ylim(0.9 * numbers["dense"][panel], top)
            axis.text(
                0.02, 0.97, f"off the top: up to {scores[-1]:.2g}", transform=axis.transAxes, va="top", fontsize=8
            )
    results.legend_below(figure, panels[0])
    return figure


def markdown(numbers: dict[str, Any]) -> str:
    """Return the table of perplexities, texts separated by a stroke."""
    counts = sorted({row["samples"] for row in numbers["rows"]})
    cells = {
        (row["method"], row["samples"]): " / ".join(f"{score:.1f}" for score in row["perplexities"])
        for row in numbers["rows"]
    }
    methods = dict.fromkeys(row["method"] for row in numbers["rows"])
    rows = [[method, *[cells.get((method, count), "") for count in counts]] for method in methods]
    rows.append(["dense", " / ".join(f"{score:.1f}" for score in numbers["dense"]), *[""] * (len(counts) - 1)])
    return results.table(["method", *[str(count) for count in counts]], rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = results.parser(__doc__ or "")
    parser.add_argument("model", help="checkpoint directory, hub id or .gguf file")
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--samples", nargs="+", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--blocks", type=int, help="prune only the first ones")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--beta", type=float, help="growth of prox-gradient's lambda; 1.01 is the paper's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    given.samples = given.samples or (FULL if given.full else SMALL)
    given.seq_len = given.seq_len or (2048 if given.full else 256)
    given.beta = given.beta or (1.01 if given.full else 1.05)
    given.blocks = given.blocks or (None if given.full else 8)
    print(markdown(run(given)))


if __name__ == "__main__":
    main()
