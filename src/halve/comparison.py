"""Several methods on one model, one calibration set and the same texts: one row each."""

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halve.checkpoint import write as store
from halve.checkpoint.load import LoadedModel, Source
from halve.checkpoint.room import check_destination
from halve.device import forward_precision, resolve_device
from halve.errors import HalveError, InputError
from halve.evaluation.perplexity import Perplexity, perplexity
from halve.maths.pattern import Pattern
from halve.model.reconstruct import BLOCK, parse_reconstruction
from halve.report.measured import add_perplexity
from halve.report.page import COMPARISON, write_comparison
from halve.report.record import finite, settings_json
from halve.run.directory import open_run
from halve.run.environment import environment
from halve.run.events import Progress, RunReport
from halve.run.settings import MIN_EXPERT_TOKENS, Settings
from halve.solve import methods, refit
from halve.solve.objective import Objective
from halve.solve.settings import OBJECTIVE_OPTIONS
from halve.text import tokens
from halve.text.tokens import TokenSet
from halve.whole_model import Request, prune_loaded, report_notes

DENSE = "dense"


@dataclass(frozen=True)
class Contender:
    """A method with what follows it, written ``method[+refit][+block]``; ``method`` alone is as published.

    Attributes:
        method: name in `halve.solve.methods`.
        refit: ``none``, ``cg``, ``gd`` or ``swap``.
        reconstruct: whether blocks are reconstructed.
    """

    method: str
    refit: str
    reconstruct: bool = False

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """Parse ``wanda``, ``wanda+cg``, ``wanda+block`` or ``wanda+cg+block``."""
        method, *rest = (part.strip() for part in text.split("+"))
        reconstruct = rest[-1:] == [BLOCK]
        rest = rest[:-1] if reconstruct else rest
        if not method or len(rest) > 1 or not all(rest):
            raise InputError(
                f"{text!r} is not a method to compare: write a method (wanda), method+refit (wanda+cg), "
                "or either with +block at the end (wanda+cg+block)"
            )
        return cls(method, rest[0] if rest else "none", reconstruct)

    def check_option_names(self, names: Iterable[str]) -> None:
        """Refuse options that neither the method nor the refit has.

        Args:
            names: of the method's options, and of the refit's with the prefix ``refit_``.

        Raises:
            InputError: the method or the refit is unknown, or has no such option.
        """
        of_refit = [f"refit_{field.name}" for field in fields(refit.get(self.refit).options)]
        known = [*(field.name for field in fields(methods.get(self.method).options)), *of_refit]
        for name in names:
            if name in OBJECTIVE_OPTIONS:
                raise InputError(f"{name} is not an option of {self}: write --{name.replace('_', '-')}")
            if name not in known:
                choice = f"its options are {', '.join(known)}" if known else "it takes none"
                raise InputError(f"{self} has no option {name!r}: {choice}")

    def __str__(self) -> str:
        parts = [self.method, *([self.refit] if self.refit != "none" else []), *([BLOCK] if self.reconstruct else [])]
        return "+".join(parts)


@dataclass(frozen=True)
class Row:
    """What one contender achieved.

    Attributes:
        name: the contender, or ``dense``.
        perplexities: one for each evaluation text; empty if the contender failed.
        mean_relative_loss: mean over the matrices; None for the dense model, or if nothing was measured.
        seconds: of pruning, without copying the model, writing and evaluation.
        phases: by phase of the run (`halve.run.events.RunReport`), those of writing among them.
        fallbacks: number of matrices pruned by another method than asked.
        warnings: sentences the user should read.
        error: why the contender failed, empty if it did not.
    """

    name: str
    perplexities: tuple[Perplexity, ...]
    mean_relative_loss: float | None
    seconds: float
    fallbacks: int
    warnings: tuple[str, ...]
    error: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)


