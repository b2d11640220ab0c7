"""Packed matrices: one bit for every weight, and the values of the kept ones.

A row of ``d_in`` weights keeps the same number K of them whatever it holds: N of every group of ``N:M``,
``d_in - int(S d_in)`` for ``S%``. Groups with fewer non-zeros keep explicit zeros, the leftmost, so that a row's values
start at a known place and no table of offsets is needed. At 2:4 in 16 bits a group of four takes 36 bits instead of 64.

What packing does to zeros: a non-zero is always kept, then a -0.0 in preference to a +0.0. So a matrix whose pruned
weights are +0.0, which is how Halve writes them, comes back with the same bits. The one change there can be is that a
-0.0 beyond the N places of its group, or the K of its row, comes back as +0.0.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.runtime.compiled import library

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OVERREAD = 64
"""Values after the last kept one that mean nothing: a vector may be loaded whole wherever a kept value starts."""
_WORD = 64
"""Columns in a word of the mask; rows of the mask are padded with zero bits to whole words."""
_FOLDS = {2: ((1, 0x55),), 4: ((1, 0x55), (2, 0x33)), 8: ((1, 0x55), (2, 0x33), (4, 0x0F))}
"""For groups that fill bytes evenly: the shifts and masks that add up the bits of each."""
_ONE_EACH = {2: 0x55, 4: 0x11, 8: 0x01}
"""The byte that counts one in every group."""
_CHUNK = 1 << 22
"""Weights whose bits are spread out at a time: bounds the memory."""


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix of shape (d_out, d_in) in a sparsity pattern, packed; made by `pack`, or of parts read from a file.

    Shapes and dtypes are checked however it is made, so that no product reads outside its parts. That the mask keeps
    what the pattern says is left to `check_mask`: it reads every byte.

    Raises:
        InputError: the parts do not go together.
    """

    mask: Tensor
    """uint8, (d_out, 8 ceil(d_in / 64)): bit i of byte j is set if weight 8j + i is kept; K bits a row."""
    values: Tensor
    """(d_out K + 64,), of a dtype in `DTYPES`: the kept values row after row from left to right, then 64 of no meaning
    (see `OVERREAD`)."""
    shape: tuple[int, int]
    """(d_out, d_in), both at least 1."""
    pattern: str
    """``N:M`` or ``S%``."""

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise InputError(f"a packed matrix has two dimensions of at least 1, not shape {tuple(self.shape)}")
        mask, values = part_shapes(self.d_out, self.d_in, self.kept)
        check_part("mask", self.mask, (torch.uint8,), mask)
        check_part("values", self.values, DTYPES, values)

    def check_mask(self) -> None:
        """Check that the mask keeps exactly what the pattern allows of every group, and nothing beyond the row.

        Raises:
            InputError: it does not: the products would be finite, and wrong.
        """
        pattern = Pattern(self.pattern)
        keep, group = pattern.budget(self.d_in)
        whole = self.d_in // 8 if group in _FOLDS else 0
        for start, stop in row_chunks(self.shape):
            mask = self.mask[start:stop]
            wrong = (_counts(mask[:, :whole], group) != keep * _ONE_EACH[group]).any() if whole else False
            bits = spread(mask[:, whole:])
            rest = self.d_in - 8 * whole
            short = rest > 0 and bool((pattern.groups(bits[:, :rest]).sum(-1) != keep).any())
            if wrong or short or bits[:, rest:].any():
                raise InputError(f"the mask of a packed matrix does not keep what pattern {pattern} keeps of a group")

    @property
    def d_out(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def d_in(self) -> int:
        """Number of weights in a row."""
        return self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, and of the matrix unpacked."""
        return self.values.dtype

    @cached_property
    def kept(self) -> int:
        """Number K of values in a row."""
        return kept_per_row(Pattern(self.pattern), self.d_in)

    @cached_property
    def half_of_every_byte(self) -> bool:
        """Whether each byte of the mask keeps four of its eight weights, so that their values need no counting."""
        pattern = Pattern(self.pattern)
        return pattern.group is not None and 8 % pattern.group == 0 and pattern.sparsity == 0.5

    @property
    def nbytes(self) -> int:
        """Bytes of mask and values; the matrix unpacked has ``d_out * d_in * dtype.itemsize``."""
        return self.mask.nbytes + self.values.nbytes


def mask_bytes(d_in: int) -> int:
    """Return the bytes of mask for a row of ``d_in`` weights."""
    return -(-d_in // _WORD) * _WORD // 8


def kept_per_row(pattern: Pattern, d_in: int) -> int:
    """Return how many values a row of ``d_in`` weights stores.

    Raises:
        PatternError: such rows do not fit the pattern.
    """
    keep, group = pattern.budget(d_in)
    return d_in // group * keep


def part_shapes(d_out: int, d_in: int, kept: int) -> tuple[tuple[int, int], tuple[int]]:
    """Return the shapes of mask and values of a packed matrix that keeps so many values of each row."""
    return (d_out, mask_bytes(d_in)), (d_out * kept + OVERREAD,)


def packed_bytes(d_out: int, d_in: int, pattern: Pattern, dtype: torch.dtype) -> int:
    """Return the bytes of mask and values of a matrix, packed.

    Raises:
        PatternError: such a matrix does not fit the pattern.
    """
    mask, values = part_shapes(d_out, d_in, kept_per_row(pattern, d_in))
    return mask[0] * mask[1] + values[0] * dtype.itemsize


def pack(weight: Tensor, pattern: str | Pattern) -> PackedMatrix:
    """Pack a matrix that has the pattern already; what is kept is what is not zero, nothing is selected here.

    Args:
        weight: (d_out, d_in), on the CPU, of a dtype in `DTYPES`.
        pattern: ``N:M`` or ``S%``.

    Raises:
        PatternError: the pattern is malformed or does not fit ``d_in``.
        InputError: a group has more non-zeros than the pattern allows, or ``weight`` is no such tensor.
    """
    pattern = Pattern.parse(pattern)
    if weight.ndim != 2 or not weight.numel() or weight.dtype not in DTYPES or weight.device.type != "cpu":
        raise InputError(
            f"only matrices in {_names(DTYPES)} on the CPU are packed, "
            f"not {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        )
    weight = weight.detach().contiguous()
    d_out, d_in = weight.shape
    keep, group = pattern.budget(d_in)
    mask_shape, values_shape = part_shapes(d_out, d_in, kept_per_row(pattern, d_in))
    mask, values = torch.empty(mask_shape, dtype=torch.uint8), torch.zeros(values_shape, dtype=weight.dtype)
    if library is None:
        _check_pattern(weight, pattern)
        _pack_slowly(weight, pattern, mask, values)
    elif not library.pack(
        DTYPES.index(weight.dtype),
        weight.data_ptr(),
        d_out,
        d_in,
        keep,
        group,
        mask.data_ptr(),
        values.data_ptr(),
        torch.get_num_threads(),
    ):
        _check_pattern(weight, pattern)
        raise InputError(f"the matrix is not in pattern {pattern} if numbers that are nearly zero count as numbers")
    return PackedMatrix(mask, values, (d_out, d_in), pattern.text)


def _check_pattern(weight: Tensor, pattern: Pattern) -> None:
    denser = pattern.violating_groups(weight)
    if denser.any():
        row = int(denser.any(-1).nonzero()[0])
        raise InputError(
            f"the matrix is not in pattern {pattern}: {int(denser.sum())} of its {denser.numel()} groups have more "
            f"non-zeros, the first of them in row {row}"
        )


def _pack_slowly(weight: Tensor, pattern: Pattern, mask: Tensor, values: Tensor) -> None:
    """Fill mask and values with PyTorch: what the compiled function is held to."""
    used = 0
    for start, stop in row_chunks((weight.shape[0], weight.shape[1])):
        rows = weight[start:stop]
        keep = pattern.keep_mask((rows != 0).to(torch.uint8) * 2 + torch.signbit(rows).to(torch.uint8))
        mask[start:stop] = gather_bits(keep, mask.shape[1])
        kept = rows[keep]
        values[used : used + len(kept)] = kept
        used += len(kept)


def unpack(packed: PackedMatrix) -> Tensor:
    """Return the matrix, (d_out, d_in) in ``packed.dtype``, with +0.0 wherever nothing is kept."""
    weight = torch.zeros(packed.shape, dtype=packed.dtype)
    used = 0
    for start, stop in row_chunks(packed.shape):
        keep = spread(packed.mask[start:stop])[:, : packed.d_in]
        count = (stop - start) * packed.kept
        weight[start:stop][keep] = packed.values[used : used + count]
        used += count
    return weight


def check_part(name: str, part: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Check one tensor of a packed matrix.

    Raises:
        InputError: it has another dtype or shape, or lies elsewhere than contiguous on the CPU.
    """
    if part.dtype in dtypes and part.shape == shape and part.is_contiguous() and part.device.type == "cpu":
        return
    raise InputError(
        f"the {name} of a packed matrix must be contiguous on the CPU, {_names(dtypes)} of shape {shape}, "
        f"not {part.dtype} of shape {tuple(part.shape)} and strides {part.stride()} on {part.device}"
    )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def row_chunks(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the row ranges to work on one after the other."""
    d_out, d_in = shape
    step = max(1, _CHUNK // d_in)
    return [(start, min(start + step, d_out)) for start in range(0, d_out, step)]


def _counts(mask: Tensor, group: int) -> Tensor:
    """Turn bytes of mask into bytes of counts, one in the place of every group."""
    for shift, low in _FOLDS[group]:
        mask = (mask & low) + ((mask >> shift) & low)
    return mask


def spread(mask: Tensor) -> Tensor:
    """Turn (rows, bytes) of mask into bool, (rows, 8 bytes)."""
    return (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).bool().flatten(1)


def gather_bits(keep: Tensor, row_bytes: int) -> Tensor:
    """Turn bool, (rows, d_in), into (rows, row_bytes) of mask."""
    bits = keep.new_zeros(len(keep), 8 * row_bytes, dtype=torch.uint8)
    bits[:, : keep.shape[1]] = keep
    return (bits.view(len(keep), row_bytes, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
