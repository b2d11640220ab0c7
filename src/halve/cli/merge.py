"""The command ``halve merge``."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from halve.cli.errors import reporting
from halve.cli.groups import taking
from halve.cli.terminal import err, out, progress, say
from halve.errors import counted
from halve.merging import EXACT, WITHOUT, Merged, MergeOptions
from halve.merging import merge as merge_adapter
from halve.model.plan import place_of

_HOW = {
    "exact": "exactly",
    "masked": "what falls on zeros left out",
    "refit": "the best kept weights on the calibration data",
}


@taking(MergeOptions, without=WITHOUT)
def merge_command(
    adapter: Annotated[str, typer.Argument(help="Directory of an adapter of peft: LoRA or HiRA.")],
    into: Annotated[str, typer.Option(help="The pruned checkpoint: a directory, or a Hugging Face hub id.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the merged checkpoint; must be new or empty.")],
    given: dict[str, Any],
) -> None:
    """Merge an adapter into a pruned checkpoint, its zeros kept; with calibration text, as well as they allow."""
    with reporting(), progress() as listen:
        merged = merge_adapter(adapter, into, out_dir, listen=listen, **given)
    _finish(merged)


def _finish(merged: Merged) -> None:
    for note in merged.notes:
        say(err, note, label="warning", style="yellow")
    out.print(_by_kind(merged))
    matrices = counted(len(merged.matrices), "matrix", "matrices")
    ways = {each.how for each in merged.matrices}
    say(out, f"{matrices} merged, {merged.pattern} kept: {'; '.join(_HOW[how] for how in _HOW if how in ways)}")
    if any(each.pruned and each.how != EXACT for each in merged.matrices):
        loss = merged.mean_relative_loss
        cost = f"; mean relative loss {loss:.2e}" if math.isfinite(loss) else ""
        say(out, f"on pruned weights fell {merged.mean_off_mask:.1%} of the update{cost}")
    say(out, f"verified and written: {merged.out}")


def _by_kind(merged: Merged) -> Table:
    """Return what it cost, by kind of matrix: a row for all blocks' matrices of one name."""
    numeric = ("matrices", "on zeros", "loss, masked", "loss, fitted")
    table = Table("matrix", *[Column(name, justify="right") for name in numeric])
    kinds = dict.fromkeys(place_of(each.name)[1] for each in merged.matrices)
    for kind in kinds:
        found = [each for each in merged.matrices if place_of(each.name)[1] == kind]
        losses = [_mean([each.facts[fact] for each in found if fact in each.facts]) for fact in _LOSSES]
        off = _mean([each.off_mask for each in found])
        table.add_row(
            Text(kind), str(len(found)), f"{off:.1%}", *["" if math.isnan(loss) else f"{loss:.2e}" for loss in losses]
        )
    return table


_LOSSES = ("relative_loss_before_refit", "relative_loss")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
