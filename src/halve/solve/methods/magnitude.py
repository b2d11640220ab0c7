"""Magnitude pruning: keep the largest weights of each group. Needs no data; the baseline of every comparison."""

from dataclasses import dataclass

from torch import Tensor

from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.outcome import Outcome, Status


@dataclass(frozen=True)
class MagnitudeOptions:
    """Magnitude pruning has no options."""


def solve(weight: Tensor, stats: Statistics | None, pattern: Pattern, options: MagnitudeOptions) -> Outcome:  # noqa: ARG001
    """Keep the largest ``|w|`` of each group, or of each row if ``pattern`` is unstructured; ties to the lowest index.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: not used.
        pattern: N:M or a percentage.
        options: none.

    Returns:
        Outcome: the kept weights bit for bit, the rest +0.0.
    """
    return Outcome(pattern.project(weight), Status.OK, "magnitude")
