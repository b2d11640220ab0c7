"""What orders of channels that fold into neighbouring weights gain: loss of the layers, and perplexity, seed by seed.

    python bench/reordering.py MODEL --calibration c4.jsonl --data wikitext2-test.txt c4-validation.jsonl \\
        --results reordering.jsonl

Every way is pruned to 2:4 with and without ``permute="fold"``, on as many draws of calibration text as there are seeds.
A cell that is in the results is not run again, so that a run that was cut goes on. Printed are, for each way, the mean
and the spread over the seeds of what the reordered model has over the other: the relative loss of the kinds of matrices
that are reordered and of the others, the perplexity of each text, and the seconds of pruning.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import halve
from halve.model.plan import place_of

WAYS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt", "refit": "none"},
    "sparsegpt, cg": {"method": "sparsegpt"},
    "auto, fast": {"method": "auto", "effort": "fast"},
    "auto": {"method": "auto"},
}
ORDERS = ("none", "fold")


def cell(model: Path, calibration: Path, texts: Sequence[Path], way: str, order: str, seed: int, asked: Any) -> Any:
    """Prune a model and measure it; returns what is known of that as plain values."""
    pruned = halve.prune(
        model,
        calibration=calibration,
        samples=asked.samples,
        seq_len=asked.seq_len,
        seed=seed,
        permute=order,
        device=asked.device,
        forward_dtype=asked.forward_dtype,
        **WAYS[way],
    )
    losses: defaultdict[str, list[float]] = defaultdict(list)
    for matrix in pruned.report.matrices:
        losses[place_of(matrix.name)[1]].append(matrix.facts["relative_loss"])
    kinds = {
        name.rpartition(".")[2] for each in pruned.report.orders for name in [each.fold.consumer[: -len(".weight")]]
    }
    perplexities = {
        text.stem: halve.evaluate(
            pruned.model,
            text,
            tokenizer=asked.tokenizer,
            seq_len=asked.seq_len,
            max_windows=asked.max_windows,
            device=asked.device,
            forward_dtype=asked.forward_dtype,
        ).value
        for text in texts
    }
    return {
        "way": way,
        "order": order,
        "seed": seed,
        "samples": asked.samples,
        "losses": {kind: statistics.fmean(values) for kind, values in losses.items()},
        "reordered": sorted(kinds),
        "orders": len(pruned.report.orders),
        "perplexity": perplexities,
        "seconds": pruned.report.seconds,
    }


def said(rows: Sequence[dict[str, Any]]) -> None:
    """Print what reordered models have over the others."""
    for way in WAYS:
        pairs = []
        for seed in sorted({row["seed"] for row in rows}):
            found = {row["order"]: row for row in rows if row["way"] == way and row["seed"] == seed}
            if len(found) == len(ORDERS):
                pairs.append((found["none"], found["fold"]))
        if not pairs:
            continue
        print(f"{way}, {len(pairs)} seeds")
        for kind in pairs[0][0]["losses"]:
            before = statistics.fmean(none["losses"][kind] for none, _ in pairs)
            told(f"loss of {kind}", [fold["losses"][kind] / none["losses"][kind] for none, fold in pairs], before)
        for text in pairs[0][0]["perplexity"]:
            before = statistics.fmean(none["perplexity"][text] for none, _ in pairs)
            told(f"perplexity of {text}", [f["perplexity"][text] / n["perplexity"][text] for n, f in pairs], before)
        reorder = statistics.fmean(fold["seconds"].get("reorder", 0.0) for _, fold in pairs)
        solve = statistics.fmean(fold["seconds"]["solve"] for _, fold in pairs)
        print(f"  seconds: reorder {reorder:.0f}, solve {solve:.0f}")


def told(what: str, ratios: Sequence[float], before: float) -> None:
    """Print one ratio, reordered over not."""
    spread = f" (from {min(ratios):.4f} to {max(ratios):.4f})" if len(ratios) > 1 else ""
    print(f"  {what}: {before:.5g} times {statistics.fmean(ratios):.4f}{spread}")


def main() -> None:
    """Run the cells that are missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--results", type=Path, default=Path("reordering.jsonl"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--forward-dtype", default="auto")
    parser.add_argument("--cells", type=int, default=None, help="stop after so many new ones")
    asked = parser.parse_args()
    from transformers import AutoTokenizer

    asked.tokenizer = AutoTokenizer.from_pretrained(asked.model)
    rows = [json.loads(line) for line in asked.results.read_text().splitlines()] if asked.results.exists() else []
    done = {(row["way"], row["order"], row["seed"], row["samples"]) for row in rows}
    missing = [
        (seed, way, order)
        for seed in range(asked.seeds)
        for way in asked.ways
        for order in ORDERS
        if (way, order, seed, asked.samples) not in done
    ]
    for seed, way, order in missing[: asked.cells]:
        rows.append(cell(asked.model, asked.calibration, asked.data, way, order, seed, asked))
        with asked.results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    said([row for row in rows if row["samples"] == asked.samples])


if __name__ == "__main__":
    main()
