"""The commands that write a checkpoint in another form: ``halve pack``, ``unpack`` and ``export``."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Column, Table
from rich.text import Text

from halve.cli.errors import reporting
from halve.cli.options import TrustOption, taking
from halve.cli.terminal import counting, out, progress, say
from halve.errors import counted, first_few
from halve.packing import WITHOUT, PackOptions
from halve.packing import pack as pack_as_asked

if TYPE_CHECKING:
    from halve.packed.write import PackResult
    from halve.runtime.quantised_matrix import Values


@taking(PackOptions, without=WITHOUT)
def pack(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned checkpoint.")],
    out_dir: Annotated[Path, typer.Option("--out", help="The packed checkpoint to write; new or empty.")],
    given: dict[str, Any],
    pattern: Annotated[str | None, typer.Option(help="For a checkpoint that has no halve.json.")] = None,
    values: Annotated[
        str, typer.Option(help="What kept weights are stored as: own (as they are), bf16, int8 or int4 (rounded).")
    ] = "own",
    trust_remote_code: TrustOption = False,
) -> None:
    """Pack the pruned matrices of a checkpoint: one bit a weight, and the kept values; `halve unpack` restores it.

    With --values int8 or int4 the kept values are rounded, and what is restored are the rounded ones.
    With --calibration integers of 4 bits are solved for first.
    """
    with reporting(), ExitStack() as stack:
        asked = cast("Values", values)
        solving = stack.enter_context(progress()) if "calibration" in given else None
        listen = stack.enter_context(counting("packing", slow=values == "int4")) if solving is None else None
        given |= {"trust_remote_code": trust_remote_code, "listen": listen, "solving": solving}
        result = pack_as_asked(directory, out_dir, pattern, values=asked, **given)
    out.print(_sizes(result))
    reasons: dict[str, list[str]] = {}
    for name, reason in result.left_dense.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        say(out, f"left dense, {reason}: {first_few(names)}", label="note")
    for note in result.notes:
        say(out, note, label="note")
    if result.left_out:
        say(out, f"not taken along, no files of a model: {', '.join(result.left_out)}", label="note")
    if result.error:
        matrices = counted(len(result.matrices), "matrix", "matrices")
        moved = f"rounding to {values} has moved the kept weights of {len(result.moved)} of {matrices}"
        moved += f" by {result.error:.2%} of the size of all"
        off_grid = values == "int4" and len(result.moved) < len(result.matrices)
        where = f" (no integers before; the first is {result.moved[0]})" if off_grid else ""
        say(out, f"{moved}{where}; what was measured of them before is not taken along", label="note")
    elif values in {"int8", "int4"}:
        say(out, f"the kept weights are integers times scales already: {values} moves none", label="note")
    matrices = counted(len(result.matrices), "matrix", "matrices")
    say(
        out,
        f"packed: {matrices}, {_megabytes(result.bytes_before)} MB of weights "
        f"are now {_megabytes(result.bytes_after)} MB ({result.ratio:.3f}), in {result.out}",
    )


def unpack(
    directory: Annotated[Path, typer.Argument(metavar="PACKED", help="A packed checkpoint.")],
    out_dir: Annotated[Path, typer.Option("--out", help="The plain checkpoint to write; new or empty.")],
    trust_remote_code: TrustOption = False,
) -> None:
    """Restore the plain checkpoint that was packed, byte for byte, or with its rounded weights."""
    from halve.packed.read import unpack_checkpoint

    with reporting():
        sums = unpack_checkpoint(directory, out_dir, trust_remote_code=trust_remote_code)
    files = counted(len(sums), "file")
    say(out, f"restored: {files}, each with the sha256 that the packed checkpoint has on record, in {out_dir}")


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint, pruned or not.")],
    gguf: Annotated[Path, typer.Option(help="The GGUF file to write.")],
    kind: Annotated[str, typer.Option(help="What matrices are stored as: bf16, f16, q8_0 or q4_0.")] = "bf16",
    trust_remote_code: TrustOption = False,
) -> None:
    """Write a checkpoint as a GGUF file, for llama.cpp and what is built on it; zeros stay zeros."""
    from halve.engines.gguf_export import export_gguf

    with reporting():
        result = export_gguf(directory, gguf, kind, trust_remote_code=trust_remote_code)
    for note in result.notes:
        say(out, note, label="note")
    say(out, f"written: {counted(result.tensors, 'tensor')}, {_megabytes(result.nbytes)} MB, in {result.path}")


def _sizes(result: "PackResult") -> Table:
    """Return the table of sizes: packed matrices, everything else, all weight files."""
    table = Table("weights", *[Column(name, justify="right") for name in ("tensors", "MB before", "MB after", "ratio")])
    before, after = result.matrix_bytes_before, result.matrix_bytes_after
    rows = [
        ("packed", str(len(result.matrices)), before, after),
        ("as they were", "", result.bytes_before - before, result.bytes_after - after),
        ("in all", "", result.bytes_before, result.bytes_after),
    ]
    for name, count, old, new in rows:
        table.add_row(Text(name), count, _megabytes(old), _megabytes(new), f"{new / old:.3f}" if old else "")
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
