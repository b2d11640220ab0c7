"""The layer objective: its value, gradient, scaling to unit diagonal, and a bound on its curvature.

L(W) = ½ tr[(W - W0) H (W - W0)ᵀ],   H = XᵀX / tokens,   rows of W independent given H.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.device import compute_dtype
from halve.errors import CalibrationError
from halve.maths.linalg import in_parts
from halve.maths.pattern import Pattern

DEAD_SHARE = 1e-10
"""Features whose mean square is at most this share of the average one count as dead."""
_NARROW_FROM = 256
"""Smallest d_in for which products leave float32: below, they are not what takes the time."""


def row_losses(weight: Tensor, original: Tensor, gram: Tensor) -> Tensor:
    """Return ``½ (w - w0) H (w - w0)ᵀ`` of every row.

    Args:
        weight: (d_out, d_in).
        original: (d_out, d_in), W0.
        gram: (d_in, d_in) float32, H.

    Returns:
        Tensor: (d_out,) float64, never negative; non-finite rows of ``weight`` give non-finite losses.
    """
    parts = zip(in_parts(weight), in_parts(original), strict=True)
    return 0.5 * torch.cat([_quadratic_forms(one.float() - other.float(), gram) for one, other in parts])


def relative_loss(weight: Tensor, original: Tensor, gram: Tensor) -> float:
    """Return ``tr[(W - W0) H (W - W0)ᵀ] / tr[W0 H W0ᵀ]``: 0 is lossless, 1 means the layer's output is gone.

    Args:
        weight: (d_out, d_in).
        original: (d_out, d_in), W0.
        gram: (d_in, d_in) float32, H; the result does not depend on its scale.

    Returns:
        float: the ratio; 0 / 0 is 0.
    """
    lost = _quadratic_forms(weight.float() - original.float(), gram).sum()
    return float(ratio(lost, _quadratic_forms(original.float(), gram).sum()))


def feature_scales(gram: Tensor) -> Tensor:
    """Return ``d_j = sqrt(max(H_jj, 1e-10 · mean(diag H)))``, the root mean square of every input feature.

    The floor keeps dead features (H_jj = 0) in play: they lose every contest against live ones, are never divided by
    zero, and among themselves the larger weight wins.

    Args:
        gram: (d_in, d_in) float32, H.

    Returns:
        Tensor: (d_in,) float32, positive.

    Raises:
        CalibrationError: no feature is live, the Gram matrix says nothing.
    """
    return diagonal_scales(gram.diagonal())


def diagonal_scales(diagonal: Tensor) -> Tensor:
    """Return what `feature_scales` does, given the diagonal of H alone, (d_in,) of any float dtype."""
    diagonal = diagonal.double()
    mean = diagonal.mean()
    if not float(mean) > 0.0:
        raise CalibrationError("the Gram matrix is zero: no calibration input reached this layer")
    return diagonal.clamp_min(DEAD_SHARE * mean).sqrt().float()


def dead_features(gram: Tensor) -> Tensor:
    """Mark the features with ``H_jj <= 1e-10 · mean(diag H)``: (d_in,) bool."""
    diagonal = gram.diagonal().double()
    return diagonal <= DEAD_SHARE * diagonal.mean()


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """The layer problem with unit diagonal: ``V = diag(1/c) W diag(d)``, ``H̃ = diag(d)⁻¹ H diag(d)⁻¹``.

    A row's loss in these variables is the layer's divided by its ``c²``; every row has a scale of its own, so that rows
    stay independent of one another. Magnitude pruning of V is Wanda.

    Attributes:
        original: (d_out, d_in), W0 as given.
        weight: (d_out, d_in) float32, V0, each row of mean magnitude 1.
        gram: (d_in, d_in) float32, H̃; diagonal 1, smaller for dead features only.
        features: (d_in,) float32, d.
        dead: (d_in,) bool.
        scale: (d_out, 1) float32, c, each row's mean of ``|W0 diag(d)|``, what makes λ dimensionless; 1 for zero rows.
    """

    original: Tensor
    weight: Tensor
    gram: Tensor
    features: Tensor
    dead: Tensor
    scale: Tensor

    @classmethod
    def of(cls, original: Tensor, gram: Tensor) -> "Scaled":
        """Scale the problem of ``original`` (d_out, d_in) and ``gram`` (d_in, d_in) float32.

        Args:
            original: W0.
            gram: H.

        Returns:
            Scaled: the problem in unit-diagonal variables.

        Raises:
            CalibrationError: the Gram matrix is zero.
        """
        features = feature_scales(gram)
        weight = original.float() * features
        scale = weight.abs().mean(-1, keepdim=True)
        scale = torch.where(scale > 0.0, scale, 1.0)
        weight /= scale
        unit = gram / features
        unit /= features.unsqueeze(-1)
        return cls(
            original=original, weight=weight, gram=unit, features=features, dead=dead_features(gram), scale=scale
        )

    def apply(self, weight: Tensor) -> Tensor:
        """Return ``weight`` (d_out, d_in) in the scaled variables, float32."""
        return (weight.float() * self.features).div_(self.scale)

    def restore(self, scaled: Tensor) -> Tensor:
        """Return ``scaled`` (d_out, d_in) as weights, in the dtype of the original; zeros are +0.0.

        No loss depends on a dead feature, so its non-zero weights come back exactly as they were in W0.
        """
        weight = (scaled * self.scale).div_(self.features).to(self.original.dtype)
        weight = torch.where(self.dead & (scaled != 0), self.original, weight)
        return weight.add_(0.0)


def product_dtype(gram: Tensor) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it faster than float32 and ``gram`` is large enough to notice.

    For products of a difference from the dense weights only: rounding then is relative to that difference.
    """
    return compute_dtype(gram.device) if gram.shape[0] >= _NARROW_FROM else torch.float32


