"""The command that looks ahead: ``halve plan``."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Column, Table
from rich.text import Text

from halve.cli.errors import reporting
from halve.cli.options import DeviceOption, JsonOption, ThreadsOption, TrustOption
from halve.cli.terminal import err, out, progress_bar, say, warn_if_busy
from halve.cli.values import on_threads
from halve.device import parse_dtype
from halve.errors import InputError

if TYPE_CHECKING:
    from halve.planner.dense_engine import DenseEngine
    from halve.planner.speed_plan import PlanListener, SpeedPlan
    from halve.runtime.quantised_matrix import Values


def plan_command(
    model: Annotated[
        str, typer.Argument(help="A directory, a .gguf file, a hub id; or a preset: llama-8b, llama-70b, paper.")
    ],
    device: DeviceOption = "auto",
    batch: Annotated[
        str | None,
        typer.Option(
            help="Rows of the products, comma-separated: sequences decoded at once, or tokens of a prompt.",
            show_default="1,8,64,2048; of paper its own",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.", show_default="the model's own, bfloat16 for presets"),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="N:M keeps N of every M weights; S% zeroes S percent of a row.",
            show_default="what the model was pruned to, else 2:4",
        ),
    ] = None,
    values: Annotated[
        str, typer.Option(help="What sparse weights hold: own (the dtype's numbers), bf16, int8 or int4.")
    ] = "own",
    against: Annotated[
        str | None, typer.Option(help="A dense engine to decode beside, on the CPU: llama.cpp (package xllamacpp).")
    ] = None,
    threads: ThreadsOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure, before pruning, where sparsity makes a model faster on this machine; it needs no weights."""
    with reporting():
        from halve.planner.speed_plan import plan

        batches = None if batch is None else _parse_batches(batch)
        parsed = None if dtype is None else parse_dtype(dtype)
        engine = None if against is None else _engine(against)
        with on_threads(threads), _progress() as listen:
            found = plan(
                model,
                batches=batches,
                pattern=pattern,
                device=device,
                dtype=parsed,
                values=cast("Values", values),
                against=engine,
                trust_remote_code=trust_remote_code,
                listen=listen,
            )
    warn_if_busy(found.machine["load"], found.machine["cpus"])
    if as_json:
        out.print_json(json.dumps(found.as_json()))
    else:
        _show(found)


def _engine(name: str) -> "DenseEngine":
    from halve.engines.llama_cpp import LlamaCpp
    from halve.lookup import find_row

    return find_row({LlamaCpp.name: LlamaCpp}, name, "engine for --against")()


def _parse_batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise InputError(
            f"--batch {text!r} is not understood: write whole numbers of at least 1, separated by commas, such as "
            "1,8,64,2048"
        )
    return [int(part) for part in parts]


@contextmanager
def _progress() -> Iterator["PlanListener"]:
    """Show a bar on a terminal, and a line a measurement elsewhere."""
    if not err.is_terminal:
        yield lambda what, done, total: say(err, f"measuring {what} ({done + 1}/{total})")
        return
    with progress_bar(err) as bar:
        task = bar.add_task("reading", total=None, last="")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"measuring {what}", completed=done, total=total)

        yield show


def _show(found: "SpeedPlan") -> None:
    machine = found.machine
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    where = machine["gpu"] or f"{machine['cpu'] or 'CPU'}, {threads}"
    dtype = str(found.dtype).removeprefix("torch.")
    held = dtype if found.values == "own" else f"{dtype} and {found.values}"
    say(out, f"{found.model} at {found.pattern} in {held}, on {where}; sparse products: {machine['sparse_products']}")
    out.print(_matrix_table(found))
    for entry in found.left_dense:
        shape = " x ".join(map(str, entry.shape))
        say(out, f"{entry.count} x {entry.name} ({shape}): {entry.reason}", label="dense")
    for row in found.left_out:
        say(
            out,
            f"{row.d_out} x {row.d_in} at batch {row.batch} needs {row.needed_bytes / 1e9:.1f} GB of memory, and "
            f"{row.free_bytes / 1e9:.1f} GB are free",
            label="not measured",
        )
    if (table := _end_to_end_table(found)) is not None:
        out.print(table)
    if found.against:
        out.print(_decoding_table(found))
    say(out, found.sentence)


