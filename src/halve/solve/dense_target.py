"""Targets that see the error so far: weights that would give the dense model's outputs from the pruned model's inputs.

A matrix in a half-pruned model receives X̃ where it received X in the dense model. Instead of ``‖(W - W0) X̃‖²`` one may
ask for outputs between those of the dense weights on either stream,

    minimise ‖W X̃ - (1 - α) W0 X̃ - α W0 X‖² + r ‖(W - W0) D‖²,   D² = diag(X̃X̃ᵀ)

Without a pattern the minimiser is ``W_t = W0 + α W0 (C - H)(H + r D²)⁻¹`` with ``C = X X̃ᵀ`` and ``H = X̃X̃ᵀ`` (both
divided by the tokens, features along the first dimension here), and with one the problem is that of pruning ``W_t``
instead of ``W0``, under H + r D². The ridge serves to bound W_t only: what prunes it takes H as ever. So every method
and refit can be had with such a target.
"""

import torch
from torch import Tensor

from halve.errors import FactorisationError
from halve.maths.gram import Statistics
from halve.maths.linalg import damped_cholesky, full_precision, is_finite
from halve.maths.quadratic import feature_scales


def dense_target(weight: Tensor, stats: Statistics, blend: float, ridge: float) -> Tensor:
    """Return ``W_t``, what to prune instead of ``weight``.

    Args:
        weight: (d_out, d_in), W0, any float dtype.
        stats: of the layer's inputs, with ``cross``.
        blend: α in [0, 1]; 0 returns ``weight`` itself.
        ridge: r > 0, in units of the features' mean squares; large values stay with W0.

    Returns:
        Tensor: (d_out, d_in), the dtype of ``weight``.

    Raises:
        FactorisationError: the ridged Gram matrix could not be factorised.
        CalibrationError: the Gram matrix is zero.
    """
    if blend == 0.0 or stats.cross is None:
        return weight
    scales = feature_scales(stats.gram)
    with full_precision():
        unit = stats.gram / scales / scales.unsqueeze(-1)
        factor = damped_cholesky(unit, ridge)
        lower = factor.lower.float()
        pull = (weight.float() @ (stats.cross - stats.gram)) / scales
        moved = torch.cholesky_solve(pull.mT, lower).mT / scales
    target = (weight.float() + blend * moved).to(weight.dtype)
    if not is_finite(target):
        raise FactorisationError(f"the target from the dense model's outputs is not finite with ridge {ridge:g}")
    return target
