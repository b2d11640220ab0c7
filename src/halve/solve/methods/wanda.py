"""Wanda: keep the largest products of weight and input scale (Sun et al. 2024, arXiv 2306.11695).

If the Gram matrix is diagonal, no mask is better.
"""

from dataclasses import dataclass

from torch import Tensor

from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern, apply_mask
from halve.maths.quadratic import feature_scales
from halve.solve.outcome import Outcome, Status


@dataclass(frozen=True)
class WandaOptions:
    """Wanda has no options."""


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: WandaOptions) -> Outcome:  # noqa: ARG001
    """Keep the largest ``|w_j| sqrt(H_jj)`` of each group, or of each row if ``pattern`` is unstructured.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs; only the diagonal of the Gram matrix is used. Dead features get the floor of
            ``quadratic.feature_scales``, so that among them the larger weight is kept.
        pattern: N:M or a percentage.
        options: none.

    Returns:
        Outcome: the kept weights bit for bit, the rest +0.0.

    Raises:
        CalibrationError: the Gram matrix is zero.
    """
    mask = pattern.keep_mask(weight.float().abs() * feature_scales(stats.gram))
    return Outcome(apply_mask(weight, mask), Status.OK, "wanda")