def _matrix_table(found: "SpeedPlan") -> Table:
    """Return a row a kind of matrix: how many times as fast its product is, and what it weighs."""
    numbers = [f"batch {batch}" for batch in found.batches]
    table = Table(
        Column("matrices", overflow="fold"),
        *[Column(name, justify="right", no_wrap=True) for name in ("count", "shape", *numbers)],
        *[Column(name, justify="right") for name in ("dense MB", "packed MB", "saved MB")],
        title=Text("times as fast sparse as dense"),
    )
    for kind in found.kinds:
        speeds = [found.speed(kind, batch) for batch in found.batches]
        table.add_row(
            Text(kind.name),
            str(kind.count),
            f"{kind.d_out} x {kind.d_in}",
            *["" if speed is None else f"{speed.ratio:.2f}" for speed in speeds],
            *_megabytes(found.dense_bytes(kind), found.packed_bytes(kind)),
        )
    table.add_section()
    dense, packed = (sum(map(count, found.kinds)) for count in (found.dense_bytes, found.packed_bytes))
    table.add_row(
        "all", str(sum(kind.count for kind in found.kinds)), "", *[""] * len(numbers), *_megabytes(dense, packed)
    )
    return table


def _megabytes(dense: int, packed: int) -> list[str]:
    return [f"{count / 1e6:.1f}" for count in (dense, packed, dense - packed)]


def _end_to_end_table(found: "SpeedPlan") -> Table | None:
    """Return a column a batch: where a forward pass spends its time, and how much faster it gets; None if unknown."""
    from halve.planner.rest import Rest
    from halve.planner.speed_plan import Gain

    gains = [gain for gain in map(found.gain, found.batches) if isinstance(gain, Gain)]
    if not gains:
        return None
    rests = [rest for gain in gains if isinstance(rest := found.rests[gain.batch], Rest)]
    table = Table(
        "forward pass", *[Column(f"batch {gain.batch}", justify="right") for gain in gains], title=Text("end to end")
    )
    table.add_row("sequences x tokens", *[f"{rest.sequences} x {rest.length}" for rest in rests])
    table.add_row("blocks measured", *[f"{rest.measured_blocks} of {rest.blocks}" for rest in rests])
    rows = {
        "the rest, ms": [gain.rest_seconds for gain in gains],
        "matrices dense, ms": [gain.dense_seconds for gain in gains],
        "matrices sparse, ms": [gain.sparse_seconds for gain in gains],
        "each the faster, ms": [gain.faster_seconds for gain in gains],
    }
    for name, seconds in rows.items():
        table.add_row(name, *[f"{1e3 * value:.2f}" for value in seconds])
    table.add_section()
    table.add_row("times as fast, all sparse", *[f"{gain.everywhere:.2f}" for gain in gains])
    table.add_row("times as fast, each the faster", *[f"{gain.where_faster:.2f}" for gain in gains])
    return table


def _decoding_table(found: "SpeedPlan") -> Table:
    """Return a row a contender: how fast it decodes, and how many times as fast the packed model is."""
    from halve.planner.dense_engine import speedup

    packed = found.against[0]
    threads = found.machine["threads"]
    table = Table(
        Column("contender", overflow="fold"),
        *[
            Column(name, justify="right")
            for name in ("blocks run", "ms a token", "tokens a second", "packed, times as fast")
        ],
        title=Text(f"decoding one sequence, {threads} thread{'' if threads == 1 else 's'}"),
    )
    for row in found.against:
        run = f"{' and '.join(map(str, row.blocks_run))} of {row.blocks}"
        ratio = speedup(packed, row)
        if row.seconds is None or row.tokens_per_second is None:
            table.add_row(Text(row.contender), run, "", "", "")
            continue
        numbers = f"{1e3 * row.seconds:.2f}", f"{row.tokens_per_second:.1f}"
        table.add_row(Text(row.contender), run, *numbers, "" if ratio is None or row is packed else f"{ratio:.2f}")
    return table
