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

from halve.errors import HalveError, InputError
from halve.maths.pattern import Pattern
from halve.model.layers import Layout, is_conv1d, layer_matrix
from halve.runtime.compressed_linear import CompressedLinear
from halve.torch_internals import default_algorithm, fastest_algorithm, shape_multiples

DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)
"""From which on there are sparse tensor cores, and whose generation alone CUTLASS's kernels are built for."""
_algorithms: dict[tuple[torch.Size, torch.dtype, torch.device, int], int] = {}
"""The fastest, by shape and dtype of the weight, device, and rows: a layer gets what was measured for its like."""
_ROWS_MULTIPLE = 8


def unusable(device: torch.device | None = None) -> str:
    """Return why a GPU, None for the current one, has no sparse tensor cores to use; empty if it has."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no sparse tensor cores"
    if capability[0] != _CAPABILITY[0] and not _searchable():
        return f"{torch.cuda.get_device_name(device)} needs cuSPARSELt, which this build of torch lacks"
    return ""


def unfit(d_out: int, d_in: int, dtype: torch.dtype) -> str:
    """Return why sparse tensor cores do not take a matrix of this shape, as half a sentence; empty if they do."""
    rows, columns = shape_multiples(_layout_type(), dtype)
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
        InputError: ``weight`` is no such tensor, or of a shape that the hardware does not take.
    """
    if weight.ndim != 2 or not _multiplied(weight):
        raise InputError(
            f"sparse tensor cores multiply float16 and bfloat16 matrices on a CUDA device, not {weight.dtype} of shape "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    if reason := unfit(weight.shape[0], weight.shape[1], weight.dtype):
        raise InputError(f"a weight of shape {tuple(weight.shape)} cannot be compressed: {reason}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is in prototype stage", UserWarning)  # nothing the user could do
        found = _layout_type().from_dense(weight.contiguous())
    if _searchable() and rows is not None:
        key = (weight.shape, weight.dtype, weight.device, padded_rows(rows))
        if key not in _algorithms:
            _algorithms[key] = _fastest(found, padded_rows(rows))
        found.alg_id_cusparselt = _algorithms[key]
    return found


def _fastest(compressed: SparseSemiStructuredTensor, rows: int) -> int:
    """Try all algorithms of cuSPARSELt on a product of so many rows, and return the fastest."""
    packed = compressed.packed
    assert packed is not None  # noqa: S101 - of cuSPARSELt's layout it never is
    inputs = torch.zeros(rows, compressed.shape[1], dtype=packed.dtype, device=packed.device)
    return fastest_algorithm(packed, inputs.t())


def _multiplied(matrix: Tensor) -> bool:
    """Whether sparse tensor cores multiply matrices of this dtype on this device."""
    return matrix.device.type == "cuda" and matrix.dtype in DTYPES


def _searchable() -> bool:
    return torch.backends.cusparselt.is_available()


def _layout_type() -> type[SparseSemiStructuredTensor]:
    return SparseSemiStructuredTensorCUSPARSELT if _searchable() else SparseSemiStructuredTensorCUTLASS


class SemiStructuredLinear(CompressedLinear):
    """``y = x Wᵀ + b`` with a 2:4 W on sparse tensor cores, without gradients.

    It can be moved and converted like any layer; where there are no sparse tensor cores, or none for its dtype, the
    weight is dense, and products are refused rather than slow.

    Args:
        matrix: W, (d_out, d_in), as for `compress`.
        bias: (d_out,), of the matrix's dtype.
        rows: number of rows of x that the algorithm is searched for; other numbers take the default one.
        layout: of the weight in the plain layer.

    Raises:
        InputError: as `compress`; the matrix is not 2:4.
        HalveError: the matrix does not come back from its compressed form.
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
        """Return (..., out_features) for x of shape (..., in_features), of the weight's dtype unless under autocast.

        Raises:
            InputError: the layer has been moved or converted to where there are no such products, or a gradient is
                asked for.
        """
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                product = self.forward(x.to(self._held.dtype))
            return product.to(torch.get_autocast_dtype(x.device.type))
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError("products on sparse tensor cores have no gradient: restore the plain layer for that")
        held = self._held
        if not isinstance(held, SparseSemiStructuredTensor):
            raise InputError(
                f"a layer for sparse tensor cores is {held.dtype} on {held.device}, where they do not "
                "multiply: move it back, or put the plain layer in its place with halve.runtime.accelerate.restore"
            )
        rows = x.numel() // self.in_features
        if not rows:
            return x.new_empty(*x.shape[:-1], self.out_features)
        flat = pad(x.reshape(rows, self.in_features), (0, 0, 0, padded_rows(rows) - rows))
        held.alg_id_cusparselt = self._algorithm if len(flat) == self.rows else default_algorithm(held)
        return linear(flat, held, self.bias)[:rows].view(*x.shape[:-1], self.out_features)

    def _dense(self) -> Tensor:
        held = self._held
        return _expanded(held) if isinstance(held, SparseSemiStructuredTensor) else held

    def _take(self, matrix: Tensor) -> None:
        matrix = matrix.to(self._held.device, self._held.dtype)
        self._held = self._compress(matrix) if _multiplied(matrix) else _checked(matrix)

    def _compress(self, matrix: Tensor) -> Tensor:
        found = compress(_checked(matrix), self.rows)
        self._algorithm = found.alg_id_cusparselt
        if not torch.equal(_expanded(found), matrix):
            raise HalveError(f"a matrix of shape {tuple(matrix.shape)} does not come back from its compressed form")
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held = self._held
        there = fn(torch.empty(0, dtype=held.dtype, device=held.device))
        if (there.dtype, there.device) != (held.dtype, held.device):
            matrix = fn(self._dense())
            self._held = self._compress(matrix) if _multiplied(matrix) else matrix
        return self


def _expanded(compressed: SparseSemiStructuredTensor) -> Tensor:
    """Return the dense matrix. cuSPARSELt's layout gives it as a product, of other rows than were searched for."""
    compressed.alg_id_cusparselt = default_algorithm(compressed)
    return cast("Tensor", compressed.to_dense())  # type: ignore[no-untyped-call]


def _checked(matrix: Tensor) -> Tensor:
    """Return the matrix if it is 2:4: compressing would drop weights of any other."""
    if not Pattern("2:4").satisfied_by(matrix):
        raise InputError("the matrix is not in pattern 2:4")
    return matrix
