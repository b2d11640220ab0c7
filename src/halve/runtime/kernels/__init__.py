"""Products with packed 2:4 matrices on a GPU, for the few rows of decoding; written in Triton, imported when asked for.

The matrices are those of `halve.runtime.packed_matrix` and `halve.runtime.quantised_matrix`, unchanged. Where a GPU
cannot multiply them, `unusable` says why.
"""

from functools import cache
from types import ModuleType

import torch

ROWS = 16
"""Rows of x that are multiplied with packed weights; for more, weights are unpacked."""
LANE_ROWS = 2
"""Rows up to which lanes multiply, as tensor cores do above: chosen by counting instructions, not measured."""
DTYPES = (torch.bfloat16, torch.float16)
"""Of inputs, products, and weights that are no integers."""
_CAPABILITY = (8, 0)
"""From which on tensor cores multiply bfloat16."""
_NO_ROOM = "out of memory"
"""What CUDA says, through PyTorch and through Triton."""


def unusable(device: torch.device | None = None) -> str:
    """Return why a GPU, None for the current one, cannot multiply packed matrices; empty if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    reason = _unusable(torch.cuda.current_device() if device is None or device.index is None else device.index)
    if _NO_ROOM in reason:  # which may pass
        _unusable.cache_clear()
    return reason


def describe(bits: int | None = None) -> str:
    """Return what multiplies packed matrices, where nothing is in the way; quantised ones of so many bits."""
    import triton

    return f"Triton {triton.__version__}, packed" + (f", int{bits}" if bits else "")


@cache
def compiled() -> ModuleType | None:
    """Return the module of the kernels; None if Triton is not installed."""
    try:
        from halve.runtime.kernels import triton_packed
    except ImportError:
        return None
    return triton_packed


@cache
def _unusable(index: int) -> str:
    if compiled() is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(index) < _CAPABILITY:
        return f"{torch.cuda.get_device_name(index)} has no tensor cores for bfloat16"
    try:
        _try(torch.device("cuda", index))
    except Exception as error:  # noqa: BLE001  a missing or failing compiler has no class of its own
        return f"Triton cannot run here ({type(error).__name__}: {' '.join(str(error).split())})"
    return ""


def _try(device: torch.device) -> None:
    """Multiply a small matrix, by lanes and by tensor cores.

    Raises:
        RuntimeError: the products are wrong.
    """
    from halve.runtime.kernels.gpu_matrix import GpuMatrix, sparse_linear
    from halve.runtime.packed_matrix import pack

    eye = torch.eye(64, dtype=torch.float16)
    matrix = GpuMatrix.of(pack(eye, "2:4"), device)
    for rows in (1, ROWS):
        x = torch.arange(64 * rows, dtype=torch.float16, device=device).view(rows, 64)
        if not torch.equal(sparse_linear(x, matrix), x):
            raise RuntimeError(f"a product of {rows} rows is wrong")
