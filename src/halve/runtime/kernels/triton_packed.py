"""Products with packed 2:4 matrices on a GPU, and unpacking there; importing this needs Triton.

Of a group of four columns are read one word of x, four numbers of 16 bits, and the two kept weights with their places.
A program takes a block of rows of W and one part of the columns (split-K), and sums in float32; `_add_up` adds the
parts in the order of the columns, so that the same configuration gives the same bits.

Up to `LANE_ROWS` rows of x, every lane picks the two of x's four numbers that its group multiplies, in registers:
nothing is gathered from memory, and weights are not spread out. With more rows tensor cores multiply, for which a
group's two weights are spread over four tiles, one a column of the group; since a product does not mind the order of
its columns, these tiles are never woven into one.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from halve.runtime.kernels import LANE_ROWS
from halve.runtime.kernels.triton_groups import (
    bits_of,
    four_numbers,
    integers,
    narrowed,
    places_of_bits,
    places_of_bytes,
    scales,
    spread,
    two_numbers,
)

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton interprets these kernels, on the CPU, instead of compiling them."""
_SUM_BLOCK = 256
_EXPANDED = {"BLOCK_ROWS": 8, "BLOCK": 64}
_KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Config = Mapping[str, int]
"""``BLOCK_ROWS`` rows of W, and ``BLOCK`` groups of four columns; of integers, words of two bytes of places."""


def multiply(
    x: Tensor,
    parts: tuple[Tensor, ...],
    bits: int | None,
    bias: Tensor | None,
    splits: int,
    config: Config | None = None,
) -> Tensor:
    """Return ``x Wᵀ + bias``, (rows, d_out) in x's dtype, of sums in float32.

    Args:
        x: (rows, d_in), 1 to 16 rows, contiguous, bfloat16 or float16, d_in a multiple of 4, its storage offset too;
            on a GPU, or anywhere under Triton's interpreter (``TRITON_INTERPRET=1`` when this module is imported).
        parts: of W, there too: mask and values of `halve.runtime.packed_matrix.PackedMatrix`, or places, codes and
            scales of `halve.runtime.quantised_matrix.QuantisedMatrix`.
        bits: of the integers; None where there are none.
        bias: (d_out,), of x's dtype.
        splits: parts that the columns are split into.
        config: of the kernel; None takes the fastest of `_CONFIGS`, which are tried once a process for every shape,
            kind of weights and number of splits (and in the interpreter the first).
    """
    rows, d_in = x.shape
    d_out = len(parts[0])
    cores = rows > LANE_ROWS
    words = [part.view(dtype) for part, dtype in zip(parts, _WORDS[bits], strict=True)]
    columns = d_in // 4 if not bits else words[0].shape[1]
    out = torch.empty(rows, d_out, dtype=x.dtype, device=x.device)
    sums = out if splits == 1 else torch.empty(splits, rows, d_out, dtype=torch.float32, device=x.device)
    kind = bool(bits), cores
    given: dict[str, Any] = {"BITS": bits} if bits else {}
    if cores:
        given["WIDE"] = INTERPRETED  # it has no products of bfloat16
    if config is None and INTERPRETED:
        config = _CONFIGS[kind][0].kwargs
    kernel = _TUNED[*kind, x.dtype] if config is None else _KERNELS[kind]

    def grid(meta: Mapping[str, int]) -> tuple[int, int]:
        return triton.cdiv(d_out, meta["BLOCK_ROWS"]), splits

    kernel[grid](
        x.view(torch.int64),
        *words,
        bias,
        sums,
        rows,
        d_out,
        d_in // 4,
        columns,
        splits,
        KIND=_KINDS[x.dtype],
        **given,
        **(config or {}),
    )
    if splits > 1:
        size = rows * d_out
        _add_up[(triton.cdiv(size, _SUM_BLOCK),)](sums, bias, out, size, d_out, splits, BLOCK=_SUM_BLOCK)
    return out


