"""The ``halve`` command: argument parsing and printing, nothing else."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from halve.errors import HalveError, InputError

EXIT_FAILED = 1
"""A check found problems, or a run stopped because a matrix or the data failed."""
EXIT_REFUSED = 2
"""Bad arguments or an unsupported model; nothing was done."""
EXIT_FALLBACKS = 3
"""The run is complete, but some matrices were pruned by another method than asked; they are listed."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune trained neural networks to N:M sparsity, and see what it cost.",
    epilog="Exit codes: 0 complete; 1 failed or problems found; 2 refused, nothing done; 3 complete with fallbacks.",
)
out = Console()
err = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="A directory, a .gguf file, or a Hugging Face hub id.")]
PatternOption = Annotated[str, typer.Option(help="N:M keeps N of every M weights; S% zeroes S percent of a row.")]
CalibrationOption = Annotated[
    str, typer.Option(help="A .txt, .jsonl or .parquet file, a directory, c4, wikitext2, or self (the model writes).")
]
SamplesOption = Annotated[int, typer.Option(help="Calibration sequences.")]
SeqLenOption = Annotated[
    int | None, typer.Option(help="Tokens in a sequence.", show_default="2048, or the model's maximum if less")
]
SeedOption = Annotated[int, typer.Option(help="Of the choice of calibration text.")]
FieldOption = Annotated[str, typer.Option(help="Text field of .jsonl and .parquet files.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
ForwardOption = Annotated[str, typer.Option(help="Products of forward passes: auto, float32 or bfloat16.")]
SkipOption = Annotated[list[str] | None, typer.Option(help="Leave parameters dense, e.g. '*.down_proj.*'. Repeatable.")]
FallbackOption = Annotated[
    str | None, typer.Option(help="Method for matrices that the asked one fails on; default: stop there.")
]
OffloadOption = Annotated[Path | None, typer.Option(help="Keep hidden states in this directory, not in memory.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="Written dtype for GGUF input: float32 (default), bfloat16, float16.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def prune(
    model: ModelArgument,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the pruned checkpoint; must not exist.")],
    pattern: PatternOption = "2:4",
    method: Annotated[str, typer.Option(help="See `halve methods`.")] = "prox-gradient",
    refit: Annotated[str, typer.Option(help="Re-adjust the kept weights: none, gd, cg.")] = "cg",
    calibration: CalibrationOption = "self",
    samples: SamplesOption = 128,
    seq_len: SeqLenOption = None,
    seed: SeedOption = 0,
    field: FieldOption = "text",
    skip: SkipOption = None,
    fallback: FallbackOption = None,
    min_expert_tokens: Annotated[int, typer.Option(help="Experts with fewer tokens are pruned by magnitude.")] = 32,
    device: DeviceOption = "auto",
    forward_dtype: ForwardOption = "auto",
    dtype: DtypeOption = None,
    offload: OffloadOption = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="NAME=VALUE of the method or refit. Repeatable.")
    ] = None,
) -> None:
    """Prune a model to N:M sparsity and write an ordinary Hugging Face checkpoint."""
    from halve.pruning import prune as prune_model

    with _reporting(), _progress() as listen:
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
            device=device,
            forward_dtype=forward_dtype,
            dtype=_torch_dtype(dtype),
            offload=offload,
            listen=listen,
            **_options(option or []),
        )
    report = pruned.report
    for warning in report.warnings:
        err.print(f"[yellow]warning:[/] {warning}", highlight=False)
    seconds = ", ".join(f"{phase} {value:.0f} s" for phase, value in report.seconds.items())
    out.print(
        f"{len(report.matrices)} matrices at {pattern} by {method}, refit {refit}: mean relative loss "
        f"{report.mean_relative_loss:.4f} ({seconds})",
        highlight=False,
    )
    out.print(f"verified and written: {out_dir}", highlight=False)
    if report.fallbacks:
        raise typer.Exit(EXIT_FALLBACKS)


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="A checkpoint.")],
    against: Annotated[str | None, typer.Option(help="The model it was pruned from.")] = None,
    pattern: Annotated[str | None, typer.Option(help="For a checkpoint that has no halve.json.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Re-read the bytes on disk: the pattern holds, all values are finite, nothing is missing or touched."""
    from dataclasses import asdict

    from halve.verification import check as check_checkpoint

    with _reporting():
        result = check_checkpoint(directory, against=against, pattern=pattern)
    if as_json:
        out.print_json(json.dumps(asdict(result)))
    else:
        for note in result.notes:
            out.print(f"note: {note}", highlight=False)
        for problem in result.problems:
            out.print(f"[red]problem:[/] {problem}", highlight=False)
        verdict = "ok" if result.ok else f"{len(result.problems)} problems"
        out.print(
            f"{verdict}: {result.matrices} matrices at {result.pattern}, {result.tensors} tensors, "
            f"{result.sparsity:.1%} zeros in the pruned matrices",
            highlight=False,
        )
    if not result.ok:
        raise typer.Exit(EXIT_FAILED)


@app.command(name="eval")
def evaluate_command(
    model: ModelArgument,
    data: Annotated[list[str], typer.Option(help="wikitext2, c4, or a file. Repeatable.")],
    seq_len: Annotated[int, typer.Option(help="Window length; perplexities at other lengths cannot be compared.")],
    max_windows: Annotated[int | None, typer.Option(help="Only the first windows.")] = None,
    field: FieldOption = "text",
    device: DeviceOption = "auto",
    dtype: ForwardOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity, always with sequence length, window count and dtype."""
    from dataclasses import asdict

    from halve.perplexity import evaluate

    with _reporting():
        results = [
            evaluate(model, source, seq_len=seq_len, max_windows=max_windows, field=field, device=device, dtype=dtype)
            for source in data
        ]
    if as_json:
        out.print_json(json.dumps([asdict(result) for result in results]))
        return
    table = Table("data", "perplexity", "sequence length", "windows", "dtype", "seconds")
    for result in results:
        table.add_row(
            result.source,
            f"{result.value:.3f}",
            str(result.seq_len),
            str(result.windows),
            result.dtype,
            f"{result.seconds:.1f}",
        )
    out.print(table)
    for note in {result.note for result in results if result.note}:
        out.print(f"note: {note}", highlight=False)


@app.command()
def compare(
    model: ModelArgument,
    data: Annotated[list[str], typer.Option(help="Texts for perplexity: wikitext2, c4, or a file. Repeatable.")],
    methods: Annotated[str, typer.Option(help="Comma-separated; wanda is as published, wanda+cg adds a refit.")] = (
        "magnitude,wanda,wanda+cg,sparsegpt,sparsegpt+cg,prox-gradient+cg"
    ),
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
    device: DeviceOption = "auto",
    forward_dtype: ForwardOption = "auto",
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", help="METHOD.NAME=VALUE or REFIT.NAME=VALUE. Repeatable."),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Also write each pruned checkpoint, to OUT/METHOD.")
    ] = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prune with several methods on the same statistics settings, and print one table."""
    from halve import checkpoint
    from halve import compare as comparison
    from halve.pruning import text_tokens

    rows = []
    with _reporting():
        contenders = [comparison.Contender.parse(text) for text in methods.split(",")]
        requests = comparison.make_requests(
            contenders,
            _options_by_method(option or []),
            pattern=pattern,
            skip=skip or (),
            fallback=fallback,
            device=device,
            forward_dtype=forward_dtype,
            dtype=_torch_dtype(dtype),
        )
        loaded = checkpoint.load_model(model)
        tokens = text_tokens(loaded, calibration, samples=samples, seq_len=seq_len, seed=seed, text_field=field)
        texts = comparison.evaluation_texts(
            loaded, data, seq_len=eval_seq_len or tokens.seq_len, max_windows=max_windows, text_field=field
        )
        with _progress() as listen:
            for row in comparison.compare(
                loaded,
                requests,
                tokens,
                texts,
                out=out_dir,
                seed=seed,
                forward_dtype=forward_dtype,
                listen=listen,
            ):
                rows.append(row)
                scores = ", ".join(f"{Path(p.source).name} {p.value:.2f}" for p in row.perplexities)
                err.print(f"{row.name}: {scores} ({row.seconds:.0f} s)", highlight=False)
                for warning in row.warnings:
                    err.print(f"[yellow]warning ({row.name}):[/] {warning}", highlight=False)
    if as_json:
        out.print_json(json.dumps(comparison.as_json(rows)))
    else:
        out.print(comparison_table(rows, pattern))
    if any(row.fallbacks for row in rows):
        raise typer.Exit(EXIT_FALLBACKS)


@app.command()
def methods() -> None:
    """List the methods."""
    from halve.methods import METHODS

    table = Table("method", "patterns", "statistics", "summary", "reference")
    for entry in METHODS.values():
        patterns = "N:M, S%" if entry.unstructured else "N:M"
        table.add_row(entry.name, patterns, "yes" if entry.needs_statistics else "no", entry.summary, entry.reference)
    out.print(table)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    out.print(f"halve {installed('halve')}", highlight=False)


def comparison_table(rows: list[Any], pattern: str) -> Table:
    """Return the table of a comparison, `halve.compare.Row` by row."""
    first = rows[0].perplexities
    caption = "; ".join(f"{Path(p.source).name}: {p.windows} windows of {p.seq_len} tokens, {p.dtype}" for p in first)
    table = Table(
        "method",
        *[f"perplexity {Path(p.source).name}" for p in first],
        "mean relative loss",
        "seconds",
        title=f"{pattern}, lower is better",
        caption=caption,
    )
    for row in rows:
        loss = "" if row.mean_relative_loss is None else f"{row.mean_relative_loss:.4f}"
        name = row.name if not row.fallbacks else f"{row.name} ({row.fallbacks} fallbacks)"
        table.add_row(name, *[f"{p.value:.2f}" for p in row.perplexities], loss, f"{row.seconds:.0f}")
    return table


@contextmanager
def _reporting() -> Iterator[None]:
    """Turn Halve's errors into one sentence and an exit code."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours is the only one
    try:
        yield
    except HalveError as error:
        err.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_REFUSED if _refused(error) else EXIT_FAILED) from error
    except KeyboardInterrupt:
        err.print("interrupted: no checkpoint was written")
        raise typer.Exit(130) from None


def _refused(error: HalveError) -> bool:
    from halve.errors import UnsupportedModelError

    return isinstance(error, InputError | UnsupportedModelError)


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """Show a live bar on a terminal, one plain line a matrix elsewhere; say so if the slow prox is in use."""
    from halve import kernels

    if not kernels.available():
        err.print(f"[yellow]note:[/] {kernels.describe()}", highlight=False)
    if not err.is_terminal:
        yield _plain_progress
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("reading", total=None, last="")

        def show(step: Any) -> None:
            if step.plan is not None:
                bar.console.print(_plan(step.plan), highlight=False)
            description = f"block {min(step.block + 1, step.blocks)}/{step.blocks} {step.phase}"
            bar.update(task, description=description, completed=step.finished, total=step.matrices)
            if step.matrix is not None:
                bar.update(task, last=f"{step.matrix.name} {_loss(step.matrix)}")

        yield show


def _plain_progress(step: Any) -> None:
    if step.plan is not None:
        sys.stderr.write(_plan(step.plan) + "\n")
    if step.phase == "solve" and step.matrix is not None:
        sys.stderr.write(f"block {step.block + 1}/{step.blocks} {step.matrix.name} {_loss(step.matrix)}\n")
        sys.stderr.flush()


def _plan(plan: Any) -> str:
    """Say how many parameters will be pruned, and why the others stay dense (halve.json names each)."""
    reasons = Counter(entry.reason for entry in plan.excluded)
    dense = "; ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    return f"plan: {len(plan.matrices)} matrices in {len(plan.blocks)} blocks; left dense: {dense}"


def _loss(matrix: Any) -> str:
    loss = matrix.facts.get("relative_loss")
    return "" if loss is None else f"relative loss {loss:.4f}"


def _torch_dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in choices:
        raise InputError(f"--dtype {name!r} is not known: choose one of {', '.join(choices)}")
    return choices[name]


def _options(pairs: list[str]) -> dict[str, Any]:
    """Parse ``NAME=VALUE``; a value is a number or a truth value if it reads as one."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise InputError(f"--option {pair!r} is not understood: write NAME=VALUE, for example beta=1.02")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        options[name.replace("-", "_")] = value
    return options


def _options_by_method(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """Parse ``METHOD.NAME=VALUE``."""
    grouped: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        method, dot, rest = pair.partition(".")
        if not dot or "=" in method:
            raise InputError(
                f"--option {pair!r} is not understood: write METHOD.NAME=VALUE, for example prox-gradient.beta=1.02"
            )
        grouped.setdefault(method, {}).update(_options([rest]))
    return grouped


def main() -> None:
    """Run the command line."""
    app()