def settle_dead_groups(weight: Tensor, dead: Tensor, pattern: Pattern) -> Tensor:
    """Project the groups whose features are all ``dead``, which would otherwise keep an iteration going for nothing."""
    dead_groups = pattern.groups(dead).all(-1, keepdim=True).expand_as(pattern.groups(dead)).reshape(dead.shape)
    return torch.where(dead_groups, pattern.project(weight), weight)


class Slope:
    """Steps along the gradient ``(V - V0) H̃``, its product taken in bfloat16 where the hardware multiplies that faster.

    Rounding there is relative to the difference from V0, not to V: each step's gradient is off by some 0.4 %, and the
    losses that the iterations reach agree with float32's to a few parts in ten thousand.

    Args:
        gram: (d_in, d_in) float32, H̃.
        factor: what the gradient is multiplied by, negative to descend.
    """

    def __init__(self, gram: Tensor, factor: float) -> None:
        self.dtype = product_dtype(gram)
        self._product = (gram * factor).to(self.dtype)

    def step(self, weight: Tensor, target: Tensor) -> Tensor:
        """Return ``weight + factor (weight - target) H̃``, all (d_out, d_in) float32."""
        return weight + (weight - target).to(self.dtype) @ self._product


def spectral_bound(gram: Tensor, *, columns: int = 8, powers: int = 8) -> float:
    """Return an upper bound on the largest eigenvalue, typically within 1 % of it.

    A block Krylov subspace from a fixed random start gives an estimate from below. It is raised until a Cholesky
    factorisation of ``bound · I - H`` proves it an upper bound, which costs less than one iteration of the solvers
    that need it.

    Args:
        gram: (d, d) float32, symmetric, positive semi-definite, entries of moderate size such as those of ``Scaled``.
        columns: width of the Krylov block.
        powers: number of products with H.

    Returns:
        float: a step size of ``1 / bound`` is safe; at least 0.
    """
    d = gram.shape[0]
    columns = min(columns, d)
    start = torch.randn(d, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(gram.device)
    block = torch.linalg.qr(start).Q
    blocks = [block]
    while len(blocks) < min(powers, math.ceil(d / columns)):
        block = torch.linalg.qr(gram @ block).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    ritz = torch.linalg.eigvalsh((basis.mT @ (gram @ basis)).double())
    estimate = float(ritz[-1])
    # Gershgorin, the other safe bound: no use in going beyond it.
    largest = float(gram.abs().sum(-1).max())
    rounding: float = 1.0 + d * torch.finfo(gram.dtype).eps
    for gap in (2e-3, 4e-3, 8e-3, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512):
        bound = estimate * (1.0 + gap)
        if bound >= largest:
            break
        shifted = -gram
        shifted.diagonal().add_(bound)
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return bound * rounding
    return largest * rounding


def _quadratic_forms(difference: Tensor, gram: Tensor) -> Tensor:
    """Return ``x H xᵀ`` of every row x of ``difference`` (rows, d) float32 as (rows,) float64, at least 0."""
    # The scale of H goes into both factors, so that neither 1e30 nor 1e-30 leaves the range of float32.
    peak = float(gram.diagonal().amax())
    if not peak > 0.0:
        return torch.zeros(difference.shape[0], dtype=torch.float64, device=difference.device)
    root = math.sqrt(peak)
    scaled = difference / root
    forms = ((scaled @ gram) / root * difference).sum(-1, dtype=torch.float64)
    return (forms * peak).clamp_min(0.0)


def ratio(lost: Tensor, total: Tensor) -> Tensor:
    """Return a loss as a share of what there is to lose, with 0 / 0 = 0."""
    return torch.where(lost == 0.0, lost, lost / total)
