"""The commands that prune: ``halve prune`` and ``halve resume``."""

import math
import shlex
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from halve.checkpoint.directory import PAGE
from halve.checkpoint.room import check_space
from halve.cli.errors import EXIT_FALLBACKS, reporting
from halve.cli.options import ModelArgument, StrictOption, taking
from halve.cli.report import say_scores, say_top_one
from halve.cli.terminal import err, forecast_table, out, progress, say, summary_table, told_before
from halve.cli.values import allowed_fallback, merge_options, parse_options
from halve.errors import InputError, counted
from halve.maths.pattern import Pattern
from halve.model.plan import place_of
from halve.order.recording import FoldsEntry, said_of_orders
from halve.planner.where_faster import WhereFaster
from halve.pruning import prune_as, with_refit_of
from halve.pruning import resume as resume_run
from halve.run.contender import Contender
from halve.run.request import Request
from halve.run.settings import Settings
from halve.sensitivity.keep_dense import KeepDense
from halve.serial import from_plain
from halve.solve.methods.auto import AutoOptions
from halve.text.limits import is_encoder_decoder
from halve.text.tokens import SELF
from halve.whole_model import Pruned

if TYPE_CHECKING:
    from halve.forecast.foreseen import Foreseen


@taking(AutoOptions, Request)
def prune(
    model: ModelArgument,
    given: dict[str, Any],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Directory for the pruned checkpoint; must be new or empty.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(help="Say what the run would take of memory, disk and time, and stop; no weights are read."),
    ] = False,
    strict: StrictOption = True,
    values: Annotated[
        str | None, typer.Option(help="int4: as --refit int4, for `halve pack --values int4`.", show_default=False)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", help="beta=1.02 of the method, refit_steps=200 of the refit. Repeatable."),
    ] = None,
) -> None:
    """Prune a model to N:M sparsity and write an ordinary Hugging Face checkpoint."""
    with reporting(out_dir):
        of_auto = {name: given.pop(name) for name in ("effort", "time_limit") if name in given}
        given = with_refit_of(values, given)
        options = merge_options(parse_options(option or []), **of_auto)
        contender = Contender(given.get("method", Settings.method), given.get("refit", Settings.refit))
        contender.check_option_names(options)
        given["fallback"] = allowed_fallback(given.get("fallback"), strict=strict)
        request = Request.of({**given, **options})
        if out_dir is None and not dry_run:
            raise InputError("--out is missing: name a directory for the pruned checkpoint")
        if dry_run or out_dir is None:
            _foresee(model, out_dir, request)
            return
        with progress() as listen:
            pruned = prune_as(model, out_dir, request, listen=listen, foreseeing=partial(_show_needs, err))
    _finish(pruned, out_dir, given.get("text_field"))


def _foresee(model: str, out_dir: Path | None, request: Request) -> None:
    """Print what a run would take, and say so if it cannot fit."""
    from halve.forecast.foreseen import foresee

    request.check()
    foreseen = foresee(model, out_dir or Path("pruned"), request)
    _show_needs(out, foreseen)
    foreseen.check()
    if out_dir is not None:
        check_space(out_dir, sum(foreseen.needs.disk.values()))


def _show_needs(console: Console, foreseen: "Foreseen") -> None:
    console.print(forecast_table(foreseen))
    for sentence in told_before(foreseen):
        say(console, sentence)


def resume(
    directory: Annotated[Path, typer.Argument(help="The --out of a run that was stopped.")],
    fallback: Annotated[
        str | None,
        typer.Option(help="magnitude or wanda, where the asked method fails, if the run had none."),
    ] = None,
    no_strict: Annotated[bool, typer.Option("--no-strict", help="As --fallback magnitude.")] = False,
    workers: Annotated[
        str | None,
        typer.Option(
            help="Who works from here on, as for halve prune; none: this process alone. As it was, if not given."
        ),
    ] = None,
    worker_threads: Annotated[int | None, typer.Option(help="CPU threads of each of these workers.")] = None,
) -> None:
    """Continue a run that was stopped, from its first unfinished block, to the same bytes."""
    from halve.cli.learning import resumed

    given = {"fallback": fallback, "no_strict": no_strict, "workers": workers, "worker_threads": worker_threads}
    with reporting(directory):
        if resumed(directory, refused=[name for name, value in given.items() if value]):
            return
    with reporting(directory), progress() as listen:
        fallback = allowed_fallback(fallback, strict=not no_strict)
        pruned = resume_run(directory, fallback=fallback, workers=workers, worker_threads=worker_threads, listen=listen)
    _finish(pruned, directory)


