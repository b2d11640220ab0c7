"""ALPS: ADMM with a projection onto the pattern and a growing penalty (Meng et al. 2024, arXiv 2406.07831).

In unit-diagonal variables, with V0 the dense weights,

    V ← argmin ½ tr[(V - V0) H̃ (V - V0)ᵀ] + ρ/2 |V - D + Y/ρ|²,   D ← projection of V + Y/ρ,   Y ← Y + ρ (V - D)

and ρ grows by how much the support of D still changes. The paper then takes ten steps of preconditioned conjugate
gradients on the support; here that is the refit's part (``cg`` goes on until it has converged).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.checks import check_count, check_positive
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.maths.quadratic import Scaled, dead_features
from halve.maths.resolvent import Resolvent
from halve.solve.outcome import Outcome, Status

_UPDATE_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Factors of ρ for a share of changed entries above each bound."""
_STARTS_AT = 0.005
"""Share of changed entries from which ρ counts as large enough to begin with."""
_RETREAT = 5.0
_SETTLED, _SETTLED_FROM = 3e-4, 30
_RHO_RANGE = (1e-6, 1e6)


@dataclass(frozen=True)
class ALPSOptions:
    """Options of ALPS; the defaults are those of the published code.

    Attributes:
        rho: first penalty, > 0.
        damping: what is added to the diagonal of H, as a fraction of its mean, > 0.
        max_iterations: limit on the iterations, >= 1.
    """

    rho: float = 0.1
    damping: float = 0.01
    max_iterations: int = 300

    def __post_init__(self) -> None:
        check_positive("rho of alps", self.rho)
        check_positive("damping of alps", self.damping)
        check_count("max_iterations of alps", self.max_iterations)


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: ALPSOptions) -> Outcome:
    """Split the weights into a dense and a sparse copy and force them together.

    Rows share ρ, so the result of one depends, a little, on the others.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs.
        pattern: N:M or a percentage.
        options: the first ρ, the damping and the iteration limit.

    Returns:
        Outcome: ``Status.MAX_ITER`` if the support still changed at the limit. Facts: ``iterations``, ``rho`` (the
            last), ``damping``.

    Raises:
        CalibrationError: the Gram matrix is zero.
        FactorisationError: the damped Gram matrix is not positive definite.
    """
    damped = stats.gram.clone()  # dead features stay dead, and lose every contest
    damped.diagonal()[~dead_features(stats.gram)] += options.damping * stats.gram.diagonal().mean()
    problem = Scaled.of(weight, damped)
    resolvent = Resolvent(problem.gram)
    target = problem.weight
    sparse = first = pattern.project(target)
    dual = torch.zeros_like(target)
    dense = target
    support = sparse != 0
    kept = max(1, int(support.sum()))
    rho, started, settled = options.rho, False, False
    iteration = 0
    while iteration < options.max_iterations and not settled:
        iteration += 1
        dense = resolvent.solve(target, sparse - dual / rho, rho)
        moved = dense + dual / rho
        sparse = pattern.project(moved)
        dual = rho * (moved - sparse)
        if iteration % _UPDATE_EVERY:
            continue
        changed = int((support != (sparse != 0)).sum())
        support = sparse != 0
        share = changed / kept
        settled = (started and not changed) or (iteration > _SETTLED_FROM and share < _SETTLED)
        if started or share > _STARTS_AT:
            started = True
            rho *= next((factor for bound, factor in _GROWTH if share > bound), 1.0)
        else:
            rho /= _RETREAT
            if changed:
                dense, sparse, dual = target, first, torch.zeros_like(target)
        rho = min(max(rho, _RHO_RANGE[0]), _RHO_RANGE[1])
    facts = {"iterations": float(iteration), "rho": rho, "damping": options.damping}
    status = Status.OK if settled else Status.MAX_ITER
    reason = "" if settled else f"the mask still changed after {iteration} iterations"
    return Outcome(problem.restore(pattern.project(dense)), status, "alps", reason, facts)
