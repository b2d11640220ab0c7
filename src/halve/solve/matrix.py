"""Prune one weight matrix, or several with the same inputs, from checked input to verified output."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halve.errors import CalibrationError, FactorisationError, InputError
from halve.maths.active_rows import some_rows
from halve.maths.gram import Gradient, Statistics
from halve.maths.linalg import full_precision, in_parts, is_finite
from halve.maths.pattern import Pattern, apply_mask
from halve.maths.quadratic import ratio, row_losses
from halve.solve import methods
from halve.solve.conditioning import (
    check_weight,
    checked_gradient,
    checked_statistics,
    into_range,
    times_power_of_two,
)
from halve.solve.objective import Objective
from halve.solve.outcome import Outcome, Status
from halve.solve.settings import SolverSettings, solver_settings

GIVEN = "given"
"""What stands for the method where masks were given."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What to do to which rows, checked.

    Attributes:
        settings: what to do.
        weight: (rows, d_in), of one matrix or of several one below the other.
        sizes: number of rows of each matrix.
        stats: of the inputs; None for a method and refit that need none.
        mask: (rows, d_in) bool of what is kept; None lets the method choose.
    """

    settings: SolverSettings
    weight: Tensor
    sizes: tuple[int, ...]
    stats: Statistics | None
    mask: Tensor | None = None


def prune_weight(
    weight: Tensor,
    gram: Tensor | Statistics | None,
    pattern: str | Pattern = "2:4",
    method: str = "auto",
    refit: str = "cg",
    *,
    tokens: int | None = None,
    fallback: str | None = None,
    objective: Objective | None = None,
    gradient: Gradient | None = None,
    **options: Any,
) -> Outcome:
    """Prune a matrix whose rows multiply inputs with the given statistics.

    Args:
        weight: (d_out, d_in), float16, bfloat16, float32 or float64, finite; not modified.
        gram: (d_in, d_in), ``H = XᵀX / tokens`` of the inputs (the scale does not matter), on the device of
            ``weight``; symmetric, finite, positive semi-definite (which `Statistics` are trusted to be). None is
            enough for ``magnitude`` with ``refit="none"``.
        pattern: N:M, keep N of every M along ``d_in``, or a percentage of zeros a row if the method takes it.
        method: a name in ``halve.solve.methods.METHODS``; ``auto`` takes ``effort="fast"``, ``"balanced"`` or
            ``"best"``.
        refit: what to do with the kept weights once the mask is fixed: ``cg`` finds the best ones, ``gd`` is the
            paper's masked gradient, ``none`` leaves them as the method made them; ``swap`` finds the best ones and goes
            on to exchange kept and pruned weights of a group as long as that lowers the loss (N:M only); ``int4`` finds
            the best ones among integers of 4 bits with a scale for each 64 columns (2:4 only).
        tokens: number of inputs behind ``gram``, for the record; taken from ``gram`` if that is ``Statistics``.
        fallback: ``magnitude`` or ``wanda``, used if the method fails for numerical reasons; None reports failure.
        objective: shrinkage of H and targets from the dense model; None leaves them at their defaults.
        gradient: for the methods that weigh it (``gblm``, ``pruner-zero``, ``wanda++``): of the matrix, sample by
            sample, with as many samples as made up ``tokens``.
        **options: of the method, and of the refit with the prefix ``refit_``.

    Returns:
        Outcome: pruned weights in the dtype of ``weight``; ``FAILED`` with the weights unchanged if the Gram matrix
            is zero or could not be factorised; ``FELL_BACK`` if the fallback was used. Facts, where they apply:
            ``relative_loss_before_refit``, ``relative_loss`` (on H as given, against what was aimed at: the dense
            weights' outputs, or those of `halve.solve.dense_target`), ``iterations``, ``refit_iterations``,
            ``damping``, ``shrinkage``, ``match_dense``, ``tokens``, ``seconds``, and others of the method and the
            refit.

    Raises:
        InputError: an argument or option is unusable; nothing was computed.
        PatternError: the pattern is malformed, or does not fit the matrix or the method.
    """
    return prune_weights(
        [weight],
        gram,
        pattern,
        method,
        refit,
        tokens=tokens,
        fallback=fallback,
        objective=objective,
        gradients=None if gradient is None else [gradient],
        **options,
    )[0]


def prune_weights(
    weights: Sequence[Tensor],
    gram: Tensor | Statistics | None,
    pattern: str | Pattern = "2:4",
    method: str = "auto",
    refit: str = "cg",
    *,
    tokens: int | None = None,
    fallback: str | None = None,
    objective: Objective | None = None,
    masks: Sequence[Tensor] | None = None,
    gradients: Sequence[Gradient] | None = None,
    **options: Any,
) -> list[Outcome]:
    """Prune matrices that multiply the very same inputs, such as query, key and value.

    Where the method's rows do not depend on one another the matrices are solved as one, which shares the
    factorisations; their weights are then what each alone would have got, up to rounding.

    Args:
        weights: one or more, each (d_out, d_in) with the same d_in, dtype and device; all else is as `prune_weight`
            has it.
        masks: for each matrix (d_out, d_in) bool, in the pattern: what it keeps, instead of what the method would
            choose. The refit stays on it, and so does the fallback, which leaves the kept weights as they are.
        gradients: one for each matrix, of the same samples.

    Returns:
        list[Outcome]: one for each matrix, as `prune_weight` gives it; facts other than the losses are those of all
        that were solved together, ``seconds`` a share in proportion to the rows.

    Raises:
        InputError, PatternError: as `prune_weight`; also if the matrices differ in dtype or device.
    """
    settings = solver_settings(method, refit, pattern, fallback, Objective.of(objective), options)
    for weight in weights:
        check_weight(weight)
    if len({(weight.shape[1], weight.dtype, weight.device) for weight in weights}) != 1:
        raise InputError("weights must be one or more matrices of the same width, dtype and device")
    if masks is not None and settings.refit.changes_mask:
        raise InputError(f"refit {settings.refit.name} exchanges kept and pruned weights, and masks are given: use cg")
    kept: list[Tensor | None] = [None] * len(weights) if masks is None else list(masks)
    stats = _statistics(weights[0], gram, tokens, settings)
    checked = _gradients(weights, stats, gradients, settings)
    # One matrix for all shares the factorisations of method and refit; where there are none, it would only take memory.
    nothing_shared = settings.method.by_rows and settings.refit.solve is None
    together = settings.method.independent_rows(settings.pattern) and not nothing_shared
    bundles = [list(weights)] if together else [[weight] for weight in weights]
    outcomes: list[Outcome] = []
    for bundle in bundles:
        own = [mask for mask in (kept if together else [kept[len(outcomes)]]) if mask is not None]
        if stats is not None and checked:
            stats = replace(stats, gradient=_joined(checked[len(outcomes) : len(outcomes) + len(bundle)]))
        joined = bundle[0] if len(bundle) == 1 else torch.cat(bundle)
        sizes = tuple(len(weight) for weight in bundle)
        mask = torch.cat(own) if own else None
        share = settings if together else _share_of_time(settings, sum(sizes) / sum(len(weight) for weight in weights))
        outcomes += _prune(_Task(settings=share, weight=joined.detach(), sizes=sizes, stats=stats, mask=mask))
    return outcomes


def _share_of_time(settings: SolverSettings, share: float) -> SolverSettings:
    """Return the settings with a share of the time limit, where there is one."""
    limit = getattr(settings.method_options, "time_limit", None)
    if limit is None:
        return settings
    return replace(settings, method_options=replace(settings.method_options, time_limit=limit * share))


def _prune(task: _Task) -> list[Outcome]:
    start = time.perf_counter()
    originals = torch.split(task.weight, list(task.sizes))
    weight, stats, exponent = into_range(task.weight, task.stats)
    task = replace(task, weight=weight, stats=stats)
    with full_precision():
        aims: dict[str, float] = {}
        try:
            aimed, aims = _aimed(task)
        except FactorisationError as error:
            outcomes = _fit(task, task, _fall_back(task, f"match_dense failed: {error}"))
        else:
            outcomes = _fit(task, aimed, _solve(aimed))
    outcomes = [replace(each, weight=times_power_of_two(each.weight, -exponent)) for each in outcomes]
    outcomes = [_verified(task, original, outcome) for original, outcome in zip(originals, outcomes, strict=True)]
    seconds = time.perf_counter() - start
    finished = []
    for outcome, size in zip(outcomes, task.sizes, strict=True):
        facts = {**outcome.facts, **aims}
        if task.stats is not None and task.stats.tokens:
            facts["tokens"] = float(task.stats.tokens)
        facts["seconds"] = seconds * size / sum(task.sizes)
        finished.append(replace(outcome, facts=facts))
    return finished


def _aimed(task: _Task) -> tuple[_Task, dict[str, float]]:
    """Return the task with the weights and the Gram matrix that its objective asks for, and what was done to them."""
    if task.stats is None or not _is_live(task.stats):
        return task, {}
    settings = task.settings
    defaults = settings.method.defaults(settings.method_options)
    weight, gram, facts = settings.objective.apply(task.weight, task.stats, settings.pattern, defaults)
    return replace(task, weight=weight, stats=replace(task.stats, gram=gram)), facts


def _statistics(
    weight: Tensor, gram: Tensor | Statistics | None, tokens: int | None, settings: SolverSettings
) -> Statistics | None:
    """Check a matrix and its statistics against the settings."""
    settings.pattern.budget(weight.shape[1])
    if gram is None and settings.method.needs_statistics:
        raise InputError(
            f"method {settings.method.name} needs gram, the Gram matrix of the inputs: only magnitude does not"
        )
    if gram is None and settings.refit.solve is not None:
        raise InputError(
            f'refit {settings.refit.name} needs gram, the Gram matrix of the inputs: give it, or set refit="none"'
        )
    settings.objective.check_statistics(gram)
    rescale = settings.method.gradient is None
    return None if gram is None else checked_statistics(gram, weight, tokens, rescale=rescale)


def _gradients(
    weights: Sequence[Tensor],
    stats: Statistics | None,
    gradients: Sequence[Gradient] | None,
    settings: SolverSettings,
) -> list[Gradient]:
    """Check the gradients of matrices against the settings; none where none are needed."""
    name = settings.method.name
    if settings.method.gradient is None:
        if gradients is not None:
            takers = ", ".join(row.name for row in methods.METHODS.values() if row.gradient is not None)
            raise InputError(f"method {name} does not weigh gradients: leave them out, or choose one of {takers}")
        return []
    if gradients is None or len(gradients) != len(weights):
        given = 0 if gradients is None else len(gradients)
        raise InputError(
            f"method {name} needs the gradient of every matrix (halve.Gradient), got {given} for {len(weights)}: "
            "halve.prune takes them from the model and its calibration data"
        )
    if stats is None or not stats.tokens:
        raise InputError(f"method {name} weighs inputs and gradients by the sample: give tokens, their number")
    checked = [checked_gradient(each, weight, name) for each, weight in zip(gradients, weights, strict=True)]
    if len({(each.samples, each.tuned is None) for each in checked}) != 1:
        raise InputError(f"gradients for method {name} must be of the same samples, and all have tuned weights or none")
    return checked


def _joined(gradients: Sequence[Gradient]) -> Gradient:
    """Return the gradient of matrices one below the other."""
    if len(gradients) == 1:
        return gradients[0]
    tuned = [each.tuned for each in gradients if each.tuned is not None]
    root = torch.cat([each.root for each in gradients])
    return Gradient(root, gradients[0].samples, torch.cat(tuned) if tuned else None)


def _solve(task: _Task) -> Outcome:
    """Run the method, and the fallback if it fails."""
    settings = task.settings
    needy = f"method {settings.method.name}" if settings.method.needs_statistics else f"refit {settings.refit.name}"
    try:
        if settings.method.needs_statistics or settings.refit.solve is not None:
            _require_live(task.stats)
        if task.mask is not None:
            return Outcome(apply_mask(task.weight, task.mask), Status.OK, GIVEN)
        if settings.method.by_rows:
            return _in_parts(settings, task.weight, task.stats)
        return settings.method.solve(task.weight, task.stats, settings.pattern, settings.method_options)
    except (FactorisationError, CalibrationError) as error:
        return _fall_back(task, f"{needy} failed: {error}")


def _in_parts(settings: SolverSettings, weight: Tensor, stats: Statistics | None) -> Outcome:
    """Run a method whose work is by rows on some rows at a time, which takes less memory."""
    solved = [
        settings.method.solve(rows, stats, settings.pattern, settings.method_options) for rows in in_parts(weight)
    ]
    return replace(solved[0], weight=torch.cat([each.weight for each in solved]))


def _fall_back(task: _Task, reason: str) -> Outcome:
    """Run the fallback, if there is one, after what ``reason`` says."""
    settings = task.settings
    if settings.fallback is None:
        return Outcome(task.weight, Status.FAILED, settings.method.name, reason)
    if task.mask is not None:
        kept = apply_mask(task.weight, task.mask)
        return Outcome(kept, Status.FELL_BACK, GIVEN, f"{reason}; the kept weights are as they were")
    row = methods.get(settings.fallback)
    try:
        if row.needs_statistics:
            _require_live(task.stats)
        outcome = row.solve(task.weight, task.stats, settings.pattern, methods.make_options(row))
    except CalibrationError as error:
        both = f"{reason}; fallback {row.name} failed too: {error}"
        return Outcome(task.weight, Status.FAILED, settings.method.name, both)
    return Outcome(outcome.weight, Status.FELL_BACK, row.name, f"{reason}; used {row.name} instead", outcome.facts)


def _require_live(stats: Statistics | None) -> None:
    """Refuse a Gram matrix that says nothing."""
    if not _is_live(stats):
        raise CalibrationError("the Gram matrix is zero: no calibration input reached this layer")


def _is_live(stats: Statistics | None) -> bool:
    return stats is not None and bool((stats.gram.diagonal() > 0.0).any())


def _fit(task: _Task, aimed: _Task, outcome: Outcome) -> list[Outcome]:
    """Refit the kept weights, and measure what each matrix lost, as far as there are statistics to do it with.

    Args:
        task: what was asked: its Gram matrix measures.
        aimed: the same with the weights and the Gram matrix of the objective: they are what is solved for.
        outcome: of the method.
    """
    settings = task.settings
    if outcome.status is Status.FAILED:
        return _split(task, replace(outcome, weight=task.weight))
    if task.stats is None or aimed.stats is None or not _is_live(task.stats):
        return _split(task, outcome)
    gram, weight, facts = aimed.stats.gram, outcome.weight, dict(outcome.facts)
    before = row_losses(weight, aimed.weight, task.stats.gram)
    after = before
    if settings.refit.solve is not None:
        # Exactly N a group: a slot that the method left at zero may be put to use.
        support = settings.pattern if settings.refit.changes_mask else settings.pattern.keep_mask(weight.abs())
        support = support if task.mask is None else task.mask
        try:
            weight, refit_facts = settings.refit.solve(
                weight, aimed.weight, gram, support, **asdict(settings.refit_options)
            )
        except FactorisationError as error:
            reason = f"refit {settings.refit.name} failed: {error}"
            if settings.fallback is None:
                return _split(task, Outcome(task.weight, Status.FAILED, settings.method.name, reason))
            reason = "; ".join(
                filter(None, (outcome.reason, reason, f"the weights are those of method {outcome.method}"))
            )
            outcome = replace(outcome, status=Status.FELL_BACK, reason=reason)
            refit_facts = {}
        facts |= refit_facts
        rows = some_rows((weight != outcome.weight).any(-1))
        after = before.clone()
        after[rows] = row_losses(weight[rows], aimed.weight[rows], task.stats.gram)
    nothing = weight.new_zeros(1, 1).expand_as(weight)
    total = row_losses(nothing, aimed.weight, task.stats.gram)
    losses = []
    for lost_before, lost, whole in zip(
        *(torch.split(part, list(task.sizes)) for part in (before, after, total)), strict=True
    ):
        shares = [float(ratio(part.sum(), whole.sum())) for part in (lost_before, lost)]
        losses.append(dict(zip(("relative_loss_before_refit", "relative_loss"), shares, strict=True)))
    return _split(task, Outcome(weight, outcome.status, outcome.method, outcome.reason, facts), losses)


def _split(task: _Task, outcome: Outcome, facts: Sequence[dict[str, float]] | None = None) -> list[Outcome]:
    """Return the outcome of each matrix, with its own facts, if there are any, added."""
    facts = [{} for _ in task.sizes] if facts is None else facts
    parts = torch.split(outcome.weight, list(task.sizes))
    return [
        replace(outcome, weight=part.contiguous(), facts={**outcome.facts, **own})
        for part, own in zip(parts, facts, strict=True)
    ]


def _verified(task: _Task, original: Tensor, outcome: Outcome) -> Outcome:
    """Look at the final bytes of one matrix: the pattern in the final dtype, and finiteness; failure changes none."""
    settings = task.settings
    if outcome.status is Status.FAILED:
        return replace(outcome, weight=original)
    problem = ""
    if not is_finite(outcome.weight):
        problem = f"{outcome.method} gave weights that are not finite in {outcome.weight.dtype}"
    elif not all(settings.pattern.satisfied_by(rows) for rows in in_parts(outcome.weight)):
        problem = f"{outcome.method} gave weights that are not {settings.pattern}"
    if problem:
        return Outcome(original, Status.FAILED, settings.method.name, problem)
    return outcome
