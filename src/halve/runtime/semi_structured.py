"""2:4 products on NVIDIA's sparse tensor cores, through torch.sparse: which algorithm is fastest is searched.

cuSPARSELt has several algorithms for a product, and its default is rarely the best: for every shape and number of rows
all are tried once. Where torch comes without cuSPARSELt, CUTLASS multiplies, and there is nothing to search.
"""

import warnings
from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from halve.errors import InputError
from halve.layers import Layout, is_conv1d, layer_matrix
from halve.pattern import Pattern
from halve.runtime.compressed_linear import CompressedLinear

DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)
_ROWS_MULTIPLE = 8


def unusable() -> str:
    """Return why this machine has no sparse tensor cores to use, empty if it has."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.cuda.get_device_capability() < _CAPABILITY:
        return f"{torch.cuda.get_device_name()} has no sparse tensor cores"
    return ""


def unfit(d_out: int, d_in: int, dtype: torch.dtype) -> str:
    """Return why sparse tensor cores do not take a matrix of this shape, as half a sentence; empty if they do."""
    limits = _layout_type()._DTYPE_SHAPE_CONSTRAINTS[dtype]  # noqa: SLF001 - nothing public tells
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    if d_out % rows == 0 and d_in % columns == 0:
        return ""
    return f"sparse tensor cores take multiples of {rows} x {columns} in {str(dtype).removeprefix('torch.')}"


def compressed_bytes(d_out: int, d_in: int, dtype: torch.dtype) -> int:
    """Return the bytes of a compressed matrix: half of the values in 16 bits, and two bits for each of them."""
    return d_out * d_in * dtype.itemsize * 9 // 16


def padded_rows(rows: int) -> int:
    """Return the rows that a sparse product multiplies for ``rows`` of them: the next multiple of 8."""
    return -(-rows // _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def compress(weight: Tensor, rows: int | None = None) -> SparseSemiStructuredTensor:
    """Return a 2:4 matrix in the layout of sparse tensor cores; ``torch.nn.functional.linear`` multiplies with it.

    Args:
        weight: (d_out, d_in), at 2:4, on a CUDA device, of a dtype in `DTYPES`.
        rows: of the inputs that the algorithm is searched for; None takes the default algorithm.

    Raises:
        InputError: ``weight`` is no such tensor, or of a shape the hardware does not take.
    """
    if weight.ndim != 2 or not _multiplied(weight):
        raise InputError(
            f"sparse tensor cores multiply float16 and bfloat16 matrices on a CUDA device, not {weight.dtype} of shape "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is in prototype stage", UserWarning)  # nothing the user could do
            found = _layout_type().from_dense(weight.contiguous())
    except RuntimeError as error:
        raise InputError(f"sparse tensor cores do not take a weight of shape {tuple(weight.shape)}: {error}") from error
    if _searchable() and rows is not None:
        inputs = pad(weight.new_zeros(rows, weight.shape[1]), (0, 0, 0, padded_rows(rows) - rows))
        packed = found.packed
        assert packed is not None  # noqa: S101 - from_dense has just made it
        found.alg_id_cusparselt = torch._cslt_sparse_mm_search(packed, inputs.t(), transpose_result=True)  # noqa: SLF001
    return found


def _multiplied(matrix: Tensor) -> bool:
    """Whether sparse tensor cores multiply matrices of this dtype on this device."""
    return matrix.device.type == "cuda" and matrix.dtype in DTYPES


def _searchable() -> bool:
    return torch.backends.cusparselt.is_available()


def _layout_type() -> type[SparseSemiStructuredTensor]:
    return SparseSemiStructuredTensorCUSPARSELT if _searchable() else SparseSemiStructuredTensorCUTLASS


class SemiStructuredLinear(CompressedLinear):
    """``y = x Wᵀ + b`` with a 2:4 W on sparse tensor cores.

    It can be moved and converted like any layer; where there are no sparse tensor cores, or none for its dtype, the
    weight is dense, and products are refused rather than slow.

    Args:
        matrix: W, (d_out, d_in), as for `compress`.
        bias: (d_out,), of the matrix's dtype.
        rows: number of rows of x that the algorithm is searched for; other numbers take the default one.
        layout: of the weight in the plain layer.

    Raises:
        InputError: as `compress`; the matrix is not 2:4.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None, rows: int, layout: Layout = "out_in") -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), bias, layout)
        self.rows = padded_rows(rows)
        self._held = self._compress(matrix)

    @classmethod
    def of(cls, layer: nn.Module, rows: int) -> Self:
        """Compress a ``Linear`` or ``Conv1D``; the bias is shared, not copied.

        Raises:
            InputError: as `compress`.
        """
        layout: Layout = "in_out" if is_conv1d(layer) else "out_in"
        return cls(layer_matrix(layer), cast("Tensor | None", layer.bias), rows, layout)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is held."""
        if not isinstance(self._held, SparseSemiStructuredTensor):
            return self._held.nbytes
        return compressed_bytes(self.out_features, self.in_features, self._held.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x of shape (..., in_features), of the weight's dtype.

        Raises:
            InputError: the layer has been moved or converted to where there are no such products.
        """
        held = self._held
        if not isinstance(held, SparseSemiStructuredTensor):
            raise InputError(
                f"a layer for sparse tensor cores is {held.dtype} on {held.device}, where they do not "
                "multiply: move it back, or put the plain layer in its place with halve.runtime.accelerate.restore"
            )
        rows = x.numel() // self.in_features
        flat = pad(x.reshape(rows, self.in_features), (0, 0, 0, padded_rows(rows) - rows))
        held.alg_id_cusparselt = self._algorithm if len(flat) == self.rows else held._DEFAULT_ALG_ID  # noqa: SLF001
        return linear(flat, held, self.bias)[:rows].view(*x.shape[:-1], self.out_features)

    def _dense(self) -> Tensor:
        held = self._held
        if isinstance(held, SparseSemiStructuredTensor):
            return cast("Tensor", held.to_dense())  # type: ignore[no-untyped-call]
        return held

    def _take(self, matrix: Tensor) -> None:
        matrix = matrix.to(self._held.device, self._held.dtype)
        self._held = self._compress(matrix) if _multiplied(matrix) else _checked(matrix)

    def _compress(self, matrix: Tensor) -> Tensor:
        found = compress(_checked(matrix), self.rows)
        self._algorithm = found.alg_id_cusparselt
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held = self._held
        there = fn(torch.empty(0, dtype=held.dtype, device=held.device))
        if (there.dtype, there.device) != (held.dtype, held.device):
            matrix = fn(self._dense())
            self._held = self._compress(matrix) if _multiplied(matrix) else matrix
        return self


def _checked(matrix: Tensor) -> Tensor:
    """Return the matrix if it is 2:4: compressing would drop weights of any other."""
    if not Pattern("2:4").satisfied_by(matrix):
        raise InputError("the matrix is not in pattern 2:4")
    return matrix
