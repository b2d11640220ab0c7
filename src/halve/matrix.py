"""Prune one weight matrix, from checked input to verified output."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from halve import methods
from halve import refit as refits
from halve.errors import CalibrationError, FactorisationError, InputError, PatternError
from halve.gram import Statistics
from halve.linalg import full_precision
from halve.methods import Method
from halve.outcome import Outcome, Status
from halve.pattern import Pattern
from halve.quadratic import relative_loss
from halve.refit import Refit

FALLBACKS = ("magnitude", "wanda")
"""Methods that cannot fail for numerical reasons."""
_REFIT_PREFIX = "refit_"
_ASYMMETRY = 1e-4
"""Largest |H - Hᵀ| accepted, as a share of the largest diagonal entry."""


@dataclass(frozen=True)
class _Settings:
    """What to do, checked as far as that is possible without a matrix."""

    pattern: Pattern
    method: Method
    method_options: Any
    refit: Refit
    refit_options: Any
    fallback: str | None


@dataclass(frozen=True)
class _Task(_Settings):
    """What to do to which matrix, checked."""

    weight: Tensor
    stats: Statistics | None


def validate_settings(
    method: str, refit: str, pattern: str | Pattern, *, fallback: str | None = None, **options: Any
) -> None:
    """Check names and options that will later go to ``prune_weight``, without a matrix.

    Args:
        method: a name in ``halve.methods.METHODS``.
        refit: ``none``, ``cg``, ``gd`` or ``swap``.
        pattern: N:M or a percentage.
        fallback: ``magnitude``, ``wanda`` or None.
        **options: of the method, and of the refit with the prefix ``refit_``.

    Raises:
        InputError: a name or an option is unknown, or a value is out of range.
        PatternError: the pattern is malformed, or not one for this method.
    """
    _settings(method, refit, pattern, fallback, options)


def effective_options(method: str, refit: str, **options: Any) -> dict[str, Any]:
    """Return all options of a method and a refit (with the prefix ``refit_``), those not given at their defaults.

    Args:
        method: a name in ``halve.methods.METHODS``.
        refit: ``none``, ``cg``, ``gd`` or ``swap``.
        **options: as for ``prune_weight``.

    Raises:
        InputError: a name or an option is unknown, or a value is out of range.
    """
    of_method, of_refit = _split_options(method, refit, options)
    return asdict(of_method) | {f"{_REFIT_PREFIX}{name}": value for name, value in asdict(of_refit).items()}


def prune_weight(
    weight: Tensor,
    gram: Tensor | Statistics | None,
    pattern: str | Pattern = "2:4",
    method: str = "auto",
    refit: str = "cg",
    *,
    tokens: int | None = None,
    fallback: str | None = None,
    **options: Any,
) -> Outcome:
    """Prune a matrix whose rows multiply inputs with the given statistics.

    Args:
        weight: (d_out, d_in), float16, bfloat16, float32 or float64, finite; not modified.
        gram: (d_in, d_in), ``H = XᵀX / tokens`` of the inputs (the scale does not matter), on the device of
            ``weight``; symmetric, finite, diagonal >= 0. None is enough for ``magnitude`` with ``refit="none"``.
        pattern: N:M, keep N of every M along ``d_in``, or a percentage of zeros a row if the method takes it.
        method: a name in ``halve.methods.METHODS``; ``auto`` takes ``effort="fast"``, ``"balanced"`` or ``"best"``.
        refit: what to do with the kept weights once the mask is fixed: ``cg`` finds the best ones, ``gd`` is the
            paper's masked gradient, ``none`` leaves them as the method made them; ``swap`` finds the best ones and goes
            on to exchange kept and pruned weights of a group as long as that lowers the loss (N:M only).
        tokens: number of inputs behind ``gram``, for the record; taken from ``gram`` if that is ``Statistics``.
        fallback: ``magnitude`` or ``wanda``, used if the method fails for numerical reasons; None reports failure.
        **options: of the method, and of the refit with the prefix ``refit_``.

    Returns:
        Outcome: pruned weights in the dtype of ``weight``; ``FAILED`` with the weights unchanged if the Gram matrix
            is zero or could not be factorised; ``FELL_BACK`` if the fallback was used. Facts, where they apply:
            ``relative_loss_before_refit``, ``relative_loss``, ``iterations``, ``refit_iterations``, ``damping``,
            ``tokens``, ``seconds``, and others of the method and the refit.

    Raises:
        InputError: an argument or option is unusable; nothing was computed.
        PatternError: the pattern is malformed, or does not fit the matrix or the method.
    """
    task = _task(weight, gram, tokens, _settings(method, refit, pattern, fallback, options))
    start = time.perf_counter()
    with full_precision():
        outcome = _fit(task, _solve(task))
        outcome = _verified(task, outcome)
    facts = dict(outcome.facts)
    if task.stats is not None and task.stats.tokens:
        facts["tokens"] = float(task.stats.tokens)
    facts["seconds"] = time.perf_counter() - start
    return Outcome(outcome.weight, outcome.status, outcome.method, outcome.reason, facts)


def _settings(
    method: str, refit: str, pattern: str | Pattern, fallback: str | None, options: dict[str, Any]
) -> _Settings:
    pattern = Pattern.parse(pattern)
    row, refit_row = methods.get(method), refits.get(refit)
    method_options, refit_options = _split_options(row, refit_row, options)
    if fallback is not None and fallback not in FALLBACKS:
        raise InputError(f"fallback {fallback!r} is unknown: choose one of {', '.join(FALLBACKS)}, or None")
    if not pattern.structured and not row.unstructured:
        takers = ", ".join(other.name for other in methods.METHODS.values() if other.unstructured)
        raise PatternError(
            f"method {row.name} prunes to N:M such as 2:4, not to {pattern}: for that choose one of {takers}"
        )
    if not pattern.structured and refit_row.changes_mask:
        raise PatternError(
            f"refit {refit_row.name} exchanges weights within the groups of N:M, not of {pattern}: use cg"
        )
    return _Settings(pattern, row, method_options, refit_row, refit_options, fallback)


def _split_options(method: str | Method, refit: str | Refit, options: dict[str, Any]) -> tuple[Any, Any]:
    of_refit = {name.removeprefix(_REFIT_PREFIX): value for name, value in options.items() if _is_of_refit(name)}
    of_method = {name: value for name, value in options.items() if not _is_of_refit(name)}
    return methods.make_options(method, **of_method), refits.make_options(refit, **of_refit)


def _task(weight: Tensor, gram: Tensor | Statistics | None, tokens: int | None, settings: _Settings) -> _Task:
    """Check the matrix and its statistics against the settings."""
    _check_weight(weight)
    settings.pattern.budget(weight.shape[1])
    if gram is not None:
        stats = _checked_statistics(gram, weight, tokens)
    elif settings.method.needs_statistics:
        raise InputError(
            f"method {settings.method.name} needs gram, the Gram matrix of the inputs: only magnitude does not"
        )
    elif settings.refit.solve is not None:
        raise InputError(
            f'refit {settings.refit.name} needs gram, the Gram matrix of the inputs: give it, or set refit="none"'
        )
    else:
        stats = None
    return _Task(weight=weight.detach(), stats=stats, **vars(settings))


def _is_of_refit(name: str) -> bool:
    return name.startswith(_REFIT_PREFIX)


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        got = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"weight must be a non-empty floating point tensor of shape (d_out, d_in), got {got}")
    if not bool(torch.isfinite(weight).all()):
        row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise InputError(f"weight has NaN or infinity, first at row {row}, column {column}: prune a finite matrix")


def _checked_statistics(gram: Tensor | Statistics, weight: Tensor, tokens: int | None) -> Statistics:
    """Return ``gram`` as float32 statistics, or say what is wrong with it."""
    if isinstance(gram, Statistics):
        tokens = gram.tokens if tokens is None else tokens
        gram = gram.gram
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens must be at least 1, got {tokens}")
    d_in = weight.shape[1]
    if not isinstance(gram, Tensor) or tuple(gram.shape) != (d_in, d_in) or not gram.is_floating_point():
        got = f"{gram.dtype} of shape {tuple(gram.shape)}" if isinstance(gram, Tensor) else type(gram).__name__
        raise InputError(f"gram must be floating point of shape ({d_in}, {d_in}) to match weight, got {got}")
    if gram.device != weight.device:
        raise InputError(f"gram is on {gram.device} and weight on {weight.device}: move one of them")
    gram32 = gram.detach().float()
    if not bool(torch.isfinite(gram32).all()):
        raise InputError("gram has NaN or infinity in float32: calibrate again, or divide it by the number of tokens")
    diagonal = gram32.diagonal()
    if bool((diagonal < 0.0).any()):
        feature = int((diagonal < 0.0).to(torch.uint8).argmax())
        raise InputError(f"gram has a negative diagonal entry at feature {feature}: it must be XᵀX / tokens")
    asymmetry, peak = float((gram32 - gram32.mT).abs().amax()), float(diagonal.amax())
    if asymmetry > _ASYMMETRY * peak:
        raise InputError(f"gram is not symmetric (largest difference {asymmetry:.3g}): it must be XᵀX / tokens")
    return Statistics(gram32, tokens or 0)


def _solve(task: _Task) -> Outcome:
    """Run the method, and the fallback if it fails."""
    needy = f"method {task.method.name}" if task.method.needs_statistics else f"refit {task.refit.name}"
    try:
        if task.method.needs_statistics or task.refit.solve is not None:
            _require_live(task.stats)
        return task.method.solve(task.weight, task.stats, task.pattern, task.method_options)
    except (FactorisationError, CalibrationError) as error:
        reason = f"{needy} failed: {error}"
    if task.fallback is None:
        return Outcome(task.weight, Status.FAILED, task.method.name, reason)
    row = methods.get(task.fallback)
    try:
        if row.needs_statistics:
            _require_live(task.stats)
        outcome = row.solve(task.weight, task.stats, task.pattern, methods.make_options(row))
    except CalibrationError as error:
        both = f"{reason}; fallback {row.name} failed too: {error}"
        return Outcome(task.weight, Status.FAILED, task.method.name, both)
    return Outcome(outcome.weight, Status.FELL_BACK, row.name, f"{reason}; used {row.name} instead", outcome.facts)


def _require_live(stats: Statistics | None) -> None:
    """Refuse a Gram matrix that says nothing."""
    if not _is_live(stats):
        raise CalibrationError("the Gram matrix is zero: no calibration input reached this layer")


def _is_live(stats: Statistics | None) -> bool:
    return stats is not None and bool((stats.gram.diagonal() > 0.0).any())


def _fit(task: _Task, outcome: Outcome) -> Outcome:
    """Refit the kept weights and measure what was lost, as far as there are statistics to do it with."""
    if outcome.status is Status.FAILED or task.stats is None or not _is_live(task.stats):
        return outcome
    gram, facts = task.stats.gram, dict(outcome.facts)
    weight = outcome.weight
    facts["relative_loss_before_refit"] = facts["relative_loss"] = relative_loss(weight, task.weight, gram)
    if task.refit.solve is not None:
        # Exactly N a group: a slot that the method left at zero may be put to use.
        support = task.pattern if task.refit.changes_mask else task.pattern.keep_mask(weight.abs())
        try:
            weight, refit_facts = task.refit.solve(weight, task.weight, gram, support, **asdict(task.refit_options))
        except FactorisationError as error:
            reason = f"refit {task.refit.name} failed: {error}"
            return Outcome(task.weight, Status.FAILED, task.method.name, reason)
        facts |= refit_facts
        facts["relative_loss"] = relative_loss(weight, task.weight, gram)
    return Outcome(weight, outcome.status, outcome.method, outcome.reason, facts)


def _verified(task: _Task, outcome: Outcome) -> Outcome:
    """Look at the final bytes: the pattern in the final dtype, and finiteness."""
    if outcome.status is Status.FAILED:
        return outcome
    problem = ""
    if not bool(torch.isfinite(outcome.weight).all()):
        problem = f"{outcome.method} gave weights that are not finite in {outcome.weight.dtype}"
    elif not task.pattern.satisfied_by(outcome.weight):
        problem = f"{outcome.method} gave weights that are not {task.pattern}"
    if problem:
        return Outcome(task.weight, Status.FAILED, task.method.name, problem)
    return outcome
