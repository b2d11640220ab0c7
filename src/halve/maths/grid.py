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
        error = _codes(weights, tried, bits).mul_(tried.unsqueeze(-1).float()).sub_(weights).square_()
        total = (error if importance is None else error.mul_(importance)).sum(-1)
        better = total < best
        best, scales = torch.where(better, total, best), torch.where(better, tried, scales)
    return rounded(weights, scales, bits), scales


def rounded(weights: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """Return the nearest integers, int8, of weights (..., n) on the grid of scales, float16, (...)."""
    return _codes(weights, scales, bits).to(torch.int8)


def _codes(weights: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """Return the same as float32."""
    steps = scales.unsqueeze(-1).float()
    return torch.where(steps > 0, weights / steps, 0.0).round_().clamp_(LOWEST[bits], LARGEST[bits])


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
    found = weights.abs().amax(-1) == 0
    left = (~found).nonzero().squeeze(-1)
    sample = left[:: max(1, len(left) // _PROBED)]
    if not bool(_search(weights[sample])[0].any()):
        return integers, scales, found
    if len(left) == len(weights):
        found, integers, scales = _search(weights)
    else:
        found[left], integers[left], scales[left] = _search(weights[left])
    return integers, scales, found


_Grid = tuple[Tensor, Tensor, Tensor]
"""Whether rows lie on a grid of 4 bits, bool, (rows,), and their integers and scales if they do."""
_SIZES = (7, 8, 6, 5, 4, 3, 2, 1)
"""Magnitudes of integers that the largest weight may be, the likely ones first."""


def _search(weights: Tensor) -> _Grid:
    """Find the grids of rows, (rows, n), none of which is all zeros."""
    wide = weights.float()
    largest = wide.abs().amax(-1)
    found = torch.zeros(len(wide), dtype=torch.bool)
    integers, scales = torch.zeros(wide.shape, dtype=torch.int8), torch.zeros(len(wide), dtype=torch.float16)
    plain = (largest >= 2**-10) & (largest < 2**15)  # so that float16 has neighbours of each scale at even distances
    if bool(plain.all()):
        return _among_intervals(weights, wide, largest)
    for search, rows in ((_among_intervals, plain.nonzero()), (_among_all, (~plain).nonzero())):
        at = rows.squeeze(-1)
        found[at], integers[at], scales[at] = search(weights[at], wide[at], largest[at])
    return found, integers, scales


def _steps(dtype: torch.dtype) -> int:
    """Return how many float16 numbers the scale may be away from a weight of a dtype over its integer."""
    # at most eps, of itself, is a rounded product from the exact one, and half
    return min(8, int(torch.finfo(dtype).eps / 2**-11) + 1)


def _among_intervals(weights: Tensor, wide: Tensor, largest: Tensor) -> _Grid:
    """Find the grids of rows whose scales are not near the ends of float16.

    The integers are the same for all scales near one, so that each weight leaves an interval of scales, and the row
    what the intervals have in common: of that the scale nearest to the one that `_among_all` begins with.
    """
    integers, scales = torch.zeros(wide.shape, dtype=torch.int8), torch.zeros(len(wide), dtype=torch.float16)
    steps, low, high = _steps(weights.dtype), *_rounded_to(weights)
    at = torch.arange(len(wide))
    for size in _SIZES:
        first = (largest / size).to(torch.float16)
        codes = (wide / first.unsqueeze(-1)).round_().clamp_(LOWEST[4], LARGEST[4])
        sizes = codes.abs().clamp_(min=1)  # a weight that is not 0 and has the integer 0 leaves no scale near by
        least, most = (low / sizes).amax(-1), (high / sizes).amin(-1)
        tried, inwards = _nearest_between(first, least, most)
        right = least <= most * (1 + _ENDS)
        for _ in range(2):  # ends are themselves rounded: what is next to one may be meant
            left = (right & (scales[at] == 0)).nonzero().squeeze(-1)
            step = tried[left].view(torch.int16) - first[left].view(torch.int16)
            products = (codes[left] * tried[left].unsqueeze(-1)).to(weights.dtype)
            hits = left[(step.abs() <= steps) & ~_differ(products, weights[left])]
            integers[at[hits]], scales[at[hits]] = codes[hits].to(torch.int8), tried[hits]
            tried = (tried.view(torch.int16) + inwards).view(torch.float16)
        rest = (scales[at] == 0).nonzero().squeeze(-1)
        if not len(rest):
            break
        at, largest = at[rest], largest[rest]
        weights, wide, low, high = weights[rest], wide[rest], low[rest], high[rest]
    return scales > 0, integers, scales


_ENDS = 1e-6
"""Of themselves, more than the ends of intervals are rounded by."""


def _nearest_between(first: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float16 numbers nearest to ``first`` from ``least`` to ``most``, a little further than these.

    Returns:
        tuple[Tensor, Tensor]: the numbers; where the next one in is from each, int16, -1, 0 or 1.
    """
    exact = first.to(least.dtype)
    up, down = exact < least * (1 + _ENDS), exact > most * (1 - _ENDS)
    inwards = up.to(torch.int16) - (down & ~up).to(torch.int16)
    end = exact.maximum(least * (1 - _ENDS))
    end = torch.where(up, end, exact.minimum(most * (1 + _ENDS)))
    tried = end.to(torch.float16)
    off = (up & (tried < end)).to(torch.int16) - (down & ~up & (tried > end)).to(torch.int16)
    return (tried.view(torch.int16) + off).view(torch.float16), inwards


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Return which rows of two tensors differ; a maximum of bytes is found faster than what is true of all."""
    return (one != other).view(torch.uint8).amax(-1).bool()


def _rounded_to(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest number whose nearest in the dtype a weight's magnitude is, (rows, n) each.

    A weight that is 0 has no largest one: any scale makes it.
    """
    whole, exact = (torch.int32, torch.float64) if weights.dtype == torch.float32 else (torch.int16, torch.float32)
    sizes = weights.abs()
    bits, middle = sizes.view(whole), sizes.to(exact)
    below, above = ((bits + step).view(weights.dtype).to(exact) for step in (-1, 1))
    zero = bits == 0
    return below.add_(middle).div_(2).masked_fill_(zero, 0.0), above.add_(middle).div_(2).masked_fill_(zero, torch.inf)


def _among_all(weights: Tensor, wide: Tensor, largest: Tensor) -> _Grid:
    """Find the grids of rows by trying every scale that the largest weight leaves."""
    found = torch.zeros(len(wide), dtype=torch.bool)
    integers, scales = torch.zeros(wide.shape, dtype=torch.int8), torch.zeros(len(wide), dtype=torch.float16)
    steps = _steps(weights.dtype)
    for size in _SIZES:
        first = (largest / size).to(torch.float16)
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