def compare(
    loaded: LoadedModel,
    requests: Mapping[Contender, Request],
    calibration: TokenSet,
    evaluation: Sequence[TokenSet],
    *,
    out: Path | None = None,
    seed: int = 0,
    forward_dtype: str = "auto",
    listen: Callable[[Contender, Progress], None] | None = None,
) -> Iterator[Row]:
    """Return an iterator over one `Row` for the dense model and one for each contender, as each is finished.

    The arguments are checked at the call, before the first row is asked for. A contender that fails has a row with
    its ``error``, and the others go on.

    Args:
        loaded: the dense model; it stays as it is, a copy is pruned (so twice its memory is needed).
        requests: what to compare, and how to prune for it (`make_requests`).
        calibration: tokens, the same for all.
        evaluation: texts to evaluate on.
        out: directory under which each pruned checkpoint is written, and ``comparison.html`` in the end; None to
            write none.
        seed: that chose the calibration data, for the record.
        forward_dtype: of the evaluation: ``auto``, ``float32`` or ``bfloat16``.
        listen: called with the contender that runs, at every step of pruning.

    Raises:
        InputError: there is nothing to compare or to evaluate on, tokens do not fit the model, or ``out`` cannot be
            written to (`check_destinations`).
    """
    if not requests or not evaluation:
        raise InputError("there is nothing to compare: give at least one contender and one evaluation text")
    for texts in (calibration, *evaluation):
        tokens.check_length(texts.seq_len, loaded.model)
        tokens.check_vocabulary(texts.ids, loaded.model, texts.source)
    forward_precision(forward_dtype, next(iter(requests.values())).device)
    if out is not None:
        needed = store.output_bytes(loaded, next(iter(requests.values())).dtype)
        check_destinations(out, requests, loaded.source, needed)
    return _rows(loaded, requests, calibration, evaluation, out, seed, forward_dtype, listen)


def check_destinations(out: Path, contenders: Iterable[Contender], source: Source | None, size: int) -> None:
    """Check that every contender's checkpoint can be written, before any work.

    Args:
        out: the directory under which they are written.
        contenders: what will be compared.
        source: the dense model's files, None for a model in memory.
        size: bytes of one checkpoint.

    Raises:
        InputError: a directory is in use, cannot be written, or the volume is too full for all.
    """
    places = [checkpoint_directory(out, contender) for contender in contenders]
    for place in places:
        check_destination(place, source, size * len(places))
    if (out / COMPARISON).is_dir():
        raise InputError(f"{out / COMPARISON} is a directory, where a file is going to be written: remove it")


def _rows(
    loaded: LoadedModel,
    requests: Mapping[Contender, Request],
    calibration: TokenSet,
    evaluation: Sequence[TokenSet],
    out: Path | None,
    seed: int,
    forward_dtype: str,
    listen: Callable[[Contender, Progress], None] | None,
) -> Iterator[Row]:
    def measure(model: nn.Module, device: torch.device) -> tuple[Perplexity, ...]:
        return tuple(perplexity(model, texts, device=device, dtype=forward_dtype) for texts in evaluation)

    def compete(contender: Contender, request: Request) -> Row:
        gc.collect()  # the previous copy, should it sit in a reference cycle: at most two models at a time
        place = None if out is None else checkpoint_directory(out, contender)
        candidate = LoadedModel(copy.deepcopy(loaded.model), loaded.tokenizer, loaded.source)
        report: RunReport | None = None
        scores: tuple[Perplexity, ...] = ()
        notes: tuple[str, ...] = ()
        failure = ""

        def tell(step: Progress) -> None:
            if listen is not None:
                listen(contender, step)

        try:
            with nullcontext() if place is None else open_run(place) as run:
                report = prune_loaded(candidate, calibration, request, run, seed=seed, listen=tell).report
            scores = measure(candidate.model, request.device)
            if place is not None and out is not None:
                complete.append(place)
                notes = _put_on_record(complete, dense, scores, out)
        except HalveError as error:
            failure = str(error)
        if report is None:
            return Row(str(contender), (), None, 0.0, 0, (), failure)
        loss = finite(report.mean_relative_loss)
        seconds, fallbacks = report.seconds_of_pruning, len(report.fallbacks)
        warnings = (*report.warnings, *notes)
        return Row(str(contender), scores, loss, seconds, fallbacks, warnings, failure, report.seconds)

    dense = measure(loaded.model, next(iter(requests.values())).device)
    complete: list[Path] = []
    yield Row(DENSE, dense, None, 0.0, 0, ())
    for contender, request in requests.items():
        yield compete(contender, request)


