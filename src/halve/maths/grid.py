"""Grids of integers: weights as ``integer · scale``, a float16 scale for every 64 columns of a row.

Integers of 8 bits are from -127 to 127, those of 4 bits from -8 to 7.
"""

from typing import Literal

import torch
from torch import Tensor

from halve.errors import InputError

Bits = Literal[8, 4]
LOWEST: dict[int, int] = {8: -127, 4: -8}
LARGEST: dict[int, int] = {8: 127, 4: 7}
"""The integers of so many bits."""
COLUMNS = 64
"""That share a scale."""
_SHARES = tuple(1.0 - 0.025 * step for step in range(15))
"""Scales of 4 bits that are tried, as shares of the one that the largest weight needs whatever its sign."""
_PROBED = 64
"""Scales, spread over all, by which it is judged whether weights lie on a grid at all."""


def nearest(weights: Tensor, bits: Bits, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round weights to integers and scales.

    With 8 bits the scale is what the largest weight needs; with 4 bits the one of some shares of that which leaves the
    least squared error.

    Args:
        weights: (..., n), float32, those that share a scale along the last dimension.
        bits: of an integer.
        importance: (..., n), by which squared errors are weighed, not negative; None weighs them alike.

    Returns:
        tuple[Tensor, Tensor]: integers, int8, (..., n); scales, float16, (...), 0 where all weights are, or so small
            that their scale would be below what float16 has (3e-8), and become zeros.

    Raises:
        InputError: a weight is not finite, or too large for a float16 scale.
    """
    needed = weights.abs().amax(-1) / LARGEST[bits]
    if bits == 8:
        scales = _half(needed)
        return rounded(weights, scales, bits), scales
    best = weights.new_full(needed.shape, float("inf"))
    scales = torch.zeros_like(needed, dtype=torch.float16)
    for share in _SHARES:
        tried = _half(needed * share)
        error = (rounded(weights, tried, bits) * tried.unsqueeze(-1).float() - weights).square_()
        total = (error if importance is None else error.mul_(importance)).sum(-1)
        better = total < best
        best, scales = torch.where(better, total, best), torch.where(better, tried, scales)
    return rounded(weights, scales, bits), scales


def rounded(weights: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """Return the nearest integers, int8, of weights (..., n) on the grid of scales, float16, (...)."""
    steps = scales.unsqueeze(-1).float()
    found = torch.where(steps > 0, weights / steps, 0.0).round_()
    return found.clamp_(LOWEST[bits], LARGEST[bits]).to(torch.int8)


def recovered(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the integers of 4 bits and the scales that weights were made of, where they were.

    The largest weight is some integer times the scale, rounded once to the dtype: of the few scales that leaves, one is
    right if all weights are integers times it, rounded likewise. Nothing is looked for where no row of a sample lies on
    a grid.

    Args:
        weights: (rows, n), of a dtype in which they are exactly what was stored, those that share a scale in a row.

    Returns:
        tuple[Tensor, Tensor, Tensor]: integers, int8, (rows, n); scales, float16, (rows,); and whether they were
            found, bool, (rows,).
    """
    integers = torch.zeros(weights.shape, dtype=torch.int8)
    scales = torch.zeros(len(weights), dtype=torch.float16)
    found = (weights == 0).all(-1)
    left = (~found).nonzero().squeeze(-1)
    sample = left[:: max(1, len(left) // _PROBED)]
    if not bool(_search(weights[sample])[0].any()):
        return integers, scales, found
    found[left], integers[left], scales[left] = _search(weights[left])
    return integers, scales, found


def _search(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return whether rows lie on a grid of 4 bits, and their integers and scales if they do."""
    wide = weights.float()
    at = wide.abs().argmax(-1, keepdim=True)
    largest = wide.gather(-1, at).squeeze(-1)
    found = torch.zeros(len(wide), dtype=torch.bool)
    integers, scales = torch.zeros(wide.shape, dtype=torch.int8), torch.zeros(len(wide), dtype=torch.float16)
    unit = torch.finfo(
        weights.dtype
    ).eps  # at most so far, of itself, is a rounded product from the exact one, and half
    steps = min(8, int(unit / 2**-11) + 1)
    for size in (7, 8, 6, 5, 4, 3, 2, 1):
        first = (largest.abs() / size).to(torch.float16)
        for step in sorted(range(-steps, steps + 1), key=abs):
            open_rows = (~found).nonzero().squeeze(-1)
            if not len(open_rows):
                return found, integers, scales
            tried = (first[open_rows].view(torch.int16) + step).view(torch.float16)
            rows = wide[open_rows]
            codes = rounded(rows, tried, 4)
            products = (codes.float() * tried.unsqueeze(-1).float()).to(weights.dtype)
            right = (products == weights[open_rows]).all(-1) & tried.isfinite() & (tried > 0)
            hits = open_rows[right]
            found[hits], integers[hits], scales[hits] = True, codes[right], tried[right]
    return found, integers, scales


def _half(scales: Tensor) -> Tensor:
    found = scales.to(torch.float16)
    if not bool(found.isfinite().all()):
        raise InputError("weights are not finite, or too large to be quantised: their scale is beyond float16")
    return found
