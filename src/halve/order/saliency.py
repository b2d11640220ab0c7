"""What the removal of a weight is taken to cost, where an order of channels is chosen."""

import torch
from torch import Tensor

from halve.maths.linalg import damped_cholesky, full_precision, lower_inverse

_DAMPING = 0.01
"""Share of the mean diagonal of H that is added before it is inverted."""


def saliencies(weight: Tensor, gram: Tensor) -> Tensor:
    """Return ``w² √(H_jj / [H⁻¹]_jj)`` for every weight, divided by the largest.

    It is the geometric mean of two costs: of removing a weight while all others stay as they are, ``w² H_jj`` (Wanda),
    and while all others make the best of it, ``w² / [H⁻¹]_jj`` (optimal brain surgeon). The solvers come out between
    the two, since half of the others are removed as well.

    Args:
        weight: (d_out, d_in) float32, finite.
        gram: (d_in, d_in) float32, H of its inputs.

    Returns:
        Tensor: (d_out, d_in) float32, between 0 and 1.

    Raises:
        FactorisationError: H is zero, or cannot be factorised.
    """
    with full_precision():
        lower = damped_cholesky(gram, _DAMPING).lower
        inverse = lower_inverse(lower).square_().sum(0)  # diagonal of H⁻¹ = L⁻ᵀ L⁻¹
    scales = (gram.diagonal().to(inverse.dtype).clamp_min(0.0) / inverse).sqrt()
    scales = (scales / scales.max()).float()
    largest = weight.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    found = (weight / largest).square_().mul_(scales)
    return found.div_(found.max().clamp_min(torch.finfo(torch.float32).tiny))


def by_unit(saliency: Tensor, units: int, repeats: int, taps: int = 1) -> Tensor:
    """Lay the columns of a matrix out by the units that its channels belong to.

    Args:
        saliency: (d_out, d_in), of which the inputs are units of ``repeats`` heads each, at every tap.
        units: number of units.
        repeats: heads that have one unit's order.
        taps: of a convolution's kernel: so many runs of channels, in one order, make up the inputs.

    Returns:
        Tensor: (units, width, repeats · taps · d_out), contiguous: the saliencies of channel i of every head of a unit.
    """
    d_out, d_in = saliency.shape
    heads = saliency.T.reshape(taps, units, repeats, d_in // (taps * units * repeats), d_out)
    return heads.permute(1, 3, 2, 0, 4).flatten(2)
