"""The kernels that write rows of a packed matrix unpacked, for `halve.runtime.kernels.triton_packed.expand`."""

import triton
import triton.language as tl

from halve.runtime.kernels.triton_groups import (
    bits_of,
    integers,
    places_of_bits,
    places_of_bytes,
    scales,
    spread,
    two_numbers,
)


@triton.jit
def _write_groups(out_ptr, row, rows, group, groups, first, last, at0, at1, at2, at3):
    """Write the weights of groups, four numbers of 16 bits each, as one word a group."""
    w0, w1, w2, w3 = spread(bits_of(first), bits_of(last), at0, at1, at2, at3)
    low = (w0 | (w1 << 16)).to(tl.int64) & 0xFFFFFFFF
    word = low | ((w2 | (w3 << 16)).to(tl.int64) << 32)
    inside = (row < rows)[:, None] & (group < groups)[None, :]
    tl.store(out_ptr + row[:, None] * groups + group[None, :], word, mask=inside)


@triton.jit
def expand_numbers(
    mask_ptr,
    values_ptr,
    out_ptr,
    start,
    rows,
    groups,
    columns,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write rows of a matrix of numbers, (rows, 4 * groups), each group as one word, from row ``start`` of it on."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    source = start + tl.minimum(row, rows - 1)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at0, at1, at2, at3 = places_of_bits(mask_ptr, source, group, groups, (columns + 15) // 16 * 2)
    pair = tl.load(values_ptr + source[:, None] * groups + group[None, :], mask=(group < groups)[None, :], other=0)
    first, last = two_numbers(pair, KIND, False)
    _write_groups(out_ptr, row, rows, group, groups, first, last, at0, at1, at2, at3)


@triton.jit
def expand_integers(
    places_ptr,
    codes_ptr,
    scales_ptr,
    out_ptr,
    start,
    rows,
    groups,
    columns,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the same of a matrix of integers, each times its scale, rounded once; ``columns`` of places in a row."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    source = start + tl.minimum(row, rows - 1)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (word < columns)[None, :]
    places = tl.load(places_ptr + source[:, None] * columns + word[None, :], mask=inside, other=0).to(tl.int32)
    for q in tl.static_range(4):
        at0, at1, at2, at3 = places_of_bytes(places, q)
        scale = scales(scales_ptr, source, word, q // 2, columns)
        first, last = integers(codes_ptr, source, word, q, columns, BITS)
        first, last = (first * scale).to(KIND), (last * scale).to(KIND)
        group = word // 8 * 32 + 8 * q + word % 8
        _write_groups(out_ptr, row, rows, group, groups, first, last, at0, at1, at2, at3)
