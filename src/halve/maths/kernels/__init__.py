"""Compiled fast paths; without them everything works through PyTorch, slower, and `describe` says so.

On the CPU it is the module built from ``src/native``, on a GPU a Triton kernel, imported when first asked for.
"""

import importlib.metadata
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

try:
    from halve.maths.kernels import _native
except ImportError:
    _native = None  # type: ignore[assignment]

_SLOWER = "the slower PyTorch reference runs"


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that this processor can run, best first; empty if nothing was compiled."""
    return _native.instruction_sets() if _native is not None else ()


def available(device_type: str = "cpu") -> bool:
    """Whether there is a compiled kernel for this type of device."""
    return bool(dtypes(device_type))


def dtypes(device_type: str = "cpu") -> tuple[torch.dtype, ...]:
    """Return what the kernel for this type of device reads and writes; empty if there is no kernel."""
    if device_type == "cpu" and instruction_sets():
        return (torch.float32, torch.float64)
    if device_type == "cuda" and _on_gpu()[0] is not None:
        return (torch.float32, torch.bfloat16, torch.float16)
    return ()


def describe(device_type: str = "cpu") -> str:
    """Return what computes on this type of device: the kernel and what it was built for, or why there is none."""
    if device_type == "cuda":
        return _on_gpu()[1]
    if device_type != "cpu":
        return f"there is no kernel for {device_type}: {_SLOWER}"
    if not available():
        return f"the native kernel is not built (no C++ compiler at installation?): {_SLOWER}"
    return f"native, {instruction_sets()[0]}"


def missing() -> list[str]:
    """Return why there is no kernel, for every type of device of this machine that has none."""
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [describe(device_type) for device_type in here if not available(device_type)]


def prox_two_of_four(z: Tensor, lam: float, instruction_set: str | None = None) -> Tensor | None:
    """Return the proximal operator of ``lam e_3`` for groups of four; on the CPU on as many threads as torch uses.

    Args:
        z: contiguous tensor, its number of elements a multiple of 4, of a dtype in `dtypes` for its device.
        lam: positive and finite, and within float32 on a GPU.
        instruction_set: on the CPU, one of `instruction_sets`; None takes the best.

    Returns:
        Tensor | None: a new tensor like ``z``; None if ``z`` holds NaN or infinity.

    Raises:
        ValueError: ``z`` is anything else, there is no kernel, or the processor lacks the instruction set.
    """
    device_type = z.device.type
    if not (z.is_contiguous() and z.dtype in dtypes(device_type) and z.numel() % 4 == 0):
        raise ValueError(
            f"no kernel for {z.dtype} of shape {tuple(z.shape)} and strides {z.stride()} on {z.device} "
            f"({describe(device_type)})"
        )
    gpu = _on_gpu()[0] if device_type == "cuda" else None
    if gpu is not None:
        with torch.cuda.device(z.device):  # Triton launches on the current device, whatever holds z
            return gpu(z, lam)
    out = torch.empty_like(z)
    name = instruction_set or instruction_sets()[0]
    wide = z.dtype == torch.float64
    finite = _native.two_of_four(z.data_ptr(), out.data_ptr(), z.numel() // 4, lam, wide, torch.get_num_threads(), name)
    return out if finite else None


@cache
def _on_gpu() -> tuple[Callable[[Tensor, float], Tensor | None] | None, str]:
    """Return the Triton kernel and its name, or None and why there is none."""
    try:
        from halve.maths.kernels import triton_two_of_four
    except ImportError:
        return None, f"Triton is not installed: {_SLOWER}"
    if torch.cuda.is_available():
        try:
            triton_two_of_four.prox_two_of_four(torch.ones(4, device="cuda"), 1.0)
        except Exception as error:  # noqa: BLE001  a missing or failing compiler has no class of its own
            return None, f"Triton cannot run here ({type(error).__name__}: {error}): {_SLOWER}"
    return triton_two_of_four.prox_two_of_four, f"Triton {importlib.metadata.version('triton')}"
