"""A packed matrix on a GPU, and products with it: packed for a few rows of x, unpacked tile by tile for more.

Inputs are not quantised here, whatever the weights are. Up to `halve.runtime.kernels.LANE_ROWS` rows are multiplied
with integers times their scales, unrounded; more rows with those products rounded once to the matrix's dtype, which are
the weights that `halve.runtime.quantised_matrix.QuantisedMatrix.dequantised` gives. Sums are in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from halve.device import on_device
from halve.errors import InputError
from halve.maths.grid import Bits
from halve.runtime.kernels import DTYPES, LANE_ROWS, ROWS, compiled
from halve.runtime.native import AnyPacked
from halve.runtime.packed_matrix import PackedMatrix
from halve.runtime.quantised_matrix import PATTERN, QuantisedMatrix

_TILE = 1 << 24
"""Weights unpacked at a time: 32 MB, which the second-level cache of a large GPU holds until they are multiplied."""
_LANE_BLOCK, _CORE_BLOCK = 8, 32
"""Rows of W that a program of lanes or of tensor cores is taken to have, for the number of splits."""
_PROGRAMS = 4
"""Programs wanted for each multiprocessor: enough to have loads under way while others sum."""
_SPLIT_COLUMNS = 1024
"""Columns that a program has at least."""
_MOST_SPLITS = 16


@dataclass(frozen=True, eq=False)
class GpuMatrix:
    """A matrix of shape (d_out, d_in) at 2:4, packed, on a GPU; made by `of`, or of parts that were."""

    parts: tuple[Tensor, ...]
    """Mask and values of a `PackedMatrix`; places, codes and scales of a `QuantisedMatrix`: the same bytes."""
    shape: tuple[int, int]
    """(d_out, d_in), d_in a multiple of 4."""
    bits: Bits | None
    """Of an integer; None where values are numbers of ``dtype``."""
    dtype: torch.dtype
    """Of x, of the products, and of the matrix unpacked; one of `halve.runtime.kernels.DTYPES` to be multiplied."""

    @classmethod
    def of(cls, packed: AnyPacked, device: torch.device) -> "GpuMatrix":
        """Copy a packed matrix to a GPU.

        Raises:
            InputError: its pattern is not 2:4.
        """
        if packed.pattern != PATTERN:
            raise InputError(f"packed matrices are multiplied on a GPU at {PATTERN} alone, not at {packed.pattern}")
        parts: tuple[Tensor, ...] = (packed.mask, packed.values) if isinstance(packed, PackedMatrix) else ()
        bits: Bits | None = None
        if isinstance(packed, QuantisedMatrix):
            parts, bits = (packed.places, packed.codes, packed.scales), packed.bits
        return cls(tuple(part.to(device) for part in parts), packed.shape, bits, packed.dtype)

    def packed(self) -> AnyPacked:
        """Return the matrix on the CPU."""
        first, second, *scales = (part.cpu() for part in self.parts)
        if self.bits is None:
            return PackedMatrix(first, second, self.shape, PATTERN)
        return QuantisedMatrix(first, second, scales[0], self.shape, self.bits, self.dtype)

    @property
    def device(self) -> torch.device:
        """Where the parts lie."""
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the parts; the matrix unpacked has ``d_out * d_in * dtype.itemsize``."""
        return sum(part.nbytes for part in self.parts)