def left_dense(record: dict[str, Any]) -> list[str]:
    """Return a sentence for every kind of matrix that a run (``halve.json``) left dense for its speed or its cost."""
    faster, costliest = record["only_where_faster"], record["keep_dense"]
    why: dict[str, str] = {}
    if faster is not None:
        why |= {reason: reason for reason in from_plain(WhereFaster, faster).reasons(Pattern(record["pattern"]))}
    if costliest is not None:
        reason = from_plain(KeepDense, costliest).reason
        why[reason] = reason.removeprefix("kept dense: it ")
    counts = Counter(
        (place_of(entry["name"])[1], why[entry["reason"]]) for entry in record["excluded"] if entry["reason"] in why
    )
    return [f"{count} x {kind}: {reason}" for (kind, reason), count in counts.items()]


def command_to_go_on(pruned: Pruned, out: Path, text_field: str | None = None) -> str:
    """Return the command that trains what was pruned, on the text of its calibration.

    Args:
        pruned: what a run left.
        out: its directory.
        text_field: that the calibration text was said to be in.

    Returns:
        str: ``halve finetune …``; empty for a model that is no causal language model.
    """
    model: Any = pruned.model
    if is_encoder_decoder(model) or not model.can_generate():
        return ""
    calibration = pruned.record["calibration"]
    source = calibration["source"] if "sha256" in calibration else SELF  # a method that needs none had no text
    field = [] if text_field is None or source == SELF else ["--text-field", text_field]
    place = str(out).rstrip("/")
    return shlex.join(["halve", "finetune", place, "--out", f"{place}-finetuned", "--data", source, *field])


def _finish(pruned: Pruned, out_dir: Path, text_field: str | None = None) -> None:
    """Print what a finished run did, and leave with the code that says whether all of it was as asked."""
    report = pruned.report
    for warning in report.warnings:
        say(err, warning, label="warning", style="yellow")
    record = pruned.record
    loss = report.mean_relative_loss
    having = sum("relative_loss" in matrix.facts for matrix in report.matrices)
    which = "" if having == len(report.matrices) else f" of the {having} that have one"
    measured = f": mean relative loss {loss:.4f}{which}" if math.isfinite(loss) else ""
    matrices = counted(len(report.matrices), "matrix", "matrices")
    say(out, f"{matrices} at {record['pattern']} by {record['method']}, refit {record['refit']}{measured}")
    folds = FoldsEntry(found=report.folds_found, proven=report.folds_proven, lowered=len(report.orders))
    if reordered := said_of_orders(len(report.orders), folds=folds):
        say(out, f"{reordered}.")
    out.print(summary_table(report))
    for sentence in left_dense(record):
        say(out, sentence, label="left dense")
    say(out, ", ".join(f"{phase} {value:.0f} s" for phase, value in report.seconds.items()))
    if report.reconstructions:
        gained = [block.tuned for block in report.reconstructions if block.tuned.epoch]
        which = "held-out" if report.reconstructions[0].tuned.held_out else "training"
        ratio = math.prod(tuned.after / max(tuned.before, 1e-30) for tuned in gained) ** (1 / max(1, len(gained)))
        count = f"{len(gained)} of {len(report.reconstructions)} blocks gained by reconstruction"
        say(out, f"{count}: {which} error times {ratio:.3f}" if gained else count)
    say_scores(pruned.before, pruned.after)
    say_top_one(pruned.top_one_before, pruned.top_one_after)
    for note in pruned.notes:
        say(err, note, label="warning", style="yellow")
    say(out, f"verified and written: {out_dir}")
    if pruned.out is not None and (pruned.out / PAGE).exists():
        say(out, f"report: {pruned.out / PAGE}")
    if command := command_to_go_on(pruned, out_dir, text_field):
        say(out, command, label="train what is left")
    if report.fallbacks:
        raise typer.Exit(EXIT_FALLBACKS)
