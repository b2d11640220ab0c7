"""Kept weights as integers of 4 bits: the least-squares problem of the refit, on the grid of `halve.maths.grid`.

    minimise (v - v0) H (v - v0)ᵀ over v = q · s, integers q from -8 to 7 on the row's mask, s one for each 64 columns,

by coordinate descent, all rows at once: column after column each integer is set to the best one while the others stay,
which is the one nearest to the minimum along it, and after the 64 columns of a scale the scale itself. No step makes a
row worse. Where rounding to the nearest leaves each error where it is, here the weights that follow make up for it, and
in the next sweep those before. (Coordinate descent on a grid without a mask: QuantEase, Behdin et al. 2023.)
"""

import torch
from torch import Tensor

from halve.maths.grid import COLUMNS, LARGEST, LOWEST, Bits, nearest
from halve.maths.pattern import apply_mask

_BITS: Bits = 4


def to_integers(
    weight: Tensor, original: Tensor, gram: Tensor, mask: Tensor, sweeps: int
) -> tuple[Tensor, dict[str, float]]:
    """Bring kept weights onto the grid, and improve them there.

    Args:
        weight: (d_out, d_in), where to start: the best weights that are no integers.
        original: (d_out, d_in), W0.
        gram: (d_in, d_in) float32, H.
        mask: (d_out, d_in) bool, true where a weight is kept.
        sweeps: over all columns; 0 leaves it at rounding to the nearest.

    Returns:
        tuple[Tensor, dict[str, float]]: weights in the dtype of ``weight``, each its integer times its scale, +0.0
            outside ``mask``; and the fact ``integer_gain``: by what share of its loss above that of ``weight`` the
            descent has improved on rounding to the nearest.

    Raises:
        InputError: a weight is too large for a float16 scale.
    """
    descent = _Descent(weight, original, gram, mask)
    begun = descent.loss()
    for _ in range(sweeps):
        descent.sweep()
    floor = _loss(apply_mask(weight, mask).float() - original.float(), gram)
    above = begun - floor
    gain = (begun - descent.loss()) / above if above > 0 else 0.0
    return descent.weights().to(weight.dtype), {"integer_gain": float(gain)}


class _Descent:
    """Integers, scales, and what they are held to; columns come first, so that one is contiguous.

    Args:
        weight, original, gram, mask: as `to_integers` has them.
    """

    def __init__(self, weight: Tensor, original: Tensor, gram: Tensor, mask: Tensor) -> None:
        self._d_in = weight.shape[1]
        fill = -self._d_in % COLUMNS
        start = torch.nn.functional.pad(apply_mask(weight, mask).float(), (0, fill))
        words = start.view(len(start), -1, COLUMNS)
        importance = torch.nn.functional.pad(gram.diagonal(), (0, fill)).view(-1, COLUMNS).expand_as(words)
        codes, scales = nearest(words, _BITS, importance)
        self._codes = codes.flatten(1).T[: self._d_in].float().contiguous()  # (d_in, d_out)
        self._scales = scales.float().T.contiguous()  # (words, d_out)
        self._keep = mask.T.contiguous()
        self._gram = gram
        self._curvatures = gram.diagonal().tolist()  # at once: a GPU would be waited for at every column
        self._original = original.float().T.contiguous()
        self._off = self._values() - self._original

    def _values(self) -> Tensor:
        of_columns = self._scales.repeat_interleave(COLUMNS, 0)[: self._d_in]
        return self._codes * of_columns

    def weights(self) -> Tensor:
        """Return the weights, (d_out, d_in) float32."""
        return self._values().T.contiguous().add_(0.0)

    def loss(self) -> float:
        """Return the loss of all rows."""
        return _loss(self._off.T, self._gram)

    def sweep(self) -> None:
        """Go over all columns once."""
        for word, begin in enumerate(range(0, self._d_in, COLUMNS)):
            end = min(begin + COLUMNS, self._d_in)
            gram = self._gram[begin:end, begin:end]
            slope = self._gram[begin:end] @ self._off  # (columns, d_out): half the gradient
            scale = self._scales[word]
            inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
            for column in range(begin, end):
                self._set(column, begin, gram, slope, scale, inverse)
            self._rescale(word, begin, end, gram, slope)

    def _set(self, column: int, begin: int, gram: Tensor, slope: Tensor, scale: Tensor, inverse: Tensor) -> None:
        """Set the integers of one column to the best ones."""
        at, curvature = column - begin, self._curvatures[column]
        if not curvature > 0:
            return
        codes = self._codes[column]
        wanted = torch.addcmul(codes, slope[at], inverse, value=-1.0 / curvature).round_()
        wanted = wanted.clamp_(LOWEST[_BITS], LARGEST[_BITS])
        change = torch.where(self._keep[column], wanted - codes, 0.0)
        codes += change
        moved = change * scale
        self._off[column] += moved
        slope += torch.outer(gram[at], moved)

    def _rescale(self, word: int, begin: int, end: int, gram: Tensor, slope: Tensor) -> None:
        """Set the scale of a word to the best one, where float16 has one that is better."""
        codes = self._codes[begin:end]
        downhill, curvature = -(codes * slope).sum(0), (codes * (gram @ codes)).sum(0)
        old = self._scales[word]
        new = torch.where(curvature > 0, old + downhill / curvature, old).to(torch.float16).float()
        step = new - old
        better = (new > 0) & new.isfinite() & (step * (0.5 * step * curvature - downhill) < 0)
        step = torch.where(better, step, 0.0)
        self._scales[word] += step
        self._off[begin:end] += codes * step


def _loss(off: Tensor, gram: Tensor) -> float:
    return float(0.5 * ((off @ gram) * off).sum(dtype=torch.float64))
