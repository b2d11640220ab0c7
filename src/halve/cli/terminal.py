"""What the command line prints: sentences, tables, a live bar, and plain lines where there is no terminal."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from halve.errors import counted
from halve.run.phases import Phase

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar

    from halve.forecast.foreseen import Foreseen
    from halve.model.plan import Plan
    from halve.run.events import MatrixReport, Progress, RunReport

_FEW = 3
"""Parameters that are named in a line rather than counted only."""

_SHOWN = 1_000_000
"""Bytes from which a part of what a run takes has a row of its own."""
_SHORT = 0.5
"""Seconds up to which a phase has none."""
_LONG = 30.0
"""Seconds from which it is said how long the text that the model writes still takes, and how to avoid it."""
_BUSY = 0.5
"""Load a processor before times are doubtful."""
_PIPE_WIDTH = 300
"""Columns where there is no terminal: nothing that a table says is to be cut there."""

out = Console() if Console().is_terminal else Console(width=_PIPE_WIDTH)
err = Console(stderr=True)


def summary_table(report: "RunReport") -> Table:
    """Return what became of every kind of matrix (`halve.run.events.RunReport`): how many, their losses, the worst."""
    from halve.model.plan import part_of, places_of

    numbers = ("count", "mean loss", "worst loss", "worst in", "fell back")
    table = Table(
        Column("matrices", overflow="fold"), *[Column(name, justify="right", no_wrap=True) for name in numbers]
    )
    kinds: dict[str, list[MatrixReport]] = {}
    names = [matrix.name for matrix in report.matrices]
    places = places_of(names)
    for matrix in report.matrices:
        kinds.setdefault(places[matrix.name][1], []).append(matrix)
    several = len(set(map(part_of, names))) > 1
    for kind, found in kinds.items():
        losses = [
            (m.facts["relative_loss"], _block_of(m.name, part_of(m.name) if several else ""))
            for m in found
            if "relative_loss" in m.facts
        ]
        fallen = sum(matrix.status == "fell_back" for matrix in found)
        cells = ["", "", ""]
        if losses:
            worst, block = max(losses, key=lambda pair: pair[0])
            mean = sum(loss for loss, _ in losses) / len(losses)
            cells = [f"{mean:.4f}", f"{worst:.4f}", block]
        table.add_row(Text(kind), str(len(found)), *cells, Text(str(fallen), style="bold red") if fallen else "")
    return table


def _block_of(name: str, part: str) -> str:
    """Return the name of a matrix's block, such as ``layers.0``: what counts from 0 is never shown as a bare number.

    The part of the model that it stands in comes first, if there is any to tell: ``decoder.layers.0``.
    """
    found = re.match(r"(?:.*?\.)??(\w+\.\d+)\.", name)
    return f"{part}.{found[1]}".lstrip(".") if found else ""


def say(console: Console, sentence: str, *, label: str = "", style: str = "") -> None:
    """Print a sentence as it is: no markup is read in it, and only a terminal breaks it, between words."""
    text = Text.assemble((f"{label}: ", style), sentence) if label else Text(sentence)
    console.print(text, highlight=False, soft_wrap=not console.is_terminal)


def announce(phase: Phase) -> None:
    """Say what is about to take a while outside the blocks."""
    sentences = {
        Phase.GENERATE: "the model writes its calibration text …",
        Phase.EVALUATE: "measuring perplexity or accuracy …",
        Phase.MEASURE: "measuring which matrices are faster sparse …",
        Phase.DAMAGE: "measuring which matrices cost most …",
    }
    if phase == Phase.MEASURE and hasattr(os, "getloadavg"):
        warn_if_busy(os.getloadavg()[0], os.cpu_count())
    say(err, sentences[phase])


def _announce_step(step: "Progress", runner: str) -> None:
    """Say what is about to take long or to beware of, or how long the text that the model writes still takes."""
    if step.caution:
        say(err, step.caution, label=f"{_prefix(runner)}warning", style="yellow")
        return
    if step.seconds_left is None:
        announce(step.phase)
        return
    if step.finished < step.matrices and step.seconds_left >= _LONG:
        how_long = counted(max(1, round(step.seconds_left / 60)), "minute")
        hint = "; --calibration FILE, fewer --samples or a shorter --seq-len avoid that"
        say(err, f"{step.finished} of {step.matrices} tokens are written, the rest takes {how_long} or more{hint}")


def warn_if_busy(load: float | None, processors: int | None) -> None:
    """Warn where the load of the last minute makes times doubtful that are going to be measured, or were."""
    if load is not None and load > _BUSY * (processors or 1):
        say(
            err,
            f"the load is {load:.2f} on {counted(processors or 1, 'processor')}: while other programs run, times are "
            "doubtful",
            label="warning",
            style="yellow",
        )


def warn_if_crowded(threads: int, processors: int | None) -> None:
    """Warn where more threads are asked for than there are processors for them."""
    if processors is not None and threads > processors:
        say(
            err,
            f"{counted(threads, 'thread')} on {counted(processors, 'processor')} wait for one another, and are slower "
            "than one on each",
            label="warning",
            style="yellow",
        )


def warn_of_overlap(calibrated_on: str, evaluated_on: Sequence[str], *, figures: str = "perplexities") -> None:
    """Warn where a model is measured on what it was calibrated on (`halve.evaluation.request.overlap`)."""
    from halve.evaluation.request import overlap

    if caution := overlap(calibrated_on, evaluated_on, figures=figures):
        say(err, caution, label="warning", style="yellow")


class Show(Protocol):
    """A display of progress, as `progress` yields it."""

    def __call__(self, step: "Progress", runner: str = "") -> None:
        """Display one `halve.run.events.Progress`; ``runner`` names what is running where there are several."""


@contextmanager
def progress() -> Iterator[Show]:
    """Show a live bar on a terminal, one plain line a matrix elsewhere; say so if the slow prox is in use."""
    from halve.maths import kernels

    for reason in kernels.missing():
        say(err, reason, label="note", style="yellow")
    if not err.is_terminal:
        yield _plain_progress
        return
    with progress_bar(err) as bar:
        task = bar.add_task("reading", total=None, last="")

        def show(step: "Progress", runner: str = "") -> None:
            if not step.blocks:
                if step.seconds_left is not None:
                    bar.update(task, description="writing text", completed=step.finished, total=step.matrices)
                _announce_step(step, runner)
                return
            if step.plan is not None:
                say(bar.console, _prefix(runner) + _plan(step.plan))
            if step.caution:
                say(bar.console, step.caution, label=f"{_prefix(runner)}warning", style="yellow")
            if step.note:
                say(bar.console, _prefix(runner) + step.note)
            description = f"{_prefix(runner)}block {min(step.block + 1, step.blocks)}/{step.blocks} {step.phase}"
            bar.update(task, description=description, completed=step.finished, total=step.matrices)
            if step.matrix is not None:
                short = re.sub(r"^.*?\.\d+\.", "", step.matrix.name)
                bar.update(task, last=f"{short} {_loss(step.matrix)}")

        yield show


@contextmanager
def counting(what: str, *, slow: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show how many matrices are finished: a live bar on a terminal; elsewhere, of what is slow, a line for each tenth.

    Args:
        what: is done to them, such as ``packing``.
        slow: whether it takes long enough.
    """
    if not err.is_terminal:

        def say_tenths(done: int, total: int, _name: str) -> None:
            if slow and done * 10 // total > (done - 1) * 10 // total:
                say(err, f"{what}: {done} of {counted(total, 'matrix', 'matrices')}")

        yield say_tenths
        return
    bar = progress_bar(err)
    task = bar.add_task(what, total=None, last="")

    def show(done: int, total: int, name: str) -> None:
        bar.start()  # not before: what goes before may be a measurement of time
        bar.update(task, completed=done, total=total, last=name)

    try:
        yield show
    finally:
        bar.stop()


