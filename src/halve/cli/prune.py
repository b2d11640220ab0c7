"""The commands that prune: ``halve prune`` and ``halve resume``."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halve.cli.errors import EXIT_FALLBACKS, reporting
from halve.cli.options import (
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    ExpertOption,
    FallbackOption,
    FasterBatchOption,
    FasterOption,
    FieldOption,
    ForwardOption,
    MatchOption,
    ModelArgument,
    OffloadOption,
    PatternOption,
    RevisionOption,
    RidgeOption,
    SamplesOption,
    SeedOption,
    SeqLenOption,
    ShrinkageOption,
    SkipOption,
    StrictOption,
    TrustOption,
)
from halve.cli.report import EvalDataOption, EvalSeqLenOption, EvalWindowsOption, evaluation_of, say_scores
from halve.cli.terminal import err, out, progress, say, summary_table
from halve.cli.values import allowed_fallback, merge_options, parse_dtype, parse_options, parse_shrinkage
from halve.errors import InputError

if TYPE_CHECKING:
    from halve.planner.where_faster import WhereFaster
    from halve.whole_model import Pruned


def prune(
    model: ModelArgument,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the pruned checkpoint; must be new or empty.")],
    pattern: PatternOption = "2:4",
    method: Annotated[str, typer.Option(help="See `halve methods`.")] = "auto",
    effort: Annotated[
        str | None, typer.Option(help="Of method auto: fast, balanced or best.", show_default="balanced")
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(help="Of method auto: seconds for solving. --effort is where it begins; higher ones follow."),
    ] = None,
    refit: Annotated[str, typer.Option(help="Re-adjust the kept weights: none, cg, gd, swap.")] = "cg",
    reconstruct: Annotated[
        str | None,
        typer.Option(
            help="block: then tune each block's survivors against the dense block's output; or none.",
            show_default="block with --effort best, else none",
        ),
    ] = None,
    reconstruct_epochs: Annotated[
        int | None, typer.Option(help="Passes over the calibration set.", show_default="6")
    ] = None,
    reconstruct_lr: Annotated[
        float | None, typer.Option(help="Adam's first learning rate.", show_default="by held-out error")
    ] = None,
    reconstruct_held_out: Annotated[
        float | None, typer.Option(help="Share of the batches that only judge.", show_default="0.125")
    ] = None,
    shrinkage: ShrinkageOption = None,
    match_dense: MatchOption = None,
    match_ridge: RidgeOption = 0.1,
    calibration: CalibrationOption = "self",
    samples: SamplesOption = 128,
    seq_len: SeqLenOption = None,
    seed: SeedOption = 0,
    field: FieldOption = "text",
    skip: SkipOption = None,
    fallback: FallbackOption = None,
    strict: StrictOption = True,
    min_expert_tokens: ExpertOption = 32,
    only_where_faster: FasterOption = None,
    faster_at_batch: FasterBatchOption = None,
    device: DeviceOption = "auto",
    forward_dtype: ForwardOption = "auto",
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    offload: OffloadOption = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep finished blocks in this new directory, not in --out, while the run lasts.")
    ] = None,
    eval_data: EvalDataOption = None,
    eval_seq_len: EvalSeqLenOption = None,
    max_windows: EvalWindowsOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", help="beta=1.02 of the method, refit_steps=200 of the refit. Repeatable."),
    ] = None,
) -> None:
    """Prune a model to N:M sparsity and write an ordinary Hugging Face checkpoint."""
    from halve.comparison import Contender
    from halve.model.reconstruct import parse_reconstruction
    from halve.pruning import prune as prune_model
    from halve.run.settings import default_reconstruction
    from halve.solve.objective import Objective
    from halve.solve.settings import validate_settings

    with reporting(out_dir):
        options = merge_options(parse_options(option or []), effort=effort, time_limit=time_limit)
        Contender(method, refit).check_option_names(options)
        fallback = allowed_fallback(fallback, strict=strict)
        validate_settings(method, refit, pattern, fallback=fallback, **options)
        objective = Objective(parse_shrinkage(shrinkage), match_dense, match_ridge)
        given = {"epochs": reconstruct_epochs, "learning_rate": reconstruct_lr, "held_out": reconstruct_held_out}
        tuning = parse_reconstruction(
            default_reconstruction(method, options) if reconstruct is None else reconstruct,
            **{name: value for name, value in given.items() if value is not None},
        )
        faster = faster_of(only_where_faster, faster_at_batch)
        evaluation = evaluation_of(eval_data, eval_seq_len, max_windows, field, forward_dtype)
        with progress() as listen:
            pruned = prune_model(
                model,
                out_dir,
                pattern=pattern,
                method=method,
                refit=refit,
                calibration=calibration,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                text_field=field,
                skip=skip or (),
                fallback=fallback,
                min_expert_tokens=min_expert_tokens,
                reconstruct="none" if tuning is None else tuning,
                objective=objective,
                only_where_faster=faster,
                device=device,
                forward_dtype=forward_dtype,
                dtype=parse_dtype(dtype),
                revision=revision,
                trust_remote_code=trust_remote_code,
                offload=offload,
                work=work,
                evaluation=evaluation,
                listen=listen,
                **options,
            )
    _finish(pruned, out_dir)


def resume(
    directory: Annotated[Path, typer.Argument(help="The --out of a run that was stopped.")],
    fallback: Annotated[
        str | None,
        typer.Option(help="magnitude or wanda, where the asked method fails, if the run had none."),
    ] = None,
    no_strict: Annotated[bool, typer.Option("--no-strict", help="As --fallback magnitude.")] = False,
) -> None:
    """Continue a run that was stopped, from its first unfinished block, to the same bytes."""
    from halve.pruning import resume as resume_run

    with reporting(directory), progress() as listen:
        pruned = resume_run(directory, fallback=allowed_fallback(fallback, strict=not no_strict), listen=listen)
    _finish(pruned, directory)


def faster_of(factor: float | None, batch: int | None) -> "WhereFaster | None":
    """Return what ``--only-where-faster`` and ``--faster-at-batch`` ask for.

    Raises:
        InputError: a number is out of range, or the second was given alone.
    """
    from halve.planner.where_faster import WhereFaster

    if factor is None:
        if batch is not None:
            raise InputError("--faster-at-batch goes with --only-where-faster, which is not given: give it, or neither")
        return None
    return WhereFaster(factor, 1 if batch is None else batch)


def left_dense(record: dict[str, Any]) -> list[str]:
    """Return a sentence for every kind of matrix that a run (``halve.json``) left dense for its speed."""
    from halve.maths.pattern import Pattern
    from halve.model.layers import place_of
    from halve.planner.where_faster import WhereFaster

    if record["only_where_faster"] is None:
        return []
    reasons = WhereFaster(**record["only_where_faster"]).reasons(Pattern(record["pattern"]))
    counts = Counter(
        (place_of(entry["name"])[1], entry["reason"]) for entry in record["excluded"] if entry["reason"] in reasons
    )
    return [f"{count} x {kind}: {reason}" for (kind, reason), count in counts.items()]


def _finish(pruned: "Pruned", out_dir: Path) -> None:
    """Print what a finished run did, and leave with the code that says whether all of it was as asked."""
    from halve.checkpoint.directory import PAGE

    report = pruned.report
    for warning in report.warnings:
        say(err, warning, label="warning", style="yellow")
    record = pruned.record
    loss = report.mean_relative_loss
    having = sum("relative_loss" in matrix.facts for matrix in report.matrices)
    which = "" if having == len(report.matrices) else f" of the {having} that have one"
    measured = f": mean relative loss {loss:.4f}{which}" if math.isfinite(loss) else ""
    say(
        out,
        f"{len(report.matrices)} matrices at {record['pattern']} by {record['method']}, refit {record['refit']}"
        f"{measured}",
    )
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
    for note in pruned.notes:
        say(err, note, label="warning", style="yellow")
    say(out, f"verified and written: {out_dir}")
    if pruned.out is not None and (pruned.out / PAGE).exists():
        say(out, f"report: {pruned.out / PAGE}")
    if report.fallbacks:
        raise typer.Exit(EXIT_FALLBACKS)
