"""ADMM with the exact proximal operator of a growing N:M regulariser: Halve's own solver.

In the unit-diagonal variables of ``quadratic.Scaled``, with V0 the dense weights and U the scaled dual variable,

    V ← argmin ½ tr[(V - V0) H̃ (V - V0)ᵀ] + ρ/2 |V - (Z - U)|²
    Z ← prox_{λ/ρ}(V + U),   U ← V + U - Z,   λ ← growth · λ,   ρ from time to time larger,   until Z is N:M

It is the objective of the paper's proximal gradient (Kübler et al. 2025, arXiv 2501.18015) in a better optimiser: the
loss is minimised exactly in every step instead of by 1/L of its gradient, so λ may grow ten times as fast. Both λ and
ρ follow a fixed schedule, which keeps the rows independent of one another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.checks import check_count, check_positive, is_number
from halve.errors import InputError, PatternError
from halve.maths.active_rows import ActiveRows
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.maths.proximal import prox
from halve.maths.quadratic import Scaled, product_dtype, settle_dead_groups
from halve.maths.resolvent import Resolvent
from halve.solve.methods.prox_gradient import project_unfinished
from halve.solve.outcome import Outcome
from halve.solve.plain_swaps import exchange

RHO_EVERY = 5
"""Iterations between two values of ρ, each of which costs a factorisation."""
CHECK_EVERY = 4
"""Iterations between two looks for finished rows."""
REPACK_SHARE = 0.1
"""Share of finished rows at which the others are packed together (`ActiveRows`)."""
_LARGEST = 1e12


@dataclass(frozen=True)
class ProxADMMOptions:
    """Options of prox-admm.

    Attributes:
        lambda0: first λ, > 0; dimensionless, for rows of mean magnitude 1 after scaling.
        lambda_growth: factor of λ an iteration, > 1; closer to 1 is slower and a little better.
        rho: first ρ, > 0, in units of the features' mean square after scaling, which is 1.
        rho_growth: factor of ρ every five iterations, >= 1 and less than ``lambda_growth**5``, for the strength of the
            proximal operator is λ/ρ.
        exchanges: whether plain exchanges follow (`halve.solve.plain_swaps`): where features hardly correlate, a small
            ρ may leave a mask that they improve.
        max_iterations: limit, >= 1; at the limit what is left is projected onto the pattern.
    """

    lambda0: float = 0.01
    lambda_growth: float = 1.1
    rho: float = 0.1
    rho_growth: float = 1.2
    exchanges: bool = True
    max_iterations: int = 2000

    def __post_init__(self) -> None:
        check_positive("lambda0 of prox-admm", self.lambda0)
        check_positive("lambda_growth of prox-admm", self.lambda_growth, above=1.0)
        check_positive("rho of prox-admm", self.rho)
        most = self.lambda_growth**RHO_EVERY
        if not is_number(self.rho_growth) or not 1.0 <= self.rho_growth < most:
            raise InputError(
                f"rho_growth of prox-admm must be at least 1 and less than lambda_growth**{RHO_EVERY} = {most:g}, "
                f"got {self.rho_growth!r}"
            )
        if not isinstance(self.exchanges, bool):
            raise InputError(f"exchanges of prox-admm must be true or false, got {self.exchanges!r}")
        check_count("max_iterations of prox-admm", self.max_iterations)


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: ProxADMMOptions) -> Outcome:
    """Let a growing regulariser choose the mask while every step solves the layer's problem exactly.

    A row leaves the iteration once its sparse copy has had the pattern, and the same mask, at two looks in a row:
    a mask that has only just reached the pattern still improves, by 4 to 7 % of the loss.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs.
        pattern: N:M.
        options: the schedules of λ and ρ, and the iteration limit.

    Returns:
        Outcome: ``Status.MAX_ITER`` if rows had to be projected at the limit. Facts: ``iterations``,
            ``row_iterations`` (mean over rows), ``rho`` and ``lambda`` (the last ones), ``scale`` (of V, mean over
            rows), ``projected_rows``, ``exchanges`` (their number).

    Raises:
        PatternError: the pattern is unstructured; the regulariser exists for N:M only.
        CalibrationError: the Gram matrix is zero.
        FactorisationError: the Gram matrix with ρ added is not positive definite.
    """
    if not pattern.structured:
        raise PatternError(f"prox-admm prunes to N:M, not to {pattern}: choose 2:4, or alps or sparsegpt for {pattern}")
    problem = Scaled.of(weight, stats.gram)
    start = settle_dead_groups(problem.weight, problem.dead, pattern)
    iteration = _Iteration(problem.weight, start, Resolvent(problem.gram, product_dtype(problem.gram)), pattern)
    rho, lam = options.rho, options.lambda0
    while not iteration.finished and iteration.count < options.max_iterations:
        if iteration.count:
            lam = min(lam * options.lambda_growth, _LARGEST)
            if iteration.count % RHO_EVERY == 0 and rho < _LARGEST:
                rho *= options.rho_growth
                iteration.rescale_dual(1.0 / options.rho_growth)
        iteration.step(rho, lam)
    sparse, projected, status, reason = project_unfinished(iteration.result(), pattern, iteration.count)
    facts = {
        "iterations": float(iteration.count),
        "row_iterations": iteration.row_iterations / max(1, weight.shape[0]),
        "rho": rho,
        "lambda": lam,
        "scale": float(problem.scale.mean()),
        "projected_rows": float(projected),
    }
    if iteration.count and options.exchanges:
        limit = sparse.shape[1]
        sparse, _, done = exchange(sparse, problem.weight, problem.gram, pattern, limit=limit, restore=False)
        facts["exchanges"] = float(done.total)
    return Outcome(problem.restore(sparse), status, "prox-admm", reason, facts)


class _Iteration:
    """The variables of the rows still under way; all are (rows, d_in) float32.

    In place of the dual variable stands ``Q = V0 + U``, with which ``V + U`` is ``Q + (Z - Q) R``, one product
    (`Resolvent`).
    """

    def __init__(self, target: Tensor, start: Tensor, resolvent: Resolvent, pattern: Pattern) -> None:
        self.count = 0
        self.row_iterations = 0
        self._resolvent = resolvent
        self._pattern = pattern
        self._active = ActiveRows(start.clone(), REPACK_SHARE)
        self._target = target
        self._sparse = start
        self._offset = target.clone()
        self._support = start != 0
        self._retire()

    @property
    def finished(self) -> bool:
        return not self._active.unfinished

    def rescale_dual(self, factor: float) -> None:
        """Keep ``ρ U`` when ρ changes."""
        self._offset = torch.lerp(self._target, self._offset, factor)

    def step(self, rho: float, lam: float) -> None:
        moved = self._resolvent.move(self._offset, self._sparse - self._offset, rho)
        self._sparse = prox(moved, lam / rho, self._pattern)
        self._offset = moved.sub_(self._sparse).add_(self._target)
        self.count += 1
        self.row_iterations += len(self._active)
        if self.count % CHECK_EVERY == 0:
            self._retire()

    def result(self) -> Tensor:
        """Return the sparse copies, those of unfinished rows as they are."""
        return self._active.result(self._sparse)

    def _retire(self) -> None:
        """Note the rows whose mask has the pattern and has not changed, and pack the others once that pays."""
        support = self._sparse != 0
        reached = ~self._pattern.violating_groups(self._sparse).any(-1)
        same = (support == self._support).all(-1)
        self._active.finish(reached & same, self._sparse)
        self._support, self._target, self._sparse, self._offset = self._active.pack(
            support, self._target, self._sparse, self._offset
        )
