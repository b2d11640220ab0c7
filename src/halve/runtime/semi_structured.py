"""2:4 products on NVIDIA's sparse tensor cores, through torch.sparse: which algorithm is fastest is searched.

cuSPARSELt has several algorithms for a product, and its default is rarely the best: for every shape and number of rows
all are tried once. Where torch comes without cuSPARSELt, CUTLASS multiplies, and there is nothing to search.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from halve.errors import InputError
from halve.layers import Layout, is_conv1d, layer_matrix, matrix_view, plain_layer

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


def padded_rows(rows: int) -> int:
    """Return the rows that a sparse product multiplies for ``rows`` of them: the next multiple of 8."""
    return -(-rows // _ROWS_MULTIPLE) * _ROWS_MULTIPLE


def compress(weight: Tensor, rows: int | None = None) -> Tensor:
    """Return a 2:4 matrix in the layout of sparse tensor cores; ``torch.nn.functional.linear`` multiplies with it.

    Args:
        weight: (d_out, d_in), at 2:4, on a CUDA device, of a dtype in `DTYPES`.
        rows: of the inputs that the algorithm is searched for; None takes the default algorithm.

    Raises:
        InputError: ``weight`` is no such tensor, or of a shape the hardware does not take.
    """
    if weight.ndim != 2 or weight.dtype not in DTYPES or weight.device.type != "cuda":
        raise InputError(
            f"sparse tensor cores multiply float16 and bfloat16 matrices on a CUDA device, not {weight.dtype} of shape "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    searchable = torch.backends.cusparselt.is_available()
    kind = (
        torch.sparse.SparseSemiStructuredTensorCUSPARSELT
        if searchable
        else torch.sparse.SparseSemiStructuredTensorCUTLASS
    )
    try:
        found = kind.from_dense(weight.contiguous())
    except RuntimeError as error:
        raise InputError(f"sparse tensor cores do not take a weight of shape {tuple(weight.shape)}: {error}") from error
    if searchable and rows is not None:
        inputs = pad(weight.new_zeros(rows, weight.shape[1]), (0, 0, 0, padded_rows(rows) - rows))
        packed = found.packed
        assert packed is not None  # noqa: S101 - from_dense has just made it
        found.alg_id_cusparselt = torch._cslt_sparse_mm_search(packed, inputs.t(), transpose_result=True)  # noqa: SLF001
    return found


class SemiStructuredLinear(nn.Module):
    """``y = x Wᵀ + b`` with a 2:4 W on sparse tensor cores, for inference.

    Its ``state_dict`` is that of the plain layer, so that whatever saves the model writes an ordinary checkpoint.

    Args:
        matrix: W, (d_out, d_in), as for `compress`.
        bias: (d_out,), of the matrix's dtype.
        rows: number of rows of x that the algorithm is searched for; other numbers take the default one.
        layout: how the weight lies in the ``state_dict``, and in the plain layer.

    Raises:
        InputError: as `compress`.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None, rows: int, layout: Layout = "out_in") -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.layout: Layout = layout
        self.rows = padded_rows(rows)
        self._compressed = compress(matrix, rows)
        self._searched = getattr(self._compressed, "alg_id_cusparselt", None)
        self._default = getattr(type(self._compressed), "_DEFAULT_ALG_ID", None)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Module, rows: int) -> "SemiStructuredLinear":
        """Compress a ``Linear`` or ``Conv1D``.

        Raises:
            InputError: as `compress`.
        """
        layout: Layout = "in_out" if is_conv1d(layer) else "out_in"
        return cls(layer_matrix(layer), cast("Tensor | None", layer.bias), rows, layout)

    def plain(self) -> nn.Module:
        """Return the plain layer; the bias is shared."""
        return plain_layer(self._dense(), self.bias, self.layout)

    @property
    def weight(self) -> Tensor:
        """The plain layer's weight, expanded anew: for code that looks at it, not for products."""
        return matrix_view(self._dense(), None, self.layout).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed weight: at 2:4 in 16 bits, values and two bits for each."""
        return self.out_features * self.in_features * self._compressed.dtype.itemsize * 9 // 16

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x of shape (..., in_features), of the weight's dtype."""
        rows = x.numel() // self.in_features
        flat = pad(x.reshape(rows, self.in_features), (0, 0, 0, padded_rows(rows) - rows))
        if self._searched is not None:
            chosen = self._searched if len(flat) == self.rows else self._default
            self._compressed.alg_id_cusparselt = chosen  # type: ignore[attr-defined]
        return linear(flat, self._compressed, self.bias)[:rows].view(*x.shape[:-1], self.out_features)

    def _dense(self) -> Tensor:
        return self._compressed.to_dense()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)
