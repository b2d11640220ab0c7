"""2:4 products on NVIDIA's sparse tensor cores, through torch.sparse: which algorithm is fastest is searched.

cuSPARSELt has several algorithms for a product, and its default is rarely the best: for every shape and number of rows
all are tried once. Where torch comes without cuSPARSELt, CUTLASS multiplies, and there is nothing to search.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from halve.errors import InputError

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