def _put_on_record(
    complete: Sequence[Path], before: tuple[Perplexity, ...], after: tuple[Perplexity, ...], out: Path
) -> tuple[str, ...]:
    """Write what was measured of the last checkpoint; what stands in the way of that is no failure of the contender."""
    try:
        add_perplexity(complete[-1], before, after)
        notes = report_notes(complete[-1])
        if len(complete) > 1:
            write_comparison(complete, out / COMPARISON)
    except HalveError as error:
        return (f"pruned and measured, but not put on record: {error}",)
    return notes


def make_requests(
    contenders: Sequence[Contender],
    options: Mapping[str, Mapping[str, Any]],
    *,
    pattern: str | Pattern = "2:4",
    skip: Sequence[str] = (),
    fallback: str | None = None,
    min_expert_tokens: int = MIN_EXPERT_TOKENS,
    objective: Objective | None = None,
    device: str = "auto",
    forward_dtype: str = "auto",
    dtype: torch.dtype | None = None,
) -> dict[Contender, Request]:
    """Check every contender's settings before any work.

    Args:
        contenders: what to compare.
        options: options by name of a method, a refit or ``block``; each contender gets those that concern it.
        pattern: see `halve.prune`, as for the others.
        skip: parameters that stay dense.
        fallback: method for matrices that a contender fails on.
        min_expert_tokens: with a fallback, experts that see fewer tokens are pruned by magnitude.
        objective: shrinkage of the statistics and targets from the dense model, the same for all.
        device: ``auto``, ``cpu``, ``cuda``, …
        forward_dtype: ``auto``, ``float32`` or ``bfloat16``.
        dtype: of written checkpoints, for GGUF input.

    Raises:
        InputError: a contender is named twice, an option belongs to none, or any setting is not usable.
    """
    if twice := next((contender for contender, count in Counter(contenders).items() if count > 1), None):
        raise InputError(f"{twice} is named twice among the methods to compare: name it once")
    known = {name for contender in contenders for name in (contender.method, contender.refit)} - {"none"}
    if any(contender.reconstruct for contender in contenders):
        known.add(BLOCK)
    if stray := sorted(set(options) - known):
        raise InputError(f"options for {stray[0]!r} belong to none of the compared: {', '.join(sorted(known))}")
    target = resolve_device(device)
    precision = forward_precision(forward_dtype, target)
    found = {}
    for contender in contenders:
        of_refit = {f"refit_{name}": value for name, value in options.get(contender.refit, {}).items()}
        own = {**options.get(contender.method, {}), **of_refit}
        contender.check_option_names(own)
        tuning = parse_reconstruction(BLOCK, **options.get(BLOCK, {})) if contender.reconstruct else None
        settings = Settings(
            Pattern.parse(pattern),
            contender.method,
            contender.refit,
            own,
            tuple(skip),
            fallback,
            min_expert_tokens,
            tuning,
            Objective.of(objective),
        )
        found[contender] = Request(settings, target, precision, dtype)
    return found


def as_json(
    rows: Sequence[Row],
    requests: Mapping[Contender, Request],
    *,
    model: str,
    pattern: str | Pattern,
    calibration: TokenSet,
    seed: int,
) -> dict[str, Any]:
    """Return the record of a comparison as plain JSON values; numbers that are not finite become None.

    Args:
        rows: what is finished.
        requests: how each contender prunes.
        model: what the user named.
        pattern: the sparsity pattern.
        calibration: the tokens that all were pruned with.
        seed: that chose them.
    """
    return {
        "model": model,
        "pattern": Pattern.parse(pattern).text,
        "calibration": {
            "source": calibration.source,
            "samples": calibration.samples,
            "seq_len": calibration.seq_len,
            "sha256": calibration.sha256,
            "seed": seed,
        },
        "environment": environment(),
        "contenders": {str(contender): settings_json(request.settings) for contender, request in requests.items()},
        "rows": [_row_json(row) for row in rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    scores = [{**asdict(p), "value": finite(p.value), "nll": finite(p.nll)} for p in row.perplexities]
    times = {
        "seconds": round(row.seconds, 2),
        "phases": {phase: round(seconds, 2) for phase, seconds in row.phases.items()},
    }
    return {**asdict(row), "perplexities": scores, **times, "warnings": list(row.warnings)}


def checkpoint_directory(parent: Path, contender: Contender) -> Path:
    """Return where ``compare --out`` writes a contender's checkpoint."""
    return parent / str(contender).replace("+", "-")
