"""SparseSwaps: exchange a kept and a pruned weight, one pair at a time (Zimmer et al. 2025, arXiv 2512.10922).

The weights keep their given values; what a swap changes in a row's loss follows from H and the row's residual alone.
"""

from dataclasses import dataclass

from torch import Tensor

from halve.checks import check_count
from halve.errors import PatternError, counted
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern, apply_mask
from halve.maths.quadratic import Scaled
from halve.solve.outcome import Outcome, Status
from halve.solve.plain_swaps import exchange


@dataclass(frozen=True)
class SparseSwapsOptions:
    """Options of SparseSwaps.

    Attributes:
        max_swaps: limit on the swaps of a row, >= 1.
    """

    max_swaps: int = 100

    def __post_init__(self) -> None:
        check_count("max_swaps of sparse-swaps", self.max_swaps)


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: SparseSwapsOptions) -> Outcome:
    """Start from Wanda's mask and make the best swap within a group of each row, again and again.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs.
        pattern: N:M.
        options: the limit on swaps.

    Returns:
        Outcome: the kept weights bit for bit, the rest +0.0; ``Status.MAX_ITER`` if rows still improved at the limit.
            Facts: ``iterations`` (most swaps of a row), ``swaps`` (of all rows together), ``unfinished_rows``.

    Raises:
        PatternError: the pattern is unstructured.
        CalibrationError: the Gram matrix is zero.
    """
    if not pattern.structured:
        raise PatternError(f"sparse-swaps prunes to N:M, not to {pattern}: choose 2:4, or wanda for {pattern}")
    problem = Scaled.of(weight, stats.gram)
    _, mask, done = exchange(
        pattern.project(problem.weight), problem.weight, problem.gram, pattern, limit=options.max_swaps, restore=True
    )
    facts = {"iterations": float(done.rounds), "swaps": float(done.total), "unfinished_rows": float(done.unfinished)}
    status, reason = Status.OK, ""
    if done.unfinished:
        status = Status.MAX_ITER
        reason = f"{counted(done.unfinished, 'row')} still improved after {counted(done.rounds, 'swap')}"
    return Outcome(apply_mask(weight, mask), status, "sparse-swaps", reason, facts)
