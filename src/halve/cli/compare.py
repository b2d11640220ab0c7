"""The commands about methods: ``halve compare`` sets them side by side, ``halve methods`` lists them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from halve.cli.errors import EXIT_FAILED, EXIT_FALLBACKS, reporting
from halve.cli.options import JsonOption, ModelArgument, StrictOption, taking
from halve.cli.terminal import err, out, progress, say, warn_of_overlap
from halve.cli.values import allowed_fallback, parse_options_by_method
from halve.comparison import METHODS as COMPARED
from halve.comparison import Comparison, Row
from halve.comparison import compare as compare_methods
from halve.errors import InputError, counted
from halve.evaluation.figure import measured_as, said_difference
from halve.learning.methods import LEARNING_METHODS
from halve.run.contender import OF_ONE_METHOD
from halve.run.request import Request
from halve.solve.methods import METHODS
from halve.versions import named_versions


@taking(Request, without=[*OF_ONE_METHOD, "eval_data"])
def compare(
    model: ModelArgument,
    given: dict[str, Any],
    data: Annotated[
        list[str] | None, typer.Option(help="Texts for perplexity: wikitext2, c4, or a file. Repeatable.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated; wanda is as published, wanda+cg adds a refit, +block tunes blocks, "
            "+keep-dense=10% leaves dense what costs most."
        ),
    ] = ",".join(COMPARED),
    strict: StrictOption = True,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--option",
            help="METHOD.NAME=VALUE, REFIT.NAME=VALUE or block.NAME=VALUE, such as auto.effort=best. Repeatable.",
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Also write each pruned checkpoint, to OUT/METHOD; must be new or empty."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prune with several methods, calibrated on the same data, and print one table of perplexities or accuracies."""
    with reporting():
        if not data and "eval_images" not in given:
            raise InputError("there is nothing to measure on: give --data for perplexity, or --eval-images for top-1")
        given["fallback"] = allowed_fallback(given.get("fallback"), strict=strict)
        found: Comparison | None = None
        try:
            with progress() as show:
                found = compare_methods(
                    model,
                    data or [],
                    methods=methods.split(","),
                    out=out_dir,
                    method_options=parse_options_by_method(option or []),
                    listen=lambda contender, step: show(step, "" if contender is None else str(contender)),
                    **given,
                )
                warn_of_overlap(found.calibration.source, [text.source for text in found.evaluation])
                if found.pictures is not None:
                    warn_of_overlap(found.calibration.source, [found.pictures.source], figures="accuracies")
                for row in found:
                    say_row(row)
        finally:  # what is finished is worth having, whatever stopped the rest
            if found is not None:
                _show(found, as_json=as_json)
    if any(row.error for row in found.rows):
        raise typer.Exit(EXIT_FAILED)
    if any(row.fallbacks for row in found.rows):
        raise typer.Exit(EXIT_FALLBACKS)


def comparison_table(rows: Sequence[Row], pattern: str) -> Table:
    """Return the table of a comparison: a column for each text, one for pictures, then loss and seconds."""
    first, seen = rows[0].perplexities, rows[0].top_one
    columns = [f"perplexity {Path(score.source).name}" for score in first]
    how = [f"{Path(p.source).name}: {measured_as(p.windows, p.seq_len, p.bos, p.dtype, p.scored)}" for p in first]
    by = [named_versions(score.versions) for score in first[:1]]
    meant, better = [], "lower is better"
    if first:
        meant.append("in brackets the logarithm's difference to the first row, ± its standard error over the windows")
    if seen is not None:
        name = Path(seen.source).name
        columns.append(f"top-1 {name}")
        how.append(f"{name}: {counted(seen.pictures, 'picture')}, {seen.dtype}, {seen.processor}, 95 % interval")
        meant.append("in brackets the difference to the first row's top-1, ± its standard error over the pictures")
        by = by or [named_versions(seen.versions)]
        better += ", and top-1 the higher the better"
    caption = [*how, *by, *meant, "seconds of pruning alone", "a loss is against the method's own targets"]
    table = Table(
        "method",
        *[Column(Text(name)) for name in columns],
        "mean relative loss",
        "seconds",
        title=Text(f"{pattern}, {better}"),
        caption=Text("; ".join(caption)),
    )
    for row in rows:
        loss = "" if row.mean_relative_loss is None else f"{row.mean_relative_loss:.4f}"
        name = row.name if not row.fallbacks else f"{row.name} ({row.fallbacks} fallbacks)"
        scores = ["failed"] * len(columns) if row.error else _scores(row, rows[0])
        table.add_row(name, *scores, loss, f"{row.seconds:.0f}")
    return table


def _scores(row: Row, first: Row) -> list[str]:
    """Return the figures of a row, with what they differ in from the first row's."""
    told = []
    for score, dense in zip(row.perplexities, first.perplexities, strict=True):
        apart = "" if row is first else f" ({said_difference(*score.minus(dense))})"
        told.append(f"{score.value:.2f}{apart}")
    if row.top_one is not None:
        low, high = row.top_one.interval
        change = None if row is first or first.top_one is None else row.top_one.minus(first.top_one)
        apart = "" if change is None else f" ({change})"
        told.append(f"{100 * row.top_one.value:.2f} %, {100 * low:.2f} to {100 * high:.2f}{apart}")
    return told


def say_row(row: Row) -> None:
    """Print what became of one contender, as soon as it is known."""
    for warning in row.warnings:
        say(err, warning, label=f"warning ({row.name})", style="yellow")
    if row.error:
        say(err, row.error, label=f"error ({row.name})", style="red")
        return
    scores = [f"{Path(p.source).name} {p.value:.2f}" for p in row.perplexities]  # how: in the table's caption
    if row.top_one is not None:
        scores.append(f"{Path(row.top_one.source).name} top-1 {100 * row.top_one.value:.2f} %")
    say(err, f"{row.name}: {', '.join(scores)} ({row.seconds:.0f} s of pruning)")


def _show(found: Comparison, *, as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps(found.as_json()))
    elif found.rows:
        out.print(comparison_table(found.rows, found.pattern))


def methods() -> None:
    """List the methods: local ones, and those that learn masks end to end."""
    table = Table("method", "patterns", "statistics", "summary", "reference")
    for entry in METHODS.values():
        patterns = "N:M, S%" if entry.unstructured else "N:M"
        table.add_row(entry.name, patterns, "yes" if entry.needs_statistics else "no", entry.summary, entry.reference)
    out.print(table)
    learned = Table("learned (halve learn)", "patterns", "trains", "summary", "reference")
    for row in LEARNING_METHODS.values():
        learned.add_row(row.name, row.patterns, row.trains, row.summary, row.reference)
    out.print(learned)