def expand(parts: tuple[Tensor, ...], bits: int | None, out: Tensor, start: int) -> None:
    """Write rows of W unpacked, from ``start`` on, an integer as its product with its scale rounded once.

    Args:
        parts: as for `multiply`.
        bits: of the integers; None where there are none.
        out: (rows, d_in), contiguous, bfloat16 or float16, its storage offset a multiple of 4.
        start: the first of the rows.
    """
    rows, d_in = out.shape
    words = [part.view(dtype) for part, dtype in zip(parts, _WORDS[bits], strict=True)]
    columns = d_in // 4 if not bits else words[0].shape[1]
    grid = triton.cdiv(rows, _EXPANDED["BLOCK_ROWS"]), triton.cdiv(columns, _EXPANDED["BLOCK"])
    kernel: Any = _expand_integers if bits else _expand_numbers
    given: dict[str, Any] = {"BITS": bits} if bits else {}
    kernel[grid](
        *words, out.view(torch.int64), start, rows, d_in // 4, columns, KIND=_KINDS[out.dtype], **given, **_EXPANDED
    )


@triton.jit
def _add_row(y, first, last, at0, at1, at2, at3, x_ptr, group, groups, KIND: tl.constexpr):
    """Return sums of groups, (rows of W, groups), with the products of one row of x added."""
    # A load for every row of W, from the nearest cache: one for all would go round through shared memory and barriers.
    at = tl.broadcast_to(group[None, :], first.shape)
    x0, x1, x2, x3 = four_numbers(tl.load(x_ptr + at, mask=at < groups, other=0), KIND, True)
    y += first * tl.where(at0, x0, tl.where(at1, x1, x2))
    y += last * tl.where(at3, x3, tl.where(at2, x2, x1))
    return y


@triton.jit
def _by_lanes(y, z, first, last, at0, at1, at2, at3, x_ptr, group, rows: tl.constexpr, groups, KIND: tl.constexpr):
    """Return the sums for one row of x or two, (rows of W, groups) each, with products added."""
    y = _add_row(y, first, last, at0, at1, at2, at3, x_ptr, group, groups, KIND)
    if rows == 2:
        z = _add_row(z, first, last, at0, at1, at2, at3, x_ptr + groups, group, groups, KIND)
    return y, z


@triton.jit
def _by_cores(y, first, last, at0, at1, at2, at3, x_ptr, group, rows, groups, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Return sums, (rows of W, 16 rows of x), with products of tensor cores added."""
    row = tl.arange(0, 16)[:, None]
    inside = (row < rows) & (group < groups)[None, :]
    word = tl.load(x_ptr + row * groups + group[None, :], mask=inside, other=0)
    x0, x1, x2, x3 = four_numbers(word, KIND, WIDE)
    w0, w1, w2, w3 = spread(first, last, at0, at1, at2, at3)
    y = tl.dot(w0, tl.trans(x0), y)
    y = tl.dot(w1, tl.trans(x1), y)
    y = tl.dot(w2, tl.trans(x2), y)
    return tl.dot(w3, tl.trans(x3), y)


@triton.jit
def _write(y, row, bias_ptr, out_ptr, rows, d_out, splits, BLOCK_ROWS: tl.constexpr):
    """Write sums, (rows of x, rows of W): the product if columns are not split, else where this part's sums belong."""
    column = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if bias_ptr is not None:  # noqa: SIM102 - known when compiled, the other when it runs
        if splits == 1:
            y += tl.load(bias_ptr + column, mask=column < d_out, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(1) * rows + row)[:, None] * d_out + column[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < d_out)[None, :])


@triton.jit
def _write_lanes(y, z, bias_ptr, out_ptr, rows: tl.constexpr, d_out, splits, BLOCK_ROWS: tl.constexpr):
    _write(tl.sum(y, 1)[None, :], tl.arange(0, 1), bias_ptr, out_ptr, rows, d_out, splits, BLOCK_ROWS)
    if rows == 2:
        _write(tl.sum(z, 1)[None, :], tl.arange(0, 1) + 1, bias_ptr, out_ptr, rows, d_out, splits, BLOCK_ROWS)


