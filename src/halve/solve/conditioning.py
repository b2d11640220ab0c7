"""A matrix and its statistics, checked, and brought into the range where float32 neither overflows nor vanishes."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from halve.checks import check_count
from halve.errors import InputError
from halve.maths.gram import Gradient, Statistics
from halve.maths.linalg import in_parts, is_finite

_ASYMMETRY = 1e-4
"""Largest |H - Hᵀ| accepted, as a share of the largest diagonal entry."""
_LEAST_SLACK = 1e-3
"""How far below 0 an eigenvalue of H, scaled to unit diagonal, may come by rounding, whatever its width."""
_WEIGHT_EXPONENT = 32
"""Weights whose largest lies within 2 to this power, up or down, are solved for as they are."""
_GRAM_EXPONENT = 64
"""The same for the largest diagonal entry of H."""


def check_weight(weight: Tensor) -> None:
    """Refuse what is not a finite, non-empty floating point matrix.

    Raises:
        InputError: what it is instead, or where the first NaN or infinity is.
    """
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        got = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"weight must be a non-empty floating point tensor of shape (d_out, d_in), got {got}")
    if not is_finite(weight):
        row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise InputError(f"weight has NaN or infinity, first at row {row}, column {column}: prune a finite matrix")


def checked_statistics(
    gram: Tensor | Statistics, weight: Tensor, tokens: int | None, *, rescale: bool = True
) -> Statistics:
    """Return a Gram matrix as float32 statistics.

    Args:
        gram: (d_in, d_in), or statistics, whose matrix is trusted to be positive semi-definite: to see that of a plain
            one takes a factorisation.
        weight: (d_out, d_in), what they belong to.
        tokens: number of inputs behind ``gram``; None takes that of the statistics, if they are given, and else it is
            unknown, 0.
        rescale: whether the scale of a plain matrix does not matter, so that one out of float32's range is scaled.

    Raises:
        InputError: the matrix has another shape, dtype or device, is not finite in float32, or no Gram matrix.
    """
    if tokens is not None:
        check_count("tokens", tokens)
    given = gram if isinstance(gram, Statistics) else None
    if isinstance(gram, Statistics):
        tokens = gram.tokens if tokens is None else tokens
        for half in gram.halves or ():
            _check_square("a half of gram", half, weight)
        if gram.cross is not None:
            _check_square("cross", gram.cross, weight)
        gram = gram.gram
    _check_square("gram", gram, weight)
    exponent = _exponent(gram.diagonal().amax(), _GRAM_EXPONENT) if given is None and rescale else 0
    gram32 = times_power_of_two(gram.detach(), exponent).float()
    if not is_finite(gram32):
        raise InputError("gram has NaN or infinity in float32: calibrate again, or divide it by the number of tokens")
    diagonal = gram32.diagonal()
    if bool((diagonal < 0.0).any()):
        feature = int((diagonal < 0.0).to(torch.uint8).argmax())
        raise InputError(f"gram has a negative diagonal entry at feature {feature}: it must be XᵀX / tokens")
    mirrored = zip(in_parts(gram32), in_parts(gram32.mT), strict=True)
    asymmetry = max(float((rows - columns).abs().amax()) for rows, columns in mirrored)
    peak = float(diagonal.amax())
    if asymmetry > _ASYMMETRY * peak:
        raise InputError(f"gram is not symmetric (largest difference {asymmetry:.3g}): it must be XᵀX / tokens")
    if given is not None:
        return replace(given, gram=gram32, tokens=tokens or 0)
    if not _semidefinite(gram32, max(torch.finfo(gram.dtype).eps, torch.finfo(torch.float32).eps)):
        raise InputError("gram is not positive semi-definite: it must be XᵀX / tokens, of one and the same X")
    return Statistics(gram32, tokens or 0)


def checked_gradient(gradient: Gradient, weight: Tensor, name: str) -> Gradient:
    """Return the gradient of a matrix in float32.

    Args:
        gradient: of what was computed.
        weight: (d_out, d_in), what it belongs to.
        name: of the method that needs it.

    Raises:
        InputError: it is something else, or has another shape or device, a negative or a non-finite entry.
    """
    if not isinstance(gradient, Gradient):
        raise InputError(f"method {name} takes its gradient as halve.Gradient, got {type(gradient).__name__}")
    check_count("samples of the gradient", gradient.samples)
    for part, tensor in (("root", gradient.root), ("tuned", gradient.tuned)):
        if tensor is None and part == "tuned":
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != weight.shape or not tensor.is_floating_point():
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            shape = tuple(weight.shape)
            raise InputError(f"{part} of the gradient must be floating point of shape {shape} as weight, got {got}")
        if tensor.device != weight.device:
            raise InputError(
                f"{part} of the gradient is on {tensor.device} and weight on {weight.device}: move one of them"
            )
        if not is_finite(tensor.float()):
            raise InputError(f"{part} of the gradient has NaN or infinity in float32: calibrate again")
    if bool((gradient.root < 0.0).any()):
        raise InputError("root of the gradient has a negative entry: it must be the root of a sum of squares")
    tuned = None if gradient.tuned is None else gradient.tuned.detach().float()
    return replace(gradient, root=gradient.root.detach().float(), tuned=tuned)


def _check_square(name: str, matrix: object, weight: Tensor) -> None:
    d_in = weight.shape[1]
    if not isinstance(matrix, Tensor) or tuple(matrix.shape) != (d_in, d_in) or not matrix.is_floating_point():
        got = f"{matrix.dtype} of shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise InputError(f"{name} must be floating point of shape ({d_in}, {d_in}) to match weight, got {got}")
    if matrix.device != weight.device:
        raise InputError(f"{name} is on {matrix.device} and weight on {weight.device}: move one of them")
    if not is_finite(matrix):
        raise InputError(f"{name} has NaN or infinity: calibrate again")


def _semidefinite(gram: Tensor, epsilon: float) -> bool:
    """Whether H, scaled to unit diagonal, has no eigenvalue below 0 by more than entries rounded by ``epsilon`` may."""
    diagonal = gram.diagonal().double()
    if not bool((diagonal > 0.0).any()):
        return not bool(gram.any())
    features = diagonal.clamp_min(epsilon * diagonal.mean()).sqrt().float()
    shifted = gram / features
    shifted /= features.unsqueeze(-1)
    shifted.diagonal().add_(max(_LEAST_SLACK, 4.0 * len(gram) * epsilon))
    return is_finite(shifted) and int(torch.linalg.cholesky_ex(shifted).info) == 0


def into_range(weight: Tensor, stats: Statistics | None) -> tuple[Tensor, Statistics | None, int]:
    """Scale a layer's problem by powers of two, which is exact, where its squares would leave float32's range.

    Neither the best mask nor the relative loss depends on the scale of W or of H.

    Args:
        weight: (d_out, d_in), any float dtype, finite.
        stats: of its inputs, or None.

    Returns:
        tuple[Tensor, Statistics | None, int]: both as they are to be solved for, and the power of two that the weights
        were multiplied by. Weights some 2¹²⁶ times smaller than the largest become zero if the power is not 0.
    """
    exponent = _exponent(torch.stack([rows.abs().amax() for rows in in_parts(weight)]).amax(), _WEIGHT_EXPONENT)
    weight = times_power_of_two(weight, exponent)
    gradient = None if stats is None else stats.gradient
    if stats is not None and gradient is not None and gradient.tuned is not None:
        stats = replace(stats, gradient=replace(gradient, tuned=times_power_of_two(gradient.tuned, exponent)))
    if stats is not None and (of_gram := _exponent(stats.gram.diagonal().amax(), _GRAM_EXPONENT)):
        halves, cross = stats.halves, stats.cross
        if halves is not None:
            halves = (times_power_of_two(halves[0], of_gram), times_power_of_two(halves[1], of_gram))
        if cross is not None:
            cross = times_power_of_two(cross, of_gram)
        gradient = stats.gradient
        if gradient is not None:  # it is weighed against the roots of H's diagonal
            gradient = replace(gradient, root=gradient.root * 2.0 ** (of_gram / 2))
        gram = times_power_of_two(stats.gram, of_gram)
        stats = replace(stats, gram=gram, halves=halves, cross=cross, gradient=gradient)
    return weight, stats, exponent


def times_power_of_two(tensor: Tensor, exponent: int) -> Tensor:
    """Return ``tensor * 2 ** exponent``; ``tensor`` itself if ``exponent`` is 0."""
    if not exponent:
        return tensor
    # In two steps: the power alone may be beyond the dtype's range.
    return tensor.mul(2.0 ** (exponent // 2)).mul_(2.0 ** (exponent - exponent // 2))


def _exponent(peak: Tensor, most: int) -> int:
    """Return the power of two that brings ``peak`` to about 1, 0 if it is 0 or near enough already."""
    exponent = math.frexp(float(peak))[1]
    return 0 if float(peak) == 0.0 or abs(exponent) <= most else -exponent
