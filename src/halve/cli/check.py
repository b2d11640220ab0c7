"""The command that judges: ``halve check``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from halve.cli.errors import EXIT_FAILED, reporting
from halve.cli.options import JsonOption
from halve.cli.terminal import out, say
from halve.errors import counted
from halve.verification import check as check_checkpoint


def check(
    directory: Annotated[Path, typer.Argument(help="A checkpoint.")],
    against: Annotated[str | None, typer.Option(help="The model it was pruned from.")] = None,
    pattern: Annotated[str | None, typer.Option(help="For a checkpoint that has no halve.json.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Accept Python code beside the model; none of it is run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Re-read the bytes on disk: the pattern holds, all values are finite, nothing is missing or touched."""
    with reporting():
        result = check_checkpoint(directory, against=against, pattern=pattern, trust_remote_code=trust_remote_code)
    if as_json:
        out.print_json(json.dumps(asdict(result)))
    else:
        for note in result.notes:
            say(out, note, label="note")
        for problem in result.problems:
            say(out, problem, label="problem", style="red")
        matrices = counted(result.matrices, "matrix", "matrices")
        zeros = f", {result.sparsity:.1%} zeros in them" if result.sparsity else ""
        what = f"{matrices} at {result.pattern}{zeros}; "
        looked_at = f": {what}{counted(result.tensors, 'tensor')} in all" if result.tensors else ""
        compared = "" if against is None else f", {result.compared} of them the same as in {against}"
        if result.ok or looked_at:
            say(out, f"{'ok' if result.ok else 'read'}{looked_at}{compared}")
        if not result.ok:
            say(out, f"{directory} {result.verdict}")
    if not result.ok:
        raise typer.Exit(EXIT_FAILED)
