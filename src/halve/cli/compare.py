"""The commands about methods: ``halve compare`` sets them side by side, ``halve methods`` lists them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from halve.cli.errors import EXIT_FAILED, EXIT_FALLBACKS, reporting
from halve.cli.options import JsonOption, ModelArgument, StrictOption, taking
from halve.cli.terminal import comparison_table, out, progress, say_row, warn_of_overlap
from halve.cli.values import allowed_fallback, parse_options_by_method
from halve.comparison import METHODS as COMPARED
from halve.comparison import OF_ONE_METHOD, Comparison
from halve.comparison import compare as compare_methods
from halve.learning.methods import LEARNING_METHODS
from halve.run.request import Request
from halve.solve.methods import METHODS


@taking(Request, without=[*OF_ONE_METHOD, "eval_data"])
def compare(
    model: ModelArgument,
    data: Annotated[list[str], typer.Option(help="Texts for perplexity: wikitext2, c4, or a file. Repeatable.")],
    given: dict[str, Any],
    methods: Annotated[
        str, typer.Option(help="Comma-separated; wanda is as published, wanda+cg adds a refit, +block tunes blocks.")
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
    """Prune with several methods, calibrated on the same tokens, and print one table."""
    with reporting():
        given["fallback"] = allowed_fallback(given.get("fallback"), strict=strict)
        found: Comparison | None = None
        try:
            with progress() as show:
                found = compare_methods(
                    model,
                    data,
                    methods=methods.split(","),
                    out=out_dir,
                    method_options=parse_options_by_method(option or []),
                    listen=lambda contender, step: show(step, "" if contender is None else str(contender)),
                    **given,
                )
                warn_of_overlap(found.calibration, found.evaluation)
                for row in found:
                    say_row(row)
        finally:  # what is finished is worth having, whatever stopped the rest
            if found is not None:
                _show(found, as_json=as_json)
    if any(row.error for row in found.rows):
        raise typer.Exit(EXIT_FAILED)
    if any(row.fallbacks for row in found.rows):
        raise typer.Exit(EXIT_FALLBACKS)


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