def sparse_linear(x: Tensor, matrix: GpuMatrix, bias: Tensor | None = None, splits: int | None = None) -> Tensor:
    """Return ``x Wᵀ + bias``, summed in float32, without gradients.

    A number of x that is infinite or NaN counts where its weight is pruned or does not, by the number of rows.

    Args:
        x: (..., d_in), of the matrix's dtype, on its device.
        matrix: W, (d_out, d_in).
        bias: (d_out,), likewise.
        splits: parts that the columns are split into; None takes what `column_splits` says.

    Returns:
        Tensor: (..., d_out), of the matrix's dtype.

    Raises:
        InputError: shapes, dtypes or devices do not go together, or nothing multiplies there.
    """
    d_out, d_in = matrix.shape
    _check("x", x, matrix, fits=x.ndim > 0 and x.shape[-1] == d_in)
    if bias is not None:
        _check("bias", bias, matrix, fits=bias.shape == (d_out,))
    triton = _triton(matrix)
    flat = x.reshape(-1, d_in).contiguous()
    rows = len(flat)
    if not rows:
        return x.new_empty(*x.shape[:-1], d_out)
    if flat.storage_offset() % 4:  # it is read by words of four numbers
        flat = flat.clone()
    with torch.no_grad(), on_device(x.device):  # Triton launches on the current device, whatever holds x
        if rows <= ROWS:
            count = column_splits(d_out, d_in, rows, _processors(x.device)) if splits is None else splits
            y = triton.multiply(flat, matrix.parts, matrix.bits, bias, count)
        else:
            y = flat.new_empty(rows, d_out)
            for start, tile in _tiles(matrix):
                part = slice(start, start + len(tile))
                y[:, part] = linear(flat, tile, None if bias is None else bias[part])
    return cast("Tensor", y).view(*x.shape[:-1], d_out)


def unpacked(matrix: GpuMatrix) -> Tensor:
    """Return the matrix on its GPU, (d_out, d_in) in its dtype, with +0.0 wherever nothing is kept.

    Raises:
        InputError: nothing multiplies its dtype there.
    """
    whole = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    with on_device(matrix.device):
        for start, tile in _tiles(matrix):
            whole[start : start + len(tile)] = tile
    return whole


def _triton(matrix: GpuMatrix) -> ModuleType:
    """Return the module of the kernels, for a matrix that they can read."""
    found = compiled()
    if found is None:
        raise InputError("packed matrices are multiplied on a GPU by Triton, which is not installed: install it")
    if matrix.device.type != "cuda" and not found.INTERPRETED:
        raise InputError(
            f"this packed matrix is on {matrix.device}, and multiplied on a GPU alone: move it back, or put the plain "
            "layer in its place with halve.runtime.accelerate.restore"
        )
    if matrix.dtype not in DTYPES:
        raise InputError(f"packed matrices on a GPU multiply bfloat16 or float16, not {matrix.dtype}")
    return found


def column_splits(d_out: int, d_in: int, rows: int, processors: int) -> int:
    """Return how many parts the columns of a matrix are split into, so that a GPU has enough to do at once.

    Args:
        d_out: rows of the matrix.
        d_in: its columns.
        rows: of x.
        processors: multiprocessors of the GPU.
    """
    block = _LANE_BLOCK if rows <= LANE_ROWS else _CORE_BLOCK
    wanted = _PROGRAMS * processors // -(-d_out // block)
    most = min(wanted, d_in // _SPLIT_COLUMNS, _MOST_SPLITS)
    return 1 << max(0, most.bit_length() - 1)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _tiles(matrix: GpuMatrix) -> Iterator[tuple[int, Tensor]]:
    """Yield tiles of rows unpacked, each with the number of its first row; the next overwrites it."""
    triton = _triton(matrix)
    d_out, d_in = matrix.shape
    step = min(d_out, max(1, _TILE // d_in))
    buffer = torch.empty(step, d_in, dtype=matrix.dtype, device=matrix.device)
    for start in range(0, d_out, step):
        tile = buffer[: d_out - start]
        triton.expand(matrix.parts, matrix.bits, tile, start)
        yield start, tile


def _check(name: str, given: Tensor, matrix: GpuMatrix, *, fits: bool) -> None:
    if not fits or given.dtype != matrix.dtype or given.device != matrix.device:
        raise InputError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)} on {given.device}, which does not go with a packed "
            f"matrix of shape {matrix.shape} in {matrix.dtype} on {matrix.device}"
        )
    if given.requires_grad and torch.is_grad_enabled():
        raise InputError(f"packed products on a GPU have no gradient: multiply under torch.no_grad() or detach {name}")
