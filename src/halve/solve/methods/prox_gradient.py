"""Proximal gradient descent with a growing N:M regulariser (Kübler et al. 2025, arXiv 2501.18015, Algorithm 2).

    V ← prox_{λ/L}(V - (V - V0) H̃ / L),   λ ← β λ,   until every group is N:M

in the unit-diagonal variables of ``quadratic.Scaled``. Only the small difference ``V - V0`` is multiplied, so the
product may be taken in bfloat16 (`quadratic.Slope`).
"""

from dataclasses import dataclass

from torch import Tensor

from halve.checks import check_count, check_positive
from halve.errors import PatternError, counted
from halve.maths.active_rows import ActiveRows
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.maths.proximal import prox
from halve.maths.quadratic import Scaled, Slope, settle_dead_groups, spectral_bound
from halve.solve.outcome import Outcome, Status

CHECK_EVERY = 8
"""Iterations between two looks for finished rows; at β = 1.01, λ grows by 8 % in between."""
REPACK_SHARE = 0.1
"""Share of finished rows at which the others are packed together (`ActiveRows`)."""
_LARGEST_LAMBDA = 1e30


@dataclass(frozen=True)
class ProxGradientOptions:
    """Options of the proximal gradient method.

    Attributes:
        lambda0: first λ, > 0; dimensionless, for rows of mean magnitude 1 after scaling.
        beta: growth of λ an iteration, > 1; closer to 1 is slower and usually better.
        max_iterations: limit, >= 1; at the limit what is left is projected onto the pattern.
    """

    lambda0: float = 0.01
    beta: float = 1.01
    max_iterations: int = 5000

    def __post_init__(self) -> None:
        check_positive("lambda0 of prox-gradient", self.lambda0)
        check_positive("beta of prox-gradient", self.beta, above=1.0)
        check_count("max_iterations of prox-gradient", self.max_iterations)


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: ProxGradientOptions) -> Outcome:
    """Let a growing regulariser choose the mask while the loss keeps the weights consistent.

    A row that has reached the pattern keeps the weights it has and leaves the iteration, so that it costs nothing
    more; when it leaves depends on that row alone.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs.
        pattern: N:M.
        options: the schedule of λ and the iteration limit.

    Returns:
        Outcome: ``Status.MAX_ITER`` if rows had to be projected at the limit. Facts: ``iterations``,
            ``row_iterations`` (mean over rows), ``lipschitz`` (L), ``scale`` (of V, mean over rows), ``lambda``
            (the last one), ``projected_rows``.

    Raises:
        PatternError: the pattern is unstructured; the regulariser exists for N:M only.
        CalibrationError: the Gram matrix is zero.
    """
    if not pattern.structured:
        raise PatternError(
            f"prox-gradient prunes to N:M, not to {pattern}: choose 2:4, or sparsegpt or wanda for {pattern}"
        )
    problem = Scaled.of(weight, stats.gram)
    lipschitz = spectral_bound(problem.gram)
    start = settle_dead_groups(problem.weight, problem.dead, pattern)
    descent = _descend(problem.weight, start, problem.gram, lipschitz, pattern, options)
    solution, projected, status, reason = project_unfinished(descent.weight, pattern, descent.iterations)
    facts = {
        "iterations": float(descent.iterations),
        "row_iterations": descent.row_iterations / max(1, weight.shape[0]),
        "lipschitz": lipschitz,
        "scale": float(problem.scale.mean()),
        "lambda": descent.last_lambda,
        "projected_rows": float(projected),
    }
    return Outcome(problem.restore(solution), status, "prox-gradient", reason, facts)


def project_unfinished(weight: Tensor, pattern: Pattern, iterations: int) -> tuple[Tensor, int, Status, str]:
    """Bring ``weight`` (d_out, d_in) into the pattern after the iterations of a growing regulariser.

    Returns:
        tuple[Tensor, int, Status, str]: the weights, how many rows were not in the pattern yet, and the status and
        reason that this means.
    """
    rows = int(pattern.violating_groups(weight).any(-1).sum())
    status = Status.MAX_ITER if rows else Status.OK
    verb = "was" if rows == 1 else "were"
    after = counted(iterations, "iteration")
    reason = f"{counted(rows, 'row')} {verb} not {pattern} after {after} and {verb} projected" if rows else ""
    return pattern.project(weight), rows, status, reason


@dataclass(frozen=True)
class _Descent:
    weight: Tensor
    iterations: int
    row_iterations: int
    last_lambda: float


def _descend(
    target: Tensor, start: Tensor, gram: Tensor, lipschitz: float, pattern: Pattern, options: ProxGradientOptions
) -> _Descent:
    """Run the iteration on (d_out, d_in) float32 ``start`` towards ``target`` V0, rows leaving as they finish."""
    step = 1.0 / lipschitz
    slope = Slope(gram, -step)
    active = ActiveRows(start.clone(), REPACK_SHARE)
    current = start
    lam = options.lambda0
    iterations = row_iterations = 0
    while True:
        if iterations % CHECK_EVERY == 0 or iterations == options.max_iterations:
            active.finish(~pattern.violating_groups(current).any(-1), current)
            if not active.unfinished or iterations == options.max_iterations:
                return _Descent(active.result(current), iterations, row_iterations, lam)
            current, target = active.pack(current, target)
        if iterations:
            lam = min(lam * options.beta, _LARGEST_LAMBDA)
        current = prox(slope.step(current, target), lam * step, pattern)
        iterations += 1
        row_iterations += len(active)