def progress_bar(console: Console) -> "ProgressBar":
    """Return the bar of a run: what runs, the count and the remaining time keep their width; the last matrix yields."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    ]
    roomy = console.width >= 120
    if roomy:
        narrowing = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns.append(TextColumn("{task.fields[last]}", markup=False, table_column=narrowing))
    return Progress(*columns, console=console, transient=True, expand=roomy)


def _plain_progress(step: "Progress", runner: str = "") -> None:
    prefix = _prefix(runner)
    if not step.blocks:
        _announce_step(step, runner)
        return
    if step.plan is not None:
        sys.stderr.write(f"{prefix}{_plan(step.plan)}\n")
    if step.caution:
        say(err, step.caution, label=f"{prefix}warning", style="yellow")
    if step.note:
        say(err, prefix + step.note)
    if step.phase == Phase.SOLVE and step.matrix is not None:
        sys.stderr.write(f"{prefix}block {step.block + 1}/{step.blocks} {step.matrix.name} {_loss(step.matrix)}\n")
        sys.stderr.flush()


def _prefix(runner: str) -> str:
    return f"{runner}: " if runner else ""


def _plan(plan: "Plan") -> str:
    """Say what share of a model will be pruned, and why the rest stays dense (halve.json names each parameter)."""
    reasons: dict[str, list[str]] = {}
    for entry in plan.excluded:
        reasons.setdefault(entry.reason, []).append(entry.name)
    dense = "; ".join(_dense(reason, names) for reason, names in reasons.items()) or "none"
    matrices, blocks = counted(len(plan.matrices), "matrix", "matrices"), counted(len(plan.blocks), "block")
    share = plan.weights / (plan.weights + plan.dense_weights)
    return f"plan: {share:.0%} of the model's weights are pruned, {matrices} in {blocks}; left dense: {dense}"


def _dense(reason: str, names: list[str]) -> str:
    """Say how many parameters stay dense for a reason, and which, if they are few."""
    named = f" ({', '.join(names)})" if len(names) <= _FEW else ""
    return f"{len(names)} × {reason}{named}"  # noqa: RUF001 - a times sign


def _loss(matrix: "MatrixReport") -> str:
    if matrix.status == "fell_back":
        return f"fell back to {matrix.method}"
    loss = matrix.facts.get("relative_loss")
    return "" if loss is None else f"relative loss {loss:.4f}"


def forecast_table(foreseen: "Foreseen") -> Table:
    """Return what a run takes of memory, disk and time, with the sum of each."""
    table = Table("what the run takes", Column("about", justify="right"))
    needs = foreseen.needs
    device = foreseen.plan.device
    for title, parts in (("memory", needs.memory), (f"memory on {device}", needs.on_device), ("disk", needs.disk)):
        if parts:
            _add(table, title, parts)
    rows = [(phase, said_time(seconds)) for phase, seconds in foreseen.seconds.items() if seconds >= _SHORT]
    for phase, said in rows:
        table.add_row(phase, said)
    if foreseen.seconds:
        table.add_row("time", said_time(sum(foreseen.seconds.values())), style="bold")
    return table


def _add(table: Table, title: str, parts: Mapping[str, int]) -> None:
    for what, size in parts.items():
        if size >= _SHOWN:
            table.add_row(what, said_size(size))
    table.add_row(title, said_size(sum(parts.values())), style="bold", end_section=True)


def said_size(size: int) -> str:
    """Return a size with a unit: ``3.1 MB``, ``14.2 GB``."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"


def said_time(seconds: float) -> str:
    """Return a time in the largest units that tell it: ``12 s``, ``3 minutes``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return counted(minutes, "minute") if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def told_before(foreseen: "Foreseen") -> Iterator[str]:
    """Yield the sentences that go with the table."""
    plan, blocks = foreseen.plan, foreseen.shapes.blocks
    count = sum(each.experts * len(each.rows) for block in blocks for each in block.bundles)
    yield f"about {counted(count, 'matrix', 'matrices')} in {counted(len(blocks), 'block')} would be pruned"
    yield from foreseen.notes
    if plan.streamed:
        yield "the weights stay on disk, and are read block by block"
    if plan.offloaded:
        yield "the hidden states of the calibration set go to disk"
