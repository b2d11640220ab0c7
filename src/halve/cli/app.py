"""The ``halve`` command: arguments in, calls out; what is printed, and how, is `halve.cli.terminal`'s."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from halve.cli.errors import EXIT_FAILED, EXIT_FALLBACKS, reporting
from halve.cli.eval import evaluate_command
from halve.cli.generate import generate
from halve.cli.options import (
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    ExpertOption,
    FallbackOption,
    FieldOption,
    ForwardOption,
    JsonOption,
    MatchOption,
    ModelArgument,
    PatternOption,
    RidgeOption,
    SamplesOption,
    SeedOption,
    SeqLenOption,
    ShrinkageOption,
    SkipOption,
    StrictOption,
    TrustOption,
)
from halve.cli.pack import pack, unpack
from halve.cli.plan import plan_command
from halve.cli.prune import prune, resume
from halve.cli.report import report
from halve.cli.terminal import announce, comparison_table, out, progress, say, say_row, warn_of_overlap
from halve.cli.values import allowed_fallback, parse_dtype, parse_options_by_method, parse_shrinkage
from halve.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune trained neural networks to N:M sparsity, and see what it cost.",
    epilog="Exit codes: 0 complete; 1 failed or problems found; 2 refused, nothing done; 3 complete with fallbacks; "
    "4 stopped, and `halve resume DIR` continues; 130 interrupted, nothing kept.",
)


app.command()(prune)
app.command()(resume)
app.command()(report)
app.command(name="plan")(plan_command)
app.command(name="eval")(evaluate_command)
app.command()(pack)
app.command()(unpack)
app.command()(generate)


@app.command()
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
    from dataclasses import asdict

    from halve.checkpoint.directory import PACKED, REPORT, is_unfinished
    from halve.verification import check as check_checkpoint

    with reporting():
        finished = directory.is_dir() and not is_unfinished(directory)
        recorded = any((directory / name).exists() for name in (REPORT, PACKED))
        if pattern is None and finished and not recorded:
            raise InputError(f"{directory} has no {REPORT}: give --pattern")
        result = check_checkpoint(directory, against=against, pattern=pattern, trust_remote_code=trust_remote_code)
    if as_json:
        out.print_json(json.dumps(asdict(result)))
    else:
        for note in result.notes:
            say(out, note, label="note")
        for problem in result.problems:
            say(out, problem, label="problem", style="red")
        count = len(result.problems)
        what = f"{result.matrices} matrices at {result.pattern}, {result.sparsity:.1%} zeros in them; "
        looked_at = f": {what}{result.tensors} tensors in all" if result.tensors else ""
        verdict = "ok" if result.ok else f"{count} problem{'s' if count > 1 else ''}"
        compared = "" if against is None else f", {result.compared} of them the same as in {against}"
        say(out, f"{verdict}{looked_at}{compared}")
    if not result.ok:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def compare(
    model: ModelArgument,
    data: Annotated[list[str], typer.Option(help="Texts for perplexity: wikitext2, c4, or a file. Repeatable.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated; wanda is as published, wanda+cg adds a refit, +block tunes blocks.",
            show_default="magnitude, wanda and sparsegpt, the last two also with +cg; auto+cg",
        ),
    ] = "magnitude,wanda,wanda+cg,sparsegpt,sparsegpt+cg,auto+cg",
    pattern: PatternOption = "2:4",
    calibration: CalibrationOption = "self",
    samples: SamplesOption = 128,
    seq_len: SeqLenOption = None,
    seed: SeedOption = 0,
    field: FieldOption = "text",
    eval_seq_len: Annotated[
        int | None, typer.Option(help="Window length of the evaluation.", show_default="as --seq-len")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Only the first windows of each text.")] = None,
    skip: SkipOption = None,
    fallback: FallbackOption = None,
    strict: StrictOption = True,
    min_expert_tokens: ExpertOption = 32,
    shrinkage: ShrinkageOption = None,
    match_dense: MatchOption = None,
    match_ridge: RidgeOption = 0.1,
    device: DeviceOption = "auto",
    forward_dtype: ForwardOption = "auto",
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
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune with several methods, calibrated on the same tokens, and print one table."""
    from halve import comparison
    from halve.checkpoint import load as checkpoint
    from halve.evaluation.perplexity import evaluation_texts
    from halve.solve.objective import Objective
    from halve.text.calibration import check_source, default_length, text_tokens
    from halve.text.tokens import check_length, check_texts

    rows: list[Any] = []
    with reporting():
        contenders = [comparison.Contender.parse(text) for text in methods.split(",")]
        requests = comparison.make_requests(
            contenders,
            parse_options_by_method(option or []),
            pattern=pattern,
            skip=skip or (),
            fallback=allowed_fallback(fallback, strict=strict),
            min_expert_tokens=min_expert_tokens,
            objective=Objective(parse_shrinkage(shrinkage), match_dense, match_ridge),
            device=device,
            forward_dtype=forward_dtype,
            dtype=parse_dtype(dtype),
        )
        check_source(calibration, samples=samples, seq_len=seq_len, text_field=field)
        check_texts(
            data, seq_len=seq_len if eval_seq_len is None else eval_seq_len, max_windows=max_windows, field=field
        )
        source = checkpoint.resolve(model, trust_remote_code=trust_remote_code)
        if out_dir is not None:
            comparison.check_destinations(out_dir, requests, source, source.size)
        loaded = checkpoint.load_model(source)
        if seq_len is None:
            seq_len = default_length(loaded)
        check_length(seq_len, loaded.model)
        window = seq_len if eval_seq_len is None else eval_seq_len
        texts = evaluation_texts(loaded, data, seq_len=window, max_windows=max_windows, text_field=field)
        if calibration == "self":
            announce("generate")
        tokens = text_tokens(loaded, calibration, samples=samples, seq_len=seq_len, seed=seed, text_field=field)
        warn_of_overlap(tokens, texts)
        try:
            with progress() as show:
                for row in comparison.compare(
                    loaded,
                    requests,
                    tokens,
                    texts,
                    out=out_dir,
                    seed=seed,
                    forward_dtype=forward_dtype,
                    listen=lambda contender, step: show(step, str(contender)),
                ):
                    rows.append(row)
                    say_row(row)
        finally:  # what is finished is worth having, whatever stopped the rest
            if as_json:
                record = comparison.as_json(rows, requests, model=model, pattern=pattern, calibration=tokens, seed=seed)
                out.print_json(json.dumps(record))
            elif rows:
                out.print(comparison_table(rows, pattern))
    if any(row.error for row in rows):
        raise typer.Exit(EXIT_FAILED)
    if any(row.fallbacks for row in rows):
        raise typer.Exit(EXIT_FALLBACKS)


@app.command()
def methods() -> None:
    """List the methods."""
    from halve.solve.methods import METHODS

    table = Table("method", "patterns", "statistics", "summary", "reference")
    for entry in METHODS.values():
        patterns = "N:M, S%" if entry.unstructured else "N:M"
        table.add_row(entry.name, patterns, "yes" if entry.needs_statistics else "no", entry.summary, entry.reference)
    out.print(table)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    say(out, f"halve {installed('halve')}")


def _show_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that belong to no command."""


def main() -> None:
    """Run the command line."""
    app()
