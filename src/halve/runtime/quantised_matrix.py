"""Packed matrices at 2:4 whose kept weights are integers of 8 or 4 bits, with a float16 scale for every 64 columns.

A kept weight is ``integer · scale``; integers of 8 bits are from -127 to 127, those of 4 bits from -8 to 7. Where the
two kept weights of a group are, two bits for each tell, which is as much as a mask of one bit a weight, and what the
kernels gather the inputs by. A weight takes 5.25 bits in all with integers of 8 bits, and 3.25 with 4.

Rows are worked on in strips of 128 columns, which keep 64 weights, and are filled up to whole strips with zeros.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from halve.errors import InputError
from halve.maths.grid import COLUMNS, LARGEST, LOWEST, Bits, nearest, recovered
from halve.maths.pattern import Pattern
from halve.runtime.packed_matrix import (
    DTYPES,
    OVERREAD,
    PackedMatrix,
    check_part,
    gather_bits,
    mask_bytes,
    pack,
    row_chunks,
    spread,
    unpack,
)

Values = Literal["own", "bf16", "int8", "int4"]
"""What kept weights are held as: numbers of their own dtype; the same, which must be bfloat16; or integers."""
QUANTISED: dict[str, Bits] = {"int8": 8, "int4": 4}
"""The kinds that are integers."""
PATTERN = "2:4"
"""The only one at which weights are quantised."""
STRIP, KEPT, STRIP_PLACES = 128, 64, 16
"""Columns of a strip, weights that it keeps, and bytes that tell where."""
WORD_KEPT = 32
"""Kept weights that share a scale."""


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A matrix of shape (d_out, d_in) at 2:4 whose kept weights are quantised; made by `quantise`, or of parts.

    Shapes and dtypes are checked however it is made, so that no product reads outside its parts. What they hold is left
    to `check`: it reads every byte.

    Raises:
        InputError: the parts do not go together.
    """

    places: Tensor
    """uint8, (d_out, 16 strips): byte i of a strip has the places in their groups of its kept weights i, 16 + i, 32 + i
    and 48 + i, two bits each from the lowest on."""
    codes: Tensor
    """uint8, (d_out, 8 bits · strips): the integers of the kept weights, strip after strip. 8 bits: two's complement; 4
    bits: the integer plus 8, byte i of a strip that of kept weight i in its lower half, that of 32 + i in its upper."""
    scales: Tensor
    """float16, (2 d_out strips + 64,): one for each 64 columns of row after row, then 64 of no meaning."""
    shape: tuple[int, int]
    """(d_out, d_in): d_out at least 1, d_in a multiple of 4."""
    bits: Bits
    """Of an integer."""
    dtype: torch.dtype
    """Of x, of the products, and of the matrix unpacked."""
    pattern: ClassVar[str] = PATTERN
    """The same for all."""

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1 or self.d_in % 4:
            raise InputError(f"a quantised matrix has rows whose length is a multiple of 4, not shape {self.shape}")
        if self.bits not in LARGEST or self.dtype not in DTYPES:
            raise InputError(f"a packed matrix has integers of 8 or 4 bits, not {self.bits}, in {self.dtype}")
        places, codes, scales = quantised_part_shapes(self.d_out, self.d_in, self.bits)
        check_part("places", self.places, (torch.uint8,), places)
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

    @property
    def strips(self) -> int:
        """Number of strips in a row."""
        return -(-self.d_in // STRIP)

    @property
    def nbytes(self) -> int:
        """Bytes of places, codes and scales; the matrix unpacked has ``d_out * d_in * dtype.itemsize``."""
        return self.places.nbytes + self.codes.nbytes + self.scales.nbytes

    @cached_property
    def scales_of_rows(self) -> Tensor:
        """The scales, float16, (d_out, 2 strips): a view."""
        return self.scales[:-OVERREAD].view(self.d_out, 2 * self.strips)

    def check(self) -> None:
        """Check that places rise in every group, that weights are finite, and what fills up a row means nothing.

        Raises:
            InputError: a part holds what it must not: the products would be wrong.
        """
        if not bool(self.scales[:-OVERREAD].isfinite().all()) or bool((self.scales < 0).any()):
            raise InputError("a scale of a packed matrix is negative or not finite")
        if self.bits == 8 and bool((self.codes == 0x80).any()):
            raise InputError("an integer of a packed matrix is -128, beyond what 8 bits are used for")
        if not self.fits(self.dtype):
            raise InputError(f"weights of a packed matrix are beyond {str(self.dtype).removeprefix('torch.')}")
        for start, stop in row_chunks(self.shape):
            groups = _kept_places(self.places[start:stop]).view(stop - start, -1, 2)
            if bool((groups[..., 0] >= groups[..., 1]).any()):
                raise InputError("the places of a packed matrix do not rise in every group of four")
            if bool(_integers(self.codes[start:stop], self.bits)[:, self.d_in // 2 :].any()):
                raise InputError("what fills up a row of a packed matrix is not 0")

    def fits(self, dtype: torch.dtype) -> bool:
        """Return whether all weights are finite in a dtype."""
        most = torch.finfo(dtype).max
        if float(self.scales[:-OVERREAD].max()) * -LOWEST[self.bits] <= most:
            return True
        largest = _integers(self.codes, self.bits).view(self.d_out, -1, WORD_KEPT).abs().amax(-1)
        return bool((largest.float() * self.scales_of_rows.float() <= most).all())

    def integers(self) -> Tensor:
        """Return the integers of the kept weights in the order of their columns, int8, (d_out, d_in / 2)."""
        return _integers(self.codes, self.bits)[:, : self.d_in // 2]

    def dequantised(self) -> PackedMatrix:
        """Return the matrix with its weights in ``dtype``, each integer times its scale, rounded once."""
        kept = self.d_in // 2
        values = torch.zeros(self.d_out * kept + OVERREAD, dtype=self.dtype)
        mask = torch.empty(self.d_out, mask_bytes(self.d_in), dtype=torch.uint8)
        for start, stop in row_chunks(self.shape):
            integers = _integers(self.codes[start:stop], self.bits).view(stop - start, -1, WORD_KEPT)
            weights = integers.float() * self.scales_of_rows[start:stop].unsqueeze(-1).float()
            values[start * kept : stop * kept] = weights.flatten(1)[:, :kept].flatten().to(self.dtype)
            places = _kept_places(self.places[start:stop])[:, :kept].view(stop - start, -1, 2)
            columns = torch.zeros(stop - start, self.d_in // 4, 4, dtype=torch.bool)
            columns.scatter_(-1, places.long(), value=True)
            mask[start:stop] = gather_bits(columns.flatten(1), mask.shape[1])
        return PackedMatrix(mask, values, self.shape, PATTERN)


@dataclass(frozen=True, eq=False)
class DenseIntegers:
    """A dense matrix of integers of 8 bits; made by `quantise_dense`."""

    codes: Tensor
    """int8, (d_out, 128 strips): the integers in the order of their columns, filled up to whole strips with zeros."""
    scales: Tensor
    """float16, (2 d_out strips + 64,): one for each 64 columns of row after row, then 64 of no meaning."""
    shape: tuple[int, int]
    """(d_out, d_in)."""
    dtype: torch.dtype
    """Of x and of the products."""


def quantise_dense(weight: Tensor) -> DenseIntegers:
    """Quantise a dense matrix, (d_out, d_in), one of `DTYPES`, each weight to the nearest integer of 8 bits.

    Raises:
        InputError: weights are not finite, or too large for a float16 scale.
    """
    d_out, d_in = weight.shape
    strips = -(-d_in // STRIP)
    codes = torch.empty(d_out, STRIP * strips, dtype=torch.int8)
    scales = torch.zeros(2 * d_out * strips + OVERREAD, dtype=torch.float16)
    for start, stop in row_chunks((d_out, d_in)):
        rows = torch.nn.functional.pad(weight[start:stop].float(), (0, STRIP * strips - d_in))
        found, of_words = nearest(rows.view(stop - start, 2 * strips, COLUMNS), 8)
        codes[start:stop] = found.flatten(1)
        scales[2 * start * strips : 2 * stop * strips] = of_words.flatten()
    return DenseIntegers(codes, scales, (d_out, d_in), weight.dtype)


def bits_of(values: str, pattern: Pattern) -> Bits | None:
    """Return the bits of the integers that a kind of `Values` stands for; None where it stands for none.

    Args:
        values: the kind.
        pattern: of the matrices.

    Raises:
        InputError: there is no such kind, or the pattern cannot be quantised.
    """
    check_values(values)
    bits = QUANTISED.get(values)
    if bits is not None and (reason := why_not(pattern)):
        raise InputError(f"{reason}: prune to {PATTERN}, or leave values out, which keeps the numbers as they are")
    return bits


def check_values(values: str) -> None:
    """Refuse what is no kind of `Values`: before anything is read, as it depends on nothing.

    Raises:
        InputError: there is no such kind.
    """
    if values not in get_args(Values):
        *others, last = get_args(Values)
        raise InputError(f"values is {values!r}: give {', '.join(others)} or {last}")


def why_not(pattern: Pattern) -> str:
    """Return why matrices in a pattern cannot be quantised; empty if they can."""
    return "" if pattern.text == PATTERN else f"weights are quantised at {PATTERN} alone, not at {pattern}"


def quantised_part_shapes(d_out: int, d_in: int, bits: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int]]:
    """Return the shapes of places, codes and scales of a quantised matrix."""
    strips = -(-d_in // STRIP)
    return (d_out, STRIP_PLACES * strips), (d_out, KEPT * bits // 8 * strips), (2 * d_out * strips + OVERREAD,)


def quantised_bytes(d_out: int, d_in: int, bits: int) -> int:
    """Return the bytes of places, codes and scales of a matrix, quantised."""
    places, codes, scales = quantised_part_shapes(d_out, d_in, bits)
    return places[0] * places[1] + codes[0] * codes[1] + 2 * scales[0]


def quantise(packed: PackedMatrix, bits: Bits) -> QuantisedMatrix:
    """Quantise the kept weights of a matrix, each to the nearest integer of the scale of its 64 columns.

    Weights that lie on such a grid of 4 bits already, as those do that a solver has put there, stay exactly what they
    are (`halve.maths.grid.recovered`); of others see `halve.maths.grid.nearest`.

    Args:
        packed: finite, at 2:4.
        bits: of an integer.

    Raises:
        InputError: another pattern, or weights too large for a float16 scale.
    """
    if reason := why_not(Pattern(packed.pattern)):
        raise InputError(reason)
    once = _quantised(packed, bits)
    # What has become 0 may be kept elsewhere, and other scales may do the same: as whoever packs it again finds it.
    return once if bits == 8 else _quantised(pack(unpack(once.dequantised()), PATTERN), bits)


def _quantised(packed: PackedMatrix, bits: Bits) -> QuantisedMatrix:
    filled, kept = -(-packed.d_in // STRIP) * KEPT, packed.kept
    integers = torch.zeros(packed.d_out, filled, dtype=torch.int8)
    scales = torch.zeros(packed.d_out, filled // WORD_KEPT, dtype=torch.float16)
    for start, stop in row_chunks(packed.shape):
        rows = packed.values[start * kept : stop * kept].view(stop - start, kept)
        rows = torch.nn.functional.pad(rows, (0, filled - kept)).view(-1, WORD_KEPT)
        found, of_words = _on_grid(rows, bits)
        integers[start:stop], scales[start:stop] = found.view(stop - start, -1), of_words.view(stop - start, -1)
    return assembled(packed, integers, scales, bits)


def _on_grid(rows: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Return integers and scales of rows of 32: those that they were made of, or the nearest."""
    if bits == 8:
        return nearest(rows.float(), bits)
    integers, scales, known = recovered(rows)
    left = (~known).nonzero().squeeze(-1)
    if len(left):
        integers[left], scales[left] = nearest(rows[left].float(), bits)
    return integers, scales


def assembled(packed: PackedMatrix, integers: Tensor, scales: Tensor, bits: Bits) -> QuantisedMatrix:
    """Return a quantised matrix that keeps what a packed one keeps.

    Args:
        packed: at 2:4; its values are not looked at.
        integers: int8, (d_out, 64 strips), 0 beyond d_in / 2.
        scales: float16, (d_out, 2 strips).
        bits: of an integer.
    """
    places = torch.empty(packed.d_out, integers.shape[1] // 4, dtype=torch.uint8)
    for start, stop in row_chunks(packed.shape):
        columns = spread(packed.mask[start:stop])[:, : packed.d_in].view(stop - start, -1, 4).to(torch.uint8)
        first = columns.argmax(-1).to(torch.uint8)
        last = 3 - columns.flip(-1).argmax(-1).to(torch.uint8)
        kept = torch.stack((first, last), dim=-1).flatten(1)
        fill = torch.tensor([0, 1], dtype=torch.uint8).repeat((integers.shape[1] - kept.shape[1]) // 2)
        kept = torch.cat((kept, fill.expand(len(kept), -1)), dim=-1).view(stop - start, -1, 4, STRIP_PLACES)
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
        places[start:stop] = (kept << shifts).sum(-2, dtype=torch.uint8).flatten(1)
    if bits == 8:
        codes = integers.view(torch.uint8)
    else:
        halves = (integers + 8).view(torch.uint8).view(packed.d_out, -1, 2, WORD_KEPT)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    padded = torch.cat((scales.flatten(), scales.new_zeros(OVERREAD)))
    return QuantisedMatrix(places, codes.contiguous(), padded, packed.shape, bits, packed.dtype)


def _kept_places(places: Tensor) -> Tensor:
    """Return the places of kept weights in their groups, uint8, (rows, 64 strips), of (rows, 16 strips) bytes."""
    bytes_of_strips = places.view(len(places), -1, 1, STRIP_PLACES)
    return (bytes_of_strips >> torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)).bitwise_and_(3).flatten(1)


def _integers(codes: Tensor, bits: int) -> Tensor:
    """Return the integers of kept weights, int8, (rows, 64 strips), of codes (rows, bytes)."""
    if bits == 8:
        return codes.view(torch.int8)
    words = codes.view(len(codes), -1, WORD_KEPT)
    return torch.stack((words & 15, words >> 4), dim=-2).to(torch.int8).sub_(8).flatten(1)
