"""Best weights on a fixed mask: the least-squares problem that remains once a method has chosen what to keep.

    minimise ½ (v - v0) H̃ (v - v0)ᵀ over v supported on the row's mask, for every row

in the unit-diagonal variables of ``quadratic.Scaled``, which is Jacobi preconditioning of the original problem. Rows
are independent. Neither solver ever returns a row with a larger loss than it was given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halve.checks import check_count, check_not_negative
from halve.lookup import build_options, find_row
from halve.maths.active_rows import ActiveRows, some_rows
from halve.maths.pattern import apply_mask
from halve.maths.quadratic import Scaled, Slope, row_losses, spectral_bound
from halve.solve.exact_swaps import SwapOptions, refine
from halve.solve.integers import to_integers

REPACK_SHARE = 0.1
"""Share of converged rows at which the others are packed together (`ActiveRows`)."""
_ROUNDING = torch.finfo(torch.float32).eps
_LOSSLESS = 1e-6
"""Share of a row's dense output below which its loss counts as none: with fewer tokens than inputs it has no floor."""
WINDOW = 4
"""Conjugate gradient steps whose common progress decides whether a row has converged."""


def refit_cg(
    weight: Tensor,
    original: Tensor,
    gram: Tensor,
    mask: Tensor,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> tuple[Tensor, dict[str, float]]:
    """Fit the kept weights by conjugate gradients, all rows at once.

    A row stops when its last ``WINDOW`` steps together lowered its loss by at most ``tolerance`` times that loss (the
    estimate of the remaining error of Hestenes and Stiefel 1952; Strakoš and Tichý 2002), when it has lost less than a
    millionth of the row's dense output, or when no descent is left. Before ``WINDOW`` steps are done, each that was
    done counts for those that were not; before the first, half the square of the residual does, what a step would
    gain where the curvature is 1, the mean eigenvalue. A method that has come that close is not refitted.
    A stopped row costs nothing more. Its loss does not depend on the other rows beyond a few 1e-5 of itself: rounding
    may make it stop one step earlier or later. The default tolerance comes within 0.1 % of the exact optimum on the
    layers of a small language model.

    Args:
        weight: (d_out, d_in), any float dtype, where to start; entries outside ``mask`` are ignored.
        original: (d_out, d_in), W0.
        gram: (d_in, d_in) float32, H; may be singular.
        mask: (d_out, d_in) bool, true where a weight is kept.
        tolerance: relative decrease of the loss that still counts as progress, >= 0.
        max_iterations: limit on the steps, >= 1.

    Returns:
        tuple[Tensor, dict[str, float]]: weights in the dtype of ``weight``, +0.0 outside ``mask``, and facts:
            ``refit_iterations`` (of the slowest row), ``refit_row_iterations`` (mean), ``refit_kept_rows`` (rows
            whose steps did not improve them and that were left as given), ``refit_unconverged_rows`` (those that the
            limit stopped).

    Raises:
        InputError: an option is out of range.
        CalibrationError: the Gram matrix is zero.
    """
    CGOptions(tolerance, max_iterations)
    problem = Scaled.of(original, gram)
    start = apply_mask(problem.apply(weight), mask)
    solution, iterations, row_iterations, unconverged = conjugate_gradients(
        start, problem.weight, problem.gram, mask, tolerance, max_iterations
    )
    fitted, kept = _never_worse(problem, start, solution, weight, mask, gram)
    return fitted, {
        "refit_iterations": float(iterations),
        "refit_row_iterations": row_iterations / max(1, weight.shape[0]),
        "refit_kept_rows": float(kept),
        "refit_unconverged_rows": float(unconverged),
    }


def refit_gd(
    weight: Tensor, original: Tensor, gram: Tensor, mask: Tensor, steps: int = 1000
) -> tuple[Tensor, dict[str, float]]:
    """Fit the kept weights by masked gradient descent, Eq. 5 of Kübler et al. 2025 (arXiv 2501.18015).

    ``V ← V - M ⊙ [(V - V0) H̃] / L`` with L the largest eigenvalue of H̃.

    Args:
        weight: (d_out, d_in), any float dtype, where to start; entries outside ``mask`` are ignored.
        original: (d_out, d_in), W0.
        gram: (d_in, d_in) float32, H; may be singular.
        mask: (d_out, d_in) bool, true where a weight is kept.
        steps: number of steps, >= 1.

    Returns:
        tuple[Tensor, dict[str, float]]: weights in the dtype of ``weight``, +0.0 outside ``mask``, and facts
            ``refit_iterations`` and ``refit_kept_rows`` (rows that could not be improved).

    Raises:
        InputError: ``steps`` is out of range.
        CalibrationError: the Gram matrix is zero.
    """
    GDOptions(steps)
    problem = Scaled.of(original, gram)
    slope = Slope(problem.gram, -1.0 / spectral_bound(problem.gram))
    keep = mask.float()
    start = solution = problem.apply(weight).mul_(keep)
    for _ in range(steps):
        solution = slope.step(solution, problem.weight).mul_(keep)
    fitted, kept = _never_worse(problem, start, solution, weight, mask, gram)
    return fitted, {"refit_iterations": float(steps), "refit_kept_rows": float(kept)}


def refit_int4(
    weight: Tensor,
    original: Tensor,
    gram: Tensor,
    mask: Tensor,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
    sweeps: int = 4,
) -> tuple[Tensor, dict[str, float]]:
    """Fit the kept weights by conjugate gradients, and then as integers of 4 bits with a scale for each 64 columns.

    The only refit that makes rows worse: there are few such numbers. What it returns `halve pack --values int4` packs
    without another loss.

    Args:
        weight: (d_out, d_in), any float dtype, where to start; entries outside ``mask`` are ignored.
        original: (d_out, d_in), W0.
        gram: (d_in, d_in) float32, H; may be singular.
        mask: (d_out, d_in) bool, true where a weight is kept.
        tolerance: as `refit_cg`.
        max_iterations: as `refit_cg`.
        sweeps: of `halve.solve.integers.to_integers` over all columns, >= 0.

    Returns:
        tuple[Tensor, dict[str, float]]: weights in the dtype of ``weight``, +0.0 outside ``mask``, and the facts of
            `refit_cg` and of `halve.solve.integers.to_integers`.

    Raises:
        InputError: an option is out of range, or a weight is too large for a float16 scale.
        CalibrationError: the Gram matrix is zero.
    """
    IntegerOptions(tolerance, max_iterations, sweeps)
    fitted, facts = refit_cg(weight, original, gram, mask, tolerance, max_iterations)
    integers, more = to_integers(fitted, original, gram, mask, sweeps)
    return integers, facts | more


@dataclass(frozen=True)
class CGOptions:
    """Options of ``refit_cg``; written ``refit_tolerance`` and ``refit_max_iterations`` where methods take them."""

    tolerance: float = 1e-4
    max_iterations: int = 500

    def __post_init__(self) -> None:
        check_not_negative("refit_tolerance", self.tolerance)
        check_count("refit_max_iterations", self.max_iterations)


@dataclass(frozen=True)
class IntegerOptions(CGOptions):
    """Options of ``refit_int4``."""

    sweeps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("refit_sweeps", self.sweeps, least=0)


@dataclass(frozen=True)
class GDOptions:
    """Options of ``refit_gd``; written ``refit_steps`` where methods take them."""

    steps: int = 1000

    def __post_init__(self) -> None:
        check_count("refit_steps", self.steps)


@dataclass(frozen=True)
class NoOptions:
    """Leaving the weights alone has no options."""


@dataclass(frozen=True)
class Refit:
    """A row of the table of refits.

    Attributes:
        name: what the user writes.
        options: the frozen dataclass of its options, whose fields are keyword arguments of ``solve``.
        solve: ``solve(weight, original, gram, mask, **options) -> (weight, facts)``; None leaves the weights alone.
        changes_mask: whether it may exchange kept and pruned weights; ``solve`` then takes the pattern, not the mask.
        pattern: the only one for which it is; None where it is for all.
    """

    name: str
    options: type[Any]
    solve: Callable[..., tuple[Tensor, dict[str, float]]] | None
    changes_mask: bool = False
    pattern: str | None = None


REFITS: dict[str, Refit] = {
    row.name: row
    for row in (
        Refit("none", NoOptions, None),
        Refit("cg", CGOptions, refit_cg),
        Refit("gd", GDOptions, refit_gd),
        Refit("swap", SwapOptions, refine, changes_mask=True),
        Refit("int4", IntegerOptions, refit_int4, pattern="2:4"),
    )
}


def get(name: str) -> Refit:
    """Return the refit called ``name``.

    Raises:
        InputError: there is none; the message suggests what may have been meant.
    """
    return find_row(REFITS, name, "refit")


def make_options(refit: str | Refit, **options: Any) -> Any:
    """Return the options of ``refit`` from keyword arguments named without their ``refit_`` prefix.

    Raises:
        InputError: the refit is unknown or has no option of that name, or a value is out of range.
    """
    refit = get(refit) if isinstance(refit, str) else refit
    return build_options(refit.options, f"refit {refit.name}", options, prefix="refit_")


def conjugate_gradients(
    start: Tensor, target: Tensor, gram: Tensor, mask: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int, int, int]:
    """Minimise ``½ (v - v0) H̃ (v - v0)ᵀ`` over v supported on the row's mask, for every row.

    Args:
        start: (d_out, d_in) float32, 0 outside ``mask``.
        target: (d_out, d_in) float32, V0.
        gram: (d_in, d_in) float32, H̃, with unit diagonal.
        mask: (d_out, d_in) bool.
        tolerance: as `refit_cg`.
        max_iterations: as `refit_cg`.

    Returns:
        tuple[Tensor, int, int, int]: the solution (d_out, d_in) float32, the iterations, their sum over rows, and the
            number of rows that the limit stopped.
    """
    keep = mask.float()
    difference = start - target
    product = difference @ gram
    loss = (difference * product).sum(-1) * 0.5
    value, residual = start.clone(), product.neg_().mul_(keep)
    square = (residual * residual).sum(-1)
    active = ActiveRows(start.clone(), REPACK_SHARE)
    active.finish(0.5 * WINDOW * square <= tolerance * loss, value)
    if not active.unfinished:
        return start, 0, 0, 0
    output = target @ gram
    lossless = _LOSSLESS * 0.5 * (output * target).sum(-1)
    # Residuals below the rounding of the right-hand side carry no information.
    negligible = (_ROUNDING * output.mul_(keep)).square().sum(-1)
    active.finish((square <= negligible) | (loss <= lossless), value)
    direction = residual.clone()
    history = start.new_zeros(start.shape[0], WINDOW)
    iterations = row_iterations = 0
    while active.unfinished and iterations < max_iterations:
        value, residual, direction, keep, square, loss, history, negligible, lossless = active.pack(
            value, residual, direction, keep, square, loss, history, negligible, lossless
        )
        product = direction @ gram
        curvature = (direction * product).sum(-1)
        # Along a null direction of H̃ rounding decides the curvature: nothing is to be gained there.
        flat = curvature <= _ROUNDING * (direction * direction).sum(-1)
        alpha = torch.where(active.finished | flat, 0.0, square / curvature)
        value.addcmul_(alpha.unsqueeze(-1), direction)
        residual.addcmul_(alpha.unsqueeze(-1), product.mul_(keep), value=-1.0)
        decrease = 0.5 * alpha * square
        loss -= decrease
        history[:, iterations % WINDOW] = decrease
        previous, square = square, (residual * residual).sum(-1)
        recent = history.sum(-1) * (WINDOW / min(iterations + 1, WINDOW))
        converged = (square <= negligible) | (loss <= lossless) | (recent <= tolerance * loss)
        active.finish(flat | converged, value)
        beta = torch.where(active.finished, 0.0, square / previous)
        direction.mul_(beta.unsqueeze(-1)).add_(residual)
        iterations += 1
        row_iterations += len(active)
    return active.result(value), iterations, row_iterations, active.unfinished


def _never_worse(
    problem: Scaled, start: Tensor, solution: Tensor, given: Tensor, mask: Tensor, gram: Tensor
) -> tuple[Tensor, int]:
    """Return the solution as weights, rows that did not improve as given, and how many those are.

    The losses compared are those of the returned dtype, so that rounding and overflow count. Rows that are where they
    were at the ``start`` are as given too, and not counted.
    """
    given = apply_mask(given, mask)
    fitted = apply_mask(problem.restore(solution).to(given.dtype), mask)
    rows = some_rows((solution != start).any(-1))
    before = row_losses(given[rows], problem.original[rows], gram)
    after = row_losses(fitted[rows], problem.original[rows], gram)
    worse = ~(after <= before)
    given[rows] = torch.where(worse.unsqueeze(-1), given[rows], fitted[rows])
    return given, int(worse.sum())