@triton.jit
def _numbers_by_lanes(
    x_ptr,
    mask_ptr,
    values_ptr,
    bias_ptr,
    out_ptr,
    rows: tl.constexpr,
    d_out,
    groups,
    columns,
    splits,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.minimum(tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), d_out - 1).to(tl.int64)
    steps = tl.cdiv(columns, BLOCK * splits)
    y = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    z = y
    for step in range(steps):
        group = (tl.program_id(1) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        at0, at1, at2, at3 = places_of_bits(mask_ptr, row, group, groups, (groups + 15) // 16 * 2)
        pair = tl.load(values_ptr + row[:, None] * groups + group[None, :], mask=(group < groups)[None, :], other=0)
        first, last = two_numbers(pair, KIND, True)
        y, z = _by_lanes(y, z, first, last, at0, at1, at2, at3, x_ptr, group, rows, groups, KIND)
    _write_lanes(y, z, bias_ptr, out_ptr, rows, d_out, splits, BLOCK_ROWS)


@triton.jit
def _numbers_by_cores(
    x_ptr,
    mask_ptr,
    values_ptr,
    bias_ptr,
    out_ptr,
    rows,
    d_out,
    groups,
    columns,
    splits,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.minimum(tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), d_out - 1).to(tl.int64)
    steps = tl.cdiv(columns, BLOCK * splits)
    y = tl.zeros((BLOCK_ROWS, 16), dtype=tl.float32)
    for step in range(steps):
        group = (tl.program_id(1) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        at0, at1, at2, at3 = places_of_bits(mask_ptr, row, group, groups, (groups + 15) // 16 * 2)
        pair = tl.load(values_ptr + row[:, None] * groups + group[None, :], mask=(group < groups)[None, :], other=0)
        first, last = two_numbers(pair, KIND, WIDE)
        y = _by_cores(y, first, last, at0, at1, at2, at3, x_ptr, group, rows, groups, KIND, WIDE)
    _write(tl.trans(y), tl.arange(0, 16), bias_ptr, out_ptr, rows, d_out, splits, BLOCK_ROWS)


@triton.jit
def _integers_by_lanes(
    x_ptr,
    places_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    rows: tl.constexpr,
    d_out,
    groups,
    columns,
    splits,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.minimum(tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), d_out - 1).to(tl.int64)
    steps = tl.cdiv(columns, BLOCK * splits)
    y = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    z = y
    for step in range(steps):
        word = (tl.program_id(1) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = (word < columns)[None, :]
        places = tl.load(places_ptr + row[:, None] * columns + word[None, :], mask=inside, other=0).to(tl.int32)
        for half in tl.static_range(2):  # of a strip, with a scale each
            scale = scales(scales_ptr, row, word, half, columns)
            u = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
            v = u
            for odd in tl.static_range(2):
                at0, at1, at2, at3 = places_of_bytes(places, 2 * half + odd)
                first, last = integers(codes_ptr, row, word, 2 * half + odd, columns, BITS)
                group = word // 8 * 32 + (16 * half + 8 * odd) + word % 8
                u, v = _by_lanes(u, v, first, last, at0, at1, at2, at3, x_ptr, group, rows, groups, KIND)
            y += scale * u
            z += scale * v
    _write_lanes(y, z, bias_ptr, out_ptr, rows, d_out, splits, BLOCK_ROWS)


@triton.jit
def _integers_by_cores(
    x_ptr,
    places_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    rows,
    d_out,
    groups,
    columns,
    splits,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.minimum(tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), d_out - 1).to(tl.int64)
    steps = tl.cdiv(columns, BLOCK * splits)
    y = tl.zeros((BLOCK_ROWS, 16), dtype=tl.float32)
    for step in range(steps):
        word = (tl.program_id(1) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = (word < columns)[None, :]
        places = tl.load(places_ptr + row[:, None] * columns + word[None, :], mask=inside, other=0).to(tl.int32)
        for q in tl.static_range(4):
            at0, at1, at2, at3 = places_of_bytes(places, q)
            scale = scales(scales_ptr, row, word, q // 2, columns)
            first, last = integers(codes_ptr, row, word, q, columns, BITS)
            group = word // 8 * 32 + 8 * q + word % 8
            first = narrowed(first * scale, KIND, WIDE)
            last = narrowed(last * scale, KIND, WIDE)
            y = _by_cores(y, first, last, at0, at1, at2, at3, x_ptr, group, rows, groups, KIND, WIDE)
    _write(tl.trans(y), tl.arange(0, 16), bias_ptr, out_ptr, rows, d_out, splits, BLOCK_ROWS)


@triton.jit
def _add_up(sums_ptr, bias_ptr, out_ptr, size, d_out, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(splits):
        total += tl.load(sums_ptr + part * size + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % d_out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _write_groups(out_ptr, row, rows, group, groups, first, last, at0, at1, at2, at3):
    """Write the weights of groups, four numbers of 16 bits each, as one word a group."""
    w0, w1, w2, w3 = spread(bits_of(first), bits_of(last), at0, at1, at2, at3)
    low = (w0 | (w1 << 16)).to(tl.int64) & 0xFFFFFFFF
    word = low | ((w2 | (w3 << 16)).to(tl.int64) << 32)
    inside = (row < rows)[:, None] & (group < groups)[None, :]
    tl.store(out_ptr + row[:, None] * groups + group[None, :], word, mask=inside)


@triton.jit
def _expand_numbers(
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
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    source = start + tl.minimum(row, rows - 1)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at0, at1, at2, at3 = places_of_bits(mask_ptr, source, group, groups, (columns + 15) // 16 * 2)
    pair = tl.load(values_ptr + source[:, None] * groups + group[None, :], mask=(group < groups)[None, :], other=0)
    first, last = two_numbers(pair, KIND, False)
    _write_groups(out_ptr, row, rows, group, groups, first, last, at0, at1, at2, at3)


@triton.jit
def _expand_integers(
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


_WORDS: dict[int | None, tuple[torch.dtype, ...]] = {
    None: (torch.int32, torch.int32),
    8: (torch.int16, torch.int16, torch.float16),
    4: (torch.int16, torch.int16, torch.float16),
}
"""What the parts are read as, by the bits of integers."""


def _configs(*sizes: tuple[int, int, int]) -> list[triton.Config]:
    return [
        triton.Config({"BLOCK_ROWS": rows, "BLOCK": block}, num_warps=warps, num_stages=2)
        for rows, block, warps in sizes
    ]


_CONFIGS = {
    # (whether integers, whether tensor cores): rows of W, groups or words along the columns, warps.
    # Lanes: each has one row, or two, and from two to four loads of 16 bytes under way. Tensor cores: 32 rows for many
    # programs where d_out is small, 64 and 128 to read x less often.
    (False, False): _configs((4, 512, 4), (4, 256, 4), (2, 512, 2), (8, 256, 4), (8, 128, 4), (16, 128, 4)),
    (True, False): _configs((8, 64, 2), (16, 64, 4), (4, 128, 2), (8, 128, 4), (4, 256, 4), (8, 32, 1)),
    (False, True): _configs((32, 32, 4), (64, 32, 4), (64, 64, 4), (128, 32, 4), (64, 32, 8)),
    (True, True): _configs((32, 16, 4), (64, 16, 4), (32, 32, 4), (128, 16, 4), (64, 32, 8)),
}
_KERNELS: dict[tuple[bool, bool], Any] = {
    (False, False): _numbers_by_lanes,
    (True, False): _integers_by_lanes,
    (False, True): _numbers_by_cores,
    (True, True): _integers_by_cores,
}
_TUNED: dict[tuple[bool, bool, torch.dtype], Any] = {
    # One for each dtype, which cannot be in the key: what Triton keeps on disk has to be JSON.
    (*kind, dtype): triton.autotune(
        _CONFIGS[kind],
        key=["d_out", "groups", "splits", *(["BITS"] if kind[0] else []), *([] if kind[1] else ["rows"])],
    )(kernel)
    for kind, kernel in _KERNELS.items()
    for dtype in _KINDS
}
