"""RIA: relative importance and activations (Zhang et al. 2024, arXiv 2402.13485), without its channel permutation."""

from dataclasses import dataclass

from torch import Tensor

from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern, apply_mask
from halve.maths.quadratic import feature_scales
from halve.solve.outcome import Outcome, Status


@dataclass(frozen=True)
class RIAOptions:
    """RIA has no options."""


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: RIAOptions) -> Outcome:  # noqa: ARG001
    """Keep the largest ``(|w_ij| / Σ_i |w_ij| + |w_ij| / Σ_j |w_ij|) (H_jj)^¼`` of each group or row.

    Args:
        weight: (d_out, d_in), any float dtype; the whole matrix, for the sums run over rows and columns.
        stats: of the layer's inputs; only the diagonal of the Gram matrix is used.
        pattern: N:M or a percentage.
        options: none.

    Returns:
        Outcome: the kept weights bit for bit, the rest +0.0.

    Raises:
        CalibrationError: the Gram matrix is zero.
    """
    magnitudes = weight.float().abs()
    tiny = magnitudes.new_tensor(1e-30)  # an empty row or column has nothing to rank
    relative = magnitudes / magnitudes.sum(0).maximum(tiny) + magnitudes / magnitudes.sum(1, keepdim=True).maximum(tiny)
    mask = pattern.keep_mask(relative * feature_scales(stats.gram).sqrt())
    return Outcome(apply_mask(weight, mask), Status.OK, "ria")
