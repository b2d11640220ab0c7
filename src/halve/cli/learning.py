"""The commands that train, and those that put what was trained onto a model: masks and adapters."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from halve.checkpoint.directory import PAGE
from halve.cli.errors import reporting
from halve.cli.options import ModelArgument, TrustOption, taking
from halve.cli.report import say_scores
from halve.cli.terminal import err, out, progress, progress_bar, say
from halve.cli.values import merge_options, parse_options
from halve.errors import counted
from halve.learned_masks import apply_masks as put_masks
from halve.learned_masks import learn as learn_masks
from halve.learned_masks import resume_learning
from halve.learning.finetuning import finetune as finetune_model
from halve.learning.finetuning import resume_finetuning
from halve.learning.launch import is_first_process
from halve.learning.lesson import Taught
from halve.learning.mask_learning import COMMAND as LEARN
from halve.learning.mask_learning import Learning
from halve.learning.options import Finetuning
from halve.learning.training.needs import Needs, in_bytes
from halve.learning.training.state import recorded_training
from halve.learning.training.trainer import Point
from halve.learning.training.watching import Watch
from halve.merging import EXACT, WITHOUT, Merged, MergeOptions, mean_of
from halve.merging import merge as merge_adapter
from halve.model.plan import place_of
from halve.option_groups import OptionError

_SHOWN = 50_000
"""Bytes from which a row of the table of needs says something."""
_PHASES = {
    "load": "loading the models …",
    "text": "reading the training text …",
    "evaluate": "measuring perplexity …",
    "train": "training …",
    "write": "writing and verifying the checkpoint …",
}


@taking(Finetuning)
def finetune(
    pruned: Annotated[Path, typer.Argument(help="Directory of a checkpoint that halve prune has written.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the trained checkpoint; must be new or empty.")],
    given: dict[str, Any],
) -> None:
    """Train what a pruned checkpoint has kept to say what the dense model says; pruned zeros stay zeros."""
    with reporting(out_dir), _watching() as watch:
        done = finetune_model(pruned, out_dir, watch=watch, **given)
    finish(done)


@taking(Learning)
def learn(
    model: ModelArgument,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the pruned checkpoint; must be new or empty.")],
    given: dict[str, Any],
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="keep=trained of the method. Repeatable.")
    ] = None,
) -> None:
    """Learn N:M masks end to end, weights too where the method trains them, and write an ordinary checkpoint."""
    with reporting(out_dir), _watching() as watch:
        done = learn_masks(model, out_dir, watch=watch, **merge_options(parse_options(option or []), **given))
    finish(done)


def apply_masks(
    model: ModelArgument,
    masks: Annotated[Path, typer.Option(help="The file that halve learn --save-masks has written.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the pruned checkpoint; must be new or empty.")],
    trust_remote_code: TrustOption = False,
) -> None:
    """Put learned masks onto the dense model that they were learned for, and write an ordinary checkpoint."""
    with reporting():
        record = put_masks(model, masks, out_dir, trust_remote_code=trust_remote_code)
    for warning in record["warnings"]:
        say(err, warning, label="warning", style="yellow")
    say(out, f"{counted(len(record['matrices']), 'matrix', 'matrices')} at {record['pattern']} by the masks of {masks}")
    say(out, f"verified and written: {out_dir}")


def resumed(directory: Path, refused: Sequence[str] = ()) -> bool:
    """Go on with the training in a directory, and return whether there was one.

    Args:
        directory: of a training, or of a run that prunes.
        refused: flat names of options that were given and that a training does not have.

    Raises:
        InputError: there is a training, and such an option was given.
    """
    call = recorded_training(directory)
    if call is None:
        return False
    if refused:
        raise OptionError("{} is for a run that prunes, and this directory holds a training: leave it out", refused[0])
    with _watching() as watch:
        resume = resume_learning if call["command"] == LEARN else resume_finetuning
        done = resume(call, directory, watch)
    finish(done)
    return True


def finish(done: Taught) -> None:
    """Print what a finished training came to, in the first of several processes."""
    if not is_first_process():
        return
    trained = done.trained
    for note in done.notes:
        say(err, note, label="note", style="yellow")
    points = [point for point in trained.curve if point.perplexity is not None]
    first, best = points[0], next(point for point in points if point.step == trained.best)
    kl = "" if best.kl is None else f", KL to the teacher {first.kl:.4f} → {best.kl:.4f} nats a token"
    say(
        out,
        f"held-out text: perplexity {first.perplexity:.2f} → {best.perplexity:.2f}{kl} after {best.tokens} tokens "
        f"(step {trained.best} of {trained.steps}, learning rate {trained.learning_rate:g})",
    )
    if done.before:
        learned = done.record["trainings"][-1]["kind"] == LEARN  # perhaps from the dense model
        say(out, f"{'' if learned else 'pruned, '}before and after the training:")
        say_scores(done.before, done.after)
    if done.dense:
        say(out, "dense, and trained:")
        say_scores(done.dense, done.after)
    say(out, f"verified and written: {done.out}")
    if (done.out / PAGE).exists():
        say(out, f"report: {done.out / PAGE}")


class _Lines(Watch):
    """Says what happens, a line each."""

    def phase(self, name: str) -> None:
        say(err, _PHASES[name])

    def writing(self, done: int, wanted: int, seconds: float) -> None:
        say(err, f"the teacher writes its text: {done} of {wanted} tokens, {seconds:.0f} s left")

    def needs(self, needs: Needs) -> None:
        err.print(needs_table(needs))

    def trial(self, rate: float, loss: float) -> None:
        came_to = f"loss {loss:.4f} on held-out text" if math.isfinite(loss) else "diverges"
        say(err, f"learning rate {rate:g} tried: {came_to}")

    def point(self, point: Point) -> None:
        if point.perplexity is not None:
            kl = "" if point.kl is None else f", KL {point.kl:.4f}"
            say(err, f"{point.tokens} tokens: held-out perplexity {point.perplexity:.2f}{kl}")


class _Bar(_Lines):
    """Shows a live bar besides."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("training", total=None, last="")
        self.steps = 0

    def point(self, point: Point) -> None:
        super().point(point)
        if point.loss is not None:
            self._bar.update(self._task, completed=point.step, last=f"loss {point.loss:.4f}")


@contextmanager
def _watching() -> Iterator[Watch]:
    if not is_first_process():
        yield Watch()
        return
    if not err.is_terminal:
        yield _Lines()
        return
    with progress_bar(err) as bar:
        yield _Bar(bar)


def needs_table(needs: Needs) -> Table:
    """Return what a training will take of memory and disk as a table."""
    table = Table("what the training takes", Column("at least", justify="right"))
    for what, size in needs.memory.items():
        if size >= _SHOWN:
            table.add_row(what, in_bytes(size))
    table.add_row(f"memory on {needs.device}", in_bytes(sum(needs.memory.values())), style="bold", end_section=True)
    for what, size in needs.disk.items():
        table.add_row(what, in_bytes(size))
    table.add_row("disk", in_bytes(sum(needs.disk.values())), style="bold")
    return table


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
    _say_merged(merged)


def _say_merged(merged: Merged) -> None:
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
        losses = [mean_of([each.facts[fact] for each in found if fact in each.facts]) for fact in _LOSSES]
        off = mean_of([each.off_mask for each in found])
        table.add_row(
            Text(kind), str(len(found)), f"{off:.1%}", *["" if math.isnan(loss) else f"{loss:.2e}" for loss in losses]
        )
    return table


_LOSSES = ("relative_loss_before_refit", "relative_loss")
