"""Pruner-Zero: the score that a search over formulas has found best (Dong et al. 2024, arXiv 2406.02924)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern, apply_mask
from halve.maths.quadratic import DEAD_SHARE
from halve.solve.gradient_scores import gradient_of
from halve.solve.outcome import Outcome, Status


@dataclass(frozen=True)
class PrunerZeroOptions:
    """Pruner-Zero has no options."""


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: PrunerZeroOptions) -> Outcome:  # noqa: ARG001
    """Keep the largest ``w² (G - min G) / (max G - min G)`` of each group, or of each row where there are none.

    The share is 1e-10 at least, so that among weights whose gradient is the least (those of dead features, whose
    gradients are all zero) the larger one wins.

    Args:
        weight: (d_out, d_in), any float dtype; the whole matrix, for the extremes run over all of it.
        stats: with the gradient of the loss, G = √Σ g²; the Gram matrix is not used.
        pattern: N:M or a percentage.
        options: none.

    Returns:
        Outcome: the kept weights bit for bit, the rest +0.0.

    Raises:
        CalibrationError: the gradient is zero.
    """
    root = gradient_of(stats).root
    least, most = torch.aminmax(root)
    # Where all are alike, which is 0 / 0 as published, nothing but the weights is left to go by.
    share = ((root - least) / (most - least)).clamp_min(DEAD_SHARE) if most > least else torch.ones_like(root)
    return Outcome(apply_mask(weight, pattern.keep_mask(weight.float().square() * share)), Status.OK, "pruner-zero")
