"""Streaming statistics of a layer's inputs: the Gram matrix, scaled by the number of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve.errors import CalibrationError, InputError
from halve.maths.linalg import full_precision, is_finite

_SIDE = 1024
"""Columns that are mirrored at once."""
_PANELS, _NARROWEST, _STEP = 8, 256, 64
"""How many panels the upper triangle of a sum is computed in, at most; how wide one is at least, and in what steps."""
_ROWS_AT_ONCE = 8192
"""Tokens upcast in one go: bounds the float32 copy of a batch."""


@dataclass(frozen=True)
class Gradient:
    """What backward passes over the calibration samples tell a method about one matrix.

    Attributes:
        root: (d_out, d_in) float32, ``√Σ g²``, g the gradient of one sample; never negative.
        samples: number of samples behind it, >= 1.
        tuned: (d_out, d_in) float32, weights to prune in place of the given ones, which a method has had tuned with the
            rest of their block; None where that was not asked for.
    """

    root: Tensor
    samples: int
    tuned: Tensor | None = None


@dataclass(frozen=True)
class Statistics:
    """What calibration tells a method about a layer.

    Attributes:
        gram: (d_in, d_in) float32, H = XᵀX / tokens (no factor 2), symmetric.
        tokens: number of input vectors behind it.
        halves: the same from each half of the tokens alone, for judging on one what was fitted on the other; None
            where that was not asked for, or one half is empty.
        cross: (d_in, d_in) float32, ``XᵀX̃ / tokens``, X the dense model's inputs for the same tokens and X̃ those
            behind ``gram``; None where that was not asked for.
        gradient: of the matrix that is pruned, or of all that are pruned as one, stacked; `halve.prune_weight` puts it
            there for the methods that need it.
    """

    gram: Tensor
    tokens: int
    halves: tuple[Tensor, Tensor] | None = None
    cross: Tensor | None = None
    gradient: Gradient | None = None

    def to(self, device: torch.device) -> "Statistics":
        """Return the same, but for the gradient, on a device; where they are there already, nothing is copied."""
        halves = None if self.halves is None else (self.halves[0].to(device), self.halves[1].to(device))
        cross = None if self.cross is None else self.cross.to(device)
        return replace(self, gram=self.gram.to(device), halves=halves, cross=cross)


class GramAccumulator:
    """Sums XᵀX over batches of inputs, in float32 whatever the inputs' dtype, autocast or TF32 setting."""

    def __init__(
        self, d_in: int, *, device: torch.device | str = "cpu", name: str = "layer", halves: bool = False
    ) -> None:
        """Start from nothing seen.

        Args:
            d_in: number of input features.
            device: where the (d_in, d_in) float32 sums live; inputs are moved there.
            name: the layer's name, for error messages.
            halves: whether to keep the two halves apart, in a second sum: of every batch, the first half of its
                tokens goes to one and the second to the other, an odd one to the sum that has fewer.
        """
        if d_in < 1:
            raise InputError(f"d_in of {name} must be at least 1, got {d_in}")
        self.d_in = d_in
        self.name = name
        self._counts = [0, 0] if halves else [0]
        # Ordinary tensors even when created under inference mode, so that they can be updated outside of it.
        with torch.inference_mode(mode=False):
            self._sums = [torch.zeros(d_in, d_in, dtype=torch.float32, device=device) for _ in self._counts]
            self._cross: Tensor | None = None

    @classmethod
    def of(cls, name: str, d_in: int, counts: Sequence[int], tensors: Mapping[str, Tensor]) -> "GramAccumulator":
        """Return an accumulator that has seen what another one had, whose `counts` and `tensors` these are.

        Raises:
            InputError: they are not those of an accumulator for ``d_in`` features.
        """
        wanted = {f"sum{half}" for half in range(len(counts))}
        wrong = wanted - tensors.keys() or tensors.keys() - wanted - {"cross"}
        shapes = {(tuple(each.shape), each.dtype) for each in tensors.values()}
        if wrong or len(counts) not in (1, 2) or shapes != {((d_in, d_in), torch.float32)} or min(counts) < 0:
            raise InputError(f"what was summed of the inputs of {name} must be ({d_in}, {d_in}) float32, got {shapes}")
        found = cls(d_in, name=name, device="meta", halves=len(counts) == 2)
        found._counts = list(counts)
        found._sums = [tensors[name] for name in sorted(wanted)]
        found._cross = tensors.get("cross")
        return found

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return sum(self._counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of tokens in each sum: of all, or of each half."""
        return tuple(self._counts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The (d_in, d_in) float32 sums by name, not copied; of XᵀX the part above the panels' diagonal alone."""
        sums = {f"sum{half}": total for half, total in enumerate(self._sums)}
        return sums if self._cross is None else {**sums, "cross": self._cross}

    @torch.no_grad()
    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add a batch of inputs.

        Args:
            x: (..., d_in), any float dtype; every leading position is one token.
            dense: like ``x``, the dense model's inputs for the same tokens, in every batch or in none.

        Raises:
            InputError: the last dimension is not ``d_in``, ``x`` is not floating point, or ``dense`` has another shape
                or was not given alike in every batch.
            CalibrationError: ``x`` has NaN or infinity; nothing of the offending slice is added.
        """
        self._refuse_finished()
        if x.ndim < 1 or x.shape[-1] != self.d_in or not x.is_floating_point():
            raise InputError(
                f"inputs of {self.name} must be floating point with last dimension {self.d_in}, "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        if dense is not None and dense.shape != x.shape:
            raise InputError(
                f"the dense model's inputs of {self.name} have shape {tuple(dense.shape)}, the pruned model's "
                f"{tuple(x.shape)}: they must be those of the same tokens"
            )
        if self.tokens and (dense is None) != (self._cross is None):
            raise InputError(f"the dense model's inputs of {self.name} must be given in every batch or in none")
        flat = x.reshape(-1, self.d_in)
        others = None if dense is None else dense.reshape(-1, self.d_in)
        middle = len(flat)
        if len(self._sums) == 2:  # the odd token goes to the half with fewer, the first if there are as many
            middle = (len(flat) + (self._counts[0] <= self._counts[1])) // 2
        if others is not None and self._cross is None:
            self._cross = torch.zeros_like(self._sums[0])
        with full_precision():
            for start, stop in _slices(len(flat), middle):
                part = int(start >= middle)
                rows = flat[start:stop].to(self._sums[part].device, torch.float32)
                self._check_finite(rows)
                _add_upper(self._sums[part], rows)
                if others is not None and self._cross is not None:
                    twins = others[start:stop].to(rows.device, torch.float32)
                    self._check_finite(twins)
                    self._cross.addmm_(twins.mT, rows)
                self._counts[part] += stop - start

    @torch.no_grad()
    def absorb(self, other: "GramAccumulator") -> None:
        """Add what another accumulator has summed of further tokens.

        Sums of float32 depend on their order in the last bits: the same bytes need the same order.

        Raises:
            InputError: they are finished, or only one of them has halves or the dense model's inputs.
        """
        self._refuse_finished()
        mine, theirs = self.tensors, other.tensors
        if mine.keys() != theirs.keys() and (self.tokens or mine.keys() - theirs.keys()):
            raise InputError(f"two sums of the inputs of {self.name} are not of the same kind")
        for name, more in theirs.items():
            if name in mine:
                mine[name].add_(more.to(mine[name].device))
            else:
                self._cross = more.to(self._sums[0].device)
        self._counts = [own + more for own, more in zip(self._counts, other.counts, strict=True)]

    def finish(self, *, last: bool = False) -> Statistics:
        """Return the statistics so far; more may be added afterwards.

        Args:
            last: nothing is going to be added: the sums become the statistics, which takes no more memory.

        Raises:
            InputError: they were finished for good before.
            CalibrationError: no token was seen, or the squares of the inputs overflowed float32.
        """
        self._refuse_finished()
        if self.tokens == 0:
            raise CalibrationError(
                f"{self.name} saw no calibration token: its inputs never reached the hook, or no token was routed to it"
            )
        with torch.inference_mode(mode=False):
            sums = self._sums if last else [total.clone() for total in self._sums]
            gram, halves = self._means(sums)
            cross = self._cross
            if cross is not None:
                cross = cross.div_(self.tokens) if last else cross / self.tokens
        if last:
            self._sums, self._cross = [], None
        if not is_finite(gram):
            raise CalibrationError(
                f"the Gram matrix of {self.name} overflowed float32: its inputs are too large "
                f"(largest finite mean square {_largest_finite(gram.diagonal()):.3g})"
            )
        return Statistics(gram, self.tokens, halves, cross)

    def _refuse_finished(self) -> None:
        if not self._sums:
            raise InputError(f"the statistics of {self.name} are finished: begin with another accumulator")

    def _means(self, sums: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Turn sums into means, in their own memory: of all tokens, and of the halves."""
        if len(sums) == 1:
            return _mean_in_place(sums[0], self.tokens), None
        whole = _mean_in_place(sums[0] + sums[1], self.tokens)
        if not all(self._counts):
            return whole, None
        one, other = (_mean_in_place(total, count) for total, count in zip(sums, self._counts, strict=True))
        return whole, (one, other)

    def _check_finite(self, rows: Tensor) -> None:
        if is_finite(rows):
            return
        bad = ~torch.isfinite(rows).all(-1)
        token = self.tokens + int(bad.to(torch.uint8).argmax())
        raise CalibrationError(
            f"inputs of {self.name} have NaN or infinity, first at token {token} of those summed together: "
            "check the model in this dtype, or use other text"
        )


def _slices(count: int, middle: int) -> Iterator[tuple[int, int]]:
    """Cut ``range(count)`` into slices of bounded length, none of them across ``middle``."""
    for first, last in ((0, middle), (middle, count)):
        for start in range(first, last, _ROWS_AT_ONCE):
            yield start, min(start + _ROWS_AT_ONCE, last)


def panels(d_in: int) -> list[slice]:
    """Cut columns into the panels in which the upper triangle of XᵀX is computed; the width decides its last bits.

    A product knows nothing of symmetry: of the whole square, with eight panels, 56 % has to be computed.
    """
    width = max(_NARROWEST, -(-d_in // (_PANELS * _STEP)) * _STEP)
    return [slice(first, min(first + width, d_in)) for first in range(0, d_in, width)]


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """Add ``rowsᵀ rows`` to the upper triangle of ``total``, panel by panel."""
    for panel in panels(len(total)):
        total[panel, panel.start :].addmm_(rows[:, panel].mT, rows[:, panel.start :])


def _mean_in_place(total: Tensor, tokens: int) -> Tensor:
    """Turn the upper triangle of a sum into a symmetric mean, in its own memory.

    Of each panel's square both triangles were computed, equal up to rounding; their mean is taken.
    """
    for panel in panels(len(total)):
        square = total[panel, panel]
        total[panel, panel] = (square + square.mT).mul_(0.5 / tokens)
        for left in range(panel.stop, len(total), _SIDE):
            columns = slice(left, left + _SIDE)
            total[panel, columns] *= 1.0 / tokens
            total[columns, panel] = total[panel, columns].mT
    return total


def _largest_finite(values: Tensor) -> float:
    """Return the largest finite entry, 0.0 if there is none."""
    return float(torch.where(torch.isfinite(values), values, 0.0).amax())
