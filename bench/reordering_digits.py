"""What orders of channels that fold into neighbouring weights gain small image classifiers: loss of layers, and top-1.

    python bench/reordering_digits.py WORK
    python bench/reordering_digits.py WORK --models resnet --methods sparsegpt --seeds 0,1,2

The models are those of ``bench/digits.py``, trained under WORK where they are not there yet. Each is pruned with and
without ``permute="fold"``, calibrated on the same pictures. Printed are, for each model and method, the folds of a run,
and the mean over the seeds of the relative loss of the matrices whose inputs are reordered and of the others, with the
spread of what the reordered model has over the other, and top-1 on the pictures held out.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

import halve
from digits import MODELS, train_checkpoint, write_digits
from halve.run.contender import Contender

ORDERS = ("none", "fold")


def pruned_in(model: Path, pictures: tuple[Path, Path], method: str, order: str, seed: int, asked: Any) -> halve.Pruned:
    """Prune a checkpoint, calibrated on training pictures, and measure it on those held out."""
    contender = Contender.parse(method)
    return halve.prune(
        model,
        pattern=asked.pattern,
        method=contender.method,
        refit=contender.refit,
        permute=order,
        batch_norm=asked.batch_norm,
        calibration=pictures[0],
        samples=asked.samples,
        seed=seed,
        image_evaluation=halve.ImageEvaluation(pictures[1]),
    )


def losses(pruned: halve.Pruned, consumers: set[str]) -> tuple[float, float]:
    """Return the mean relative loss of the matrices that read the reordered channels, and of all others."""
    found: tuple[list[float], list[float]] = ([], [])
    for matrix in pruned.report.matrices:
        found[matrix.parameter not in consumers].append(matrix.facts["relative_loss"])
    return statistics.fmean(found[0]), statistics.fmean(found[1])


def told(before: Sequence[float], after: Sequence[float]) -> str:
    """Return a mean before, and what the reordered models have of it, seed by seed."""
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    spread = f"{statistics.fmean(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"
    return f"{statistics.fmean(before):.4f} times {spread}"


def main() -> None:
    """Prune everything twice, and print a row for each model and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--batch-norm", default="estimate")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=40)
    asked = parser.parse_args()
    quiet: Any = transformers.utils.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()

    pictures = write_digits(asked.work / "digits")
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    print("| model | method | folds found, proven, lowered | loss, reordered | loss, others | top-1 by seed |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in asked.models.split(","):
        for seed in seeds:
            if not (asked.work / f"{name}-{seed}" / "preprocessor_config.json").exists():
                train_checkpoint(name, pictures[0], asked.work / f"{name}-{seed}", seed=seed, epochs=asked.epochs)
        for method in asked.methods.split(","):
            lost: dict[str, list[tuple[float, float]]] = {order: [] for order in ORDERS}
            right: dict[str, list[float]] = {order: [] for order in ORDERS}
            folds = set()
            for seed in seeds:
                runs = {o: pruned_in(asked.work / f"{name}-{seed}", pictures, method, o, seed, asked) for o in ORDERS}
                report = runs["fold"].report
                folds.add(f"{report.folds_found}, {report.folds_proven}, {len(report.orders)}")
                consumers = {f"{order.block}.{order.fold.consumer}" for order in report.orders}
                for order, run in runs.items():
                    lost[order].append(losses(run, consumers))
                    if run.top_one_after is None:
                        raise RuntimeError("; ".join(run.notes))
                    right[order].append(100 * run.top_one_after.value)
            mine, others = (told(*([pair[k] for pair in lost[order]] for order in ORDERS)) for k in range(2))
            shown = ["; ".join(f"{value:.2f}" for value in right[order]) for order in ORDERS]
            means = [statistics.fmean(right[order]) for order in ORDERS]
            scores = f"{shown[0]} (mean {means[0]:.2f}), reordered {shown[1]} (mean {means[1]:.2f})"
            print(f"| {name} | {method} | {' / '.join(sorted(folds))} | {mine} | {others} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
