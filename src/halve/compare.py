"""Several methods on one model, one calibration set and the same texts: one row each."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halve import store
from halve.checkpoint import LoadedModel
from halve.device import forward_precision, resolve_device
from halve.errors import InputError
from halve.pattern import Pattern
from halve.perplexity import Perplexity, perplexity
from halve.pruning import Request, prune_loaded
from halve.run import Listener, Settings
from halve.tokens import TokenSet, evaluation_tokens

DENSE = "dense"


@dataclass(frozen=True)
class Contender:
    """A method with its refit, written ``method`` (as published, no refit) or ``method+refit``.

    Attributes:
        method: name in `halve.methods`.
        refit: ``none``, ``gd`` or ``cg``.
    """

    method: str
    refit: str

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """Parse ``wanda`` or ``wanda+cg``."""
        method, plus, refit = text.strip().partition("+")
        if not method or (plus and not refit):
            raise InputError(f"{text!r} is not a method to compare: write a method (wanda) or method+refit (wanda+cg)")
        return cls(method, refit or "none")

    def __str__(self) -> str:
        return self.method if self.refit == "none" else f"{self.method}+{self.refit}"


@dataclass(frozen=True)
class Row:
    """What one contender achieved.

    Attributes:
        name: the contender, or ``dense``.
        perplexities: one for each evaluation text.
        mean_relative_loss: mean over the matrices, None for the dense model.
        seconds: pruning time, without evaluation.
        fallbacks: number of matrices pruned by another method than asked.
        warnings: sentences the user should read.
    """

    name: str
    perplexities: tuple[Perplexity, ...]
    mean_relative_loss: float | None
    seconds: float
    fallbacks: int
    warnings: tuple[str, ...]


def compare(
    loaded: LoadedModel,
    requests: Mapping[Contender, Request],
    calibration: TokenSet,
    evaluation: Sequence[TokenSet],
    *,
    out: Path | None = None,
    seed: int = 0,
    forward_dtype: str = "auto",
    listen: Listener | None = None,
) -> Iterator[Row]:
    """Yield one `Row` for the dense model and one for each contender, as each is finished.

    Args:
        loaded: the dense model; it stays as it is, a copy is pruned (so twice its memory is needed).
        requests: what to compare, and how to prune for it (`make_requests`).
        calibration: tokens, the same for all.
        evaluation: texts to evaluate on.
        out: directory under which each pruned checkpoint is written, None to write none.
        seed: that chose the calibration data, for the record.
        forward_dtype: of the evaluation: ``auto``, ``float32`` or ``bfloat16``.
        listen: called at every step of pruning.

    Raises:
        InputError: see `halve.prune`.
    """
    places = {contender: None if out is None else checkpoint_directory(out, contender) for contender in requests}
    for contender, place in places.items():
        if place is not None:
            needed = store.output_bytes(loaded, requests[contender].dtype)
            store.check_destination(place, loaded.source, needed * len(requests))

    def measure(model: nn.Module, device: torch.device) -> tuple[Perplexity, ...]:
        return tuple(perplexity(model, tokens, device=device, dtype=forward_dtype) for tokens in evaluation)

    yield Row(DENSE, measure(loaded.model, next(iter(requests.values())).device), None, 0.0, 0, ())
    for contender, request in requests.items():
        started = time.perf_counter()
        candidate = LoadedModel(copy.deepcopy(loaded.model), loaded.tokenizer, loaded.source)
        report = prune_loaded(candidate, calibration, request, places[contender], seed=seed, listen=listen).report
        seconds = time.perf_counter() - started
        yield Row(
            str(contender),
            measure(candidate.model, request.device),
            report.mean_relative_loss,
            seconds,
            len(report.fallbacks),
            report.warnings,
        )


def make_requests(
    contenders: Sequence[Contender],
    options: Mapping[str, Mapping[str, Any]],
    *,
    pattern: str | Pattern = "2:4",
    skip: Sequence[str] = (),
    fallback: str | None = None,
    device: str = "auto",
    forward_dtype: str = "auto",
    dtype: torch.dtype | None = None,
) -> dict[Contender, Request]:
    """Check every contender's settings before any work.

    Args:
        contenders: what to compare.
        options: options by method or refit name; each contender gets those of its method and of its refit.
        pattern: see `halve.prune`, as for the others.
        skip: parameters that stay dense.
        fallback: method for matrices that a contender fails on.
        device: ``auto``, ``cpu``, ``cuda``, …
        forward_dtype: ``auto``, ``float32`` or ``bfloat16``.
        dtype: of written checkpoints, for GGUF input.

    Raises:
        InputError: an option belongs to no contender, or any setting is not usable.
    """
    known = {name for contender in contenders for name in (contender.method, contender.refit)}
    if stray := sorted(set(options) - known):
        raise InputError(f"options for {stray[0]!r} belong to none of the compared: {', '.join(sorted(known))}")
    target = resolve_device(device)
    precision = forward_precision(forward_dtype, target)
    found = {}
    for contender in contenders:
        of_refit = {f"refit_{name}": value for name, value in options.get(contender.refit, {}).items()}
        own = {**options.get(contender.method, {}), **of_refit}
        settings = Settings(Pattern.parse(pattern), contender.method, contender.refit, own, tuple(skip), fallback)
        found[contender] = Request(settings, target, precision, dtype)
    return found


def evaluation_texts(
    loaded: LoadedModel, sources: Sequence[str | Path], *, seq_len: int, max_windows: int | None, text_field: str
) -> list[TokenSet]:
    """Tokenise the evaluation texts for a model.

    Args:
        loaded: the model, and its tokenizer.
        sources: see `halve.tokens.evaluation_tokens`, as for the others.
        seq_len: window length.
        max_windows: only the first windows; None takes all.
        text_field: field of ``.jsonl`` and ``.parquet`` files.

    Raises:
        InputError: no tokenizer, or a source or the length is not usable.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise InputError("the model has no tokenizer, so perplexity of text cannot be measured: give another model")
    return [
        evaluation_tokens(source, tokenizer, seq_len=seq_len, max_windows=max_windows, field=text_field)
        for source in sources
    ]


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain JSON values."""
    return [
        {
            "name": row.name,
            "perplexity": {p.source: p.value for p in row.perplexities},
            "mean_relative_loss": row.mean_relative_loss,
            "seconds": round(row.seconds, 2),
            "fallbacks": row.fallbacks,
            "warnings": list(row.warnings),
        }
        for row in rows
    ]


def checkpoint_directory(parent: Path, contender: Contender) -> Path:
    """Return where ``compare --out`` writes a contender's checkpoint."""
    return parent / str(contender).replace("+", "-")
