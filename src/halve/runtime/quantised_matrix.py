"""Packed matrices whose kept weights are integers of 8 or 4 bits, and a float16 scale for every word of 64 columns.

Beside `halve.runtime.packed_matrix`: the same mask, one bit a weight, but what a word of it keeps are integers. Of N:M
a word keeps 64 N / M weights, wherever it lies, so that its integers begin at a known place; at 2:4 these are 32, and a
weight takes 5.25 bits in all with integers of 8 bits, and 3.25 with 4. A kept weight is ``integer · scale``. Integers
of 8 bits are from -127 to 127, those of 4 bits from -8 to 7.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.runtime.packed_matrix import (
    DTYPES,
    OVERREAD,
    WORD,
    PackedMatrix,
    check_mask,
    check_part,
    halves_every_byte,
    kept_per_row,
    mask_bytes,
    row_chunks,
)

Bits = Literal[8, 4]
Values = Literal["own", "bf16", "int8", "int4"]
"""What kept weights are held as: numbers of their own dtype; the same, which must be bfloat16; or integers."""
QUANTISED: dict[str, Bits] = {"int8": 8, "int4": 4}
"""The kinds that are integers."""
LOWEST: dict[int, int] = {8: -127, 4: -8}
LARGEST: dict[int, int] = {8: 127, 4: 7}
"""The integers of so many bits."""
_SHARES = tuple(1.0 - 0.025 * step for step in range(15))
"""Scales of 4 bits that are tried, as shares of the one that the largest weight of a word needs whatever its sign."""


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A matrix of shape (d_out, d_in) at N:M whose kept weights are quantised; made by `quantise`, or of parts.

    Shapes and dtypes are checked however it is made, so that no product reads outside its parts. Masks and scales are
    left to `check`: it reads every byte.

    Raises:
        InputError: the parts do not go together, or the pattern cannot be quantised, see `why_not`.
    """

    mask: Tensor
    """uint8, (d_out, 8 ⌈d_in / 64⌉): as in `PackedMatrix`."""
    codes: Tensor
    """uint8, flat: the integers of word after word, those beyond d_in of no meaning; filled up to a multiple of 8
    bytes, and 64 bytes of no meaning. 8 bits: two's complement; 4 bits: the integer plus 8, the first of a byte in its
    lower half."""
    scales: Tensor
    """float16, flat: one for each word; filled up to a multiple of 4, then 64 of no meaning."""
    shape: tuple[int, int]
    """(d_out, d_in), both at least 1."""
    pattern: str
    """``N:M``, M a divisor of 64."""
    bits: Bits
    """Of an integer."""
    dtype: torch.dtype
    """Of x, of the products, and of the matrix unpacked."""

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise InputError(f"a packed matrix has two dimensions of at least 1, not shape {tuple(self.shape)}")
        if reason := why_not(Pattern(self.pattern)):
            raise InputError(reason)
        if self.bits not in LARGEST or self.dtype not in DTYPES:
            raise InputError(f"a packed matrix has integers of 8 or 4 bits, not {self.bits}, in {self.dtype}")
        mask, codes, scales = quantised_part_shapes(self.d_out, self.d_in, Pattern(self.pattern), self.bits)
        check_part("mask", self.mask, (torch.uint8,), mask)
        check_part("codes", self.codes, (torch.uint8,), codes)
        check_part("scales", self.scales, (torch.float16,), scales)

    @property
    def d_out(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def d_in(self) -> int:
        """Number of weights in a row."""
        return self.shape[1]

    @cached_property
    def kept(self) -> int:
        """Number of weights that a word keeps."""
        return kept_per_row(Pattern(self.pattern), WORD)

    @cached_property
    def half_of_every_byte(self) -> bool:
        """Whether each byte of the mask keeps four of its eight weights."""
        return halves_every_byte(Pattern(self.pattern))

    @property
    def words(self) -> int:
        """Number of words in a row."""
        return -(-self.d_in // WORD)

    @property
    def nbytes(self) -> int:
        """Bytes of mask, codes and scales; the matrix unpacked has ``d_out * d_in * dtype.itemsize``."""
        return self.mask.nbytes + self.codes.nbytes + self.scales.nbytes

    def check(self) -> None:
        """Check that the mask keeps what the pattern says, that scales are finite and no integer is -128.

        Raises:
            InputError: one of them is not: the products would be wrong.
        """
        check_mask(self.mask, self.shape, Pattern(self.pattern))
        scales = self.scales[: self.d_out * self.words]
        if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
            raise InputError("a scale of a packed matrix is negative or not finite")
        if self.bits == 8 and bool((self.codes == 0x80).any()):
            raise InputError("an integer of a packed matrix is -128, beyond what 8 bits are used for")

    def integers(self) -> Tensor:
        """Return the integers, int8, (d_out, words, kept)."""
        codes = self.codes[: self.d_out * self.words * self.kept * self.bits // 8].view(self.d_out, self.words, -1)
        if self.bits == 8:
            return codes.view(torch.int8)
        pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        return pairs.to(torch.int8) - 8

    def dequantised(self) -> PackedMatrix:
        """Return the matrix with its weights in ``dtype``, each integer times its scale, rounded once."""
        values = torch.zeros(self.d_out * self.kept_of_row + OVERREAD, dtype=self.dtype)
        scales = self.scales[: self.d_out * self.words].view(self.d_out, self.words, 1)
        weights = self.integers().float() * scales.float()
        values[:-OVERREAD] = weights.flatten(1)[:, : self.kept_of_row].flatten().to(self.dtype)
        return PackedMatrix(self.mask, values, self.shape, self.pattern)

    @cached_property
    def kept_of_row(self) -> int:
        """Number of weights that a row keeps."""
        return kept_per_row(Pattern(self.pattern), self.d_in)


def bits_of(values: str, pattern: Pattern) -> Bits | None:
    """Return the bits of the integers that a kind of `Values` stands for; None where it stands for none.

    Args:
        values: the kind.
        pattern: of the matrices.

    Raises:
        InputError: there is no such kind, or the pattern cannot be quantised.
    """
    if values not in get_args(Values):
        *others, last = get_args(Values)
        raise InputError(f"values is {values!r}: give {', '.join(others)} or {last}")
    bits = QUANTISED.get(values)
    if bits is not None and (reason := why_not(pattern)):
        raise InputError(reason)
    return bits


def why_not(pattern: Pattern) -> str:
    """Return why matrices in a pattern cannot be quantised; empty if they can."""
    if pattern.group is not None and WORD % pattern.group == 0:
        return ""
    return f"weights are quantised at N:M where M divides {WORD}, such as 2:4 or 4:8, not at {pattern}"


def quantised_part_shapes(
    d_out: int, d_in: int, pattern: Pattern, bits: int
) -> tuple[tuple[int, int], tuple[int], tuple[int]]:
    """Return the shapes of mask, codes and scales of a quantised matrix."""
    words = d_out * -(-d_in // WORD)
    codes = words * kept_per_row(pattern, WORD) * bits // 8
    return (d_out, mask_bytes(d_in)), (_filled_up(codes, 8) + OVERREAD,), (_filled_up(words, 4) + OVERREAD,)


def _filled_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def quantised_bytes(d_out: int, d_in: int, pattern: Pattern, bits: int) -> int:
    """Return the bytes of mask, codes and scales of a matrix, quantised."""
    mask, codes, scales = quantised_part_shapes(d_out, d_in, pattern, bits)
    return mask[0] * mask[1] + codes[0] + 2 * scales[0]


def quantise(packed: PackedMatrix, bits: Bits) -> QuantisedMatrix:
    """Quantise the kept weights of a matrix, each to the nearest integer of its word's scale.

    With 8 bits the scale is what the largest weight of the word needs; with 4 bits the one of some shares of that which
    leaves the least squared error in the word.

    Args:
        packed: finite, at N:M, M a divisor of 64.
        bits: of an integer.

    Raises:
        InputError: another pattern, or weights too large for a float16 scale.
    """
    if reason := why_not(Pattern(packed.pattern)):
        raise InputError(reason)
    words, kept = -(-packed.d_in // WORD), kept_per_row(Pattern(packed.pattern), WORD)
    integers = torch.zeros(packed.d_out, words * kept, dtype=torch.int8)
    scales = torch.zeros(packed.d_out, words, dtype=torch.float16)
    for start, stop in row_chunks(packed.shape):
        rows = packed.values[start * packed.kept : stop * packed.kept].view(stop - start, packed.kept).float()
        rows = torch.nn.functional.pad(rows, (0, words * kept - packed.kept)).view(stop - start, words, kept)
        found, scale = nearest(rows, bits)
        integers[start:stop], scales[start:stop] = found.flatten(1), scale
    return assembled(packed.mask, integers, scales, packed.shape, packed.pattern, bits, packed.dtype)


def nearest(weights: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Round weights to integers and scales.

    Args:
        weights: (..., kept), float32, of one word along the last dimension.
        bits: of an integer.

    Returns:
        tuple[Tensor, Tensor]: integers, int8, (..., kept); scales, float16, (...), 0 where all weights are 0.

    Raises:
        InputError: a weight is too large for a float16 scale.
    """
    if bits == 8:
        scales = _half(weights.abs().amax(-1) / LARGEST[8])
        return rounded(weights, scales, bits), scales
    needed = weights.abs().amax(-1) / LARGEST[4]
    best = weights.new_full(needed.shape, float("inf"))
    scales = torch.zeros_like(needed, dtype=torch.float16)
    for share in _SHARES:
        tried = _half(needed * share)
        error = (rounded(weights, tried, bits) * tried.unsqueeze(-1).float() - weights).square_().sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    return rounded(weights, scales, bits), scales


def rounded(weights: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """Return the nearest integers, int8, of weights (..., kept) on the grid of scales, float16, (...)."""
    steps = scales.unsqueeze(-1).float()
    found = torch.where(steps > 0, weights / steps, 0.0).round_()
    return found.clamp_(LOWEST[bits], LARGEST[bits]).to(torch.int8)


def _half(scales: Tensor) -> Tensor:
    found = scales.to(torch.float16)
    if not bool(found.isfinite().all()):
        raise InputError("weights are too large to be quantised: their scale is beyond float16")
    return found


def assembled(
    mask: Tensor,
    integers: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    pattern: str,
    bits: Bits,
    dtype: torch.dtype,
) -> QuantisedMatrix:
    """Return the matrix of integers, int8, (d_out, words · kept), and scales, float16, (d_out, words)."""
    _, (code_bytes,), (count,) = quantised_part_shapes(*shape, Pattern(pattern), bits)
    codes = _padded((integers.view(torch.uint8) if bits == 8 else _in_pairs(integers)).flatten(), code_bytes)
    return QuantisedMatrix(mask, codes, _padded(scales.flatten(), count), shape, pattern, bits, dtype)


def _padded(part: Tensor, length: int) -> Tensor:
    return torch.cat((part, part.new_zeros(length - len(part))))


def _in_pairs(integers: Tensor) -> Tensor:
    found = (integers + 8).view(torch.uint8)
    return found[..., 0::2] | found[..., 1::2] << 4
