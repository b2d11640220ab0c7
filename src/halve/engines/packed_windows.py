"""Parts of packed matrices, and several as one: what fused layers and tensor parallelism make of a checkpoint's.

Nothing is unpacked to numbers and rounded again: masks, integers and scales stay what they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.runtime.native import AnyPacked
from halve.runtime.packed_matrix import (
    OVERREAD,
    PackedMatrix,
    gather_bits,
    kept_per_row,
    mask_bytes,
    row_chunks,
    spread,
)
from halve.runtime.quantised_matrix import KEPT, STRIP, WORD_KEPT, QuantisedMatrix, assembled

Range = tuple[int, int]
"""The first, and the one after the last."""
SCALE_COLUMNS = 2 * WORD_KEPT
"""Columns that share a scale."""


def window(matrix: AnyPacked, rows: Range, columns: Range, name: str) -> AnyPacked:
    """Return some rows and columns of a packed matrix, packed in the same way, in memory of its own.

    Args:
        matrix: (d_out, d_in).
        rows: which, of d_out.
        columns: which, of d_in.
        name: of the matrix, for the error.

    Raises:
        InputError: the columns cut a group of the pattern, or columns that share a scale.
    """
    if isinstance(matrix, QuantisedMatrix):
        return _quantised_window(matrix, rows, columns, name)
    return _plain_window(matrix, rows, columns, name)


def stacked(matrices: Sequence[AnyPacked]) -> AnyPacked | None:
    """Return packed matrices one below the other, as one; None if they are not all packed in the same way.

    Args:
        matrices: at least one, all of the same d_in.
    """
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if len({(type(one), one.dtype, one.pattern, getattr(one, "bits", None)) for one in matrices}) > 1:
        return None
    shape = sum(one.d_out for one in matrices), first.d_in
    quantised = [one for one in matrices if isinstance(one, QuantisedMatrix)]
    if isinstance(first, QuantisedMatrix):
        places = torch.cat([one.places for one in quantised])
        codes = torch.cat([one.codes for one in quantised])
        return QuantisedMatrix(
            places, codes, _end_to_end([one.scales for one in quantised]), shape, first.bits, first.dtype
        )
    plain = [one for one in matrices if isinstance(one, PackedMatrix)]
    mask = torch.cat([one.mask for one in plain])
    return PackedMatrix(mask, _end_to_end([one.values for one in plain]), shape, first.pattern)


def _end_to_end(values: Sequence[Tensor]) -> Tensor:
    """Return values or scales one after the other, with what means nothing at the end alone."""
    return torch.cat([*(each[:-OVERREAD] for each in values), values[0].new_zeros(OVERREAD)])


def _plain_window(matrix: PackedMatrix, rows: Range, columns: Range, name: str) -> PackedMatrix:
    (top, bottom), (left, right) = rows, columns
    pattern, values = Pattern(matrix.pattern), matrix.values[:-OVERREAD].view(matrix.d_out, matrix.kept)[top:bottom]
    if columns == (0, matrix.d_in):
        mask = matrix.mask[top:bottom].clone()
    else:
        if pattern.group is None or left % pattern.group or right % pattern.group:
            raise InputError(
                f"{name} would be split at columns {left} to {right}, which cuts groups of its pattern {pattern}: "
                "choose a tensor parallel size that keeps them whole"
            )
        kept = kept_per_row(pattern, right - left)
        first = kept_per_row(pattern, left) if left else 0
        values, mask = values[:, first : first + kept], _columns_of_mask(matrix.mask[top:bottom], left, right)
    padded = torch.cat((values.flatten(), values.new_zeros(OVERREAD)))
    return PackedMatrix(mask, padded, (bottom - top, right - left), matrix.pattern)


def _columns_of_mask(mask: Tensor, left: int, right: int) -> Tensor:
    found = torch.empty(len(mask), mask_bytes(right - left), dtype=torch.uint8)
    for start, stop in row_chunks((len(mask), 8 * mask.shape[1])):
        found[start:stop] = gather_bits(spread(mask[start:stop])[:, left:right], found.shape[1])
    return found


def _quantised_window(matrix: QuantisedMatrix, rows: Range, columns: Range, name: str) -> QuantisedMatrix:
    (top, bottom), (left, right) = rows, columns
    scales = matrix.scales_of_rows[top:bottom]
    if columns == (0, matrix.d_in):
        padded = torch.cat((scales.flatten(), scales.new_zeros(OVERREAD)))
        places, codes = matrix.places[top:bottom].clone(), matrix.codes[top:bottom].clone()
        return QuantisedMatrix(places, codes, padded, (bottom - top, right), matrix.bits, matrix.dtype)
    if left % SCALE_COLUMNS or (right % SCALE_COLUMNS and right != matrix.d_in):
        raise InputError(
            f"{name} would be split at columns {left} to {right}, which cuts {SCALE_COLUMNS} columns that share a "
            "scale: choose a tensor parallel size that keeps them whole, or pack with --values bf16"
        )
    of_rows = _quantised_window(matrix, rows, (0, matrix.d_in), name)
    taken = _plain_window(of_rows.dequantised(), (0, bottom - top), columns, name)
    strips = -(-(right - left) // STRIP)
    integers = of_rows.integers()[:, left // 2 : right // 2]
    scales = scales[:, left // SCALE_COLUMNS : -(-right // SCALE_COLUMNS)]
    filled = pad(integers, (0, strips * KEPT - integers.shape[1])), pad(scales, (0, 2 * strips - scales.shape[1]))
    return assembled(taken, *filled, matrix.bits)
