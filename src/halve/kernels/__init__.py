"""Compiled fast paths; without them everything works through PyTorch, slower, and `describe` says so."""

import torch
from torch import Tensor

try:
    from halve.kernels import _native
except ImportError:
    _native = None  # type: ignore[assignment]

_REASON = "the native kernel is not built (no C++ compiler at installation?): the slower PyTorch reference runs"


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that this processor can run, best first; empty if nothing was compiled."""
    return _native.instruction_sets() if _native is not None else ()


def available() -> bool:
    """Whether the compiled kernels can be used."""
    return bool(instruction_sets())


def describe() -> str:
    """Return the instruction set in use, or why there is none."""
    return f"native, {instruction_sets()[0]}" if available() else _REASON


def prox_two_of_four(z: Tensor, lam: float, instruction_set: str | None = None) -> Tensor | None:
    """Return the proximal operator of ``lam e_3`` for groups of four, on as many threads as torch uses.

    Args:
        z: contiguous float32 or float64 tensor on the CPU, its number of elements a multiple of 4.
        lam: positive and finite.
        instruction_set: one of `instruction_sets`; None takes the best.

    Returns:
        Tensor | None: a new tensor like ``z``; None if ``z`` holds NaN or infinity.

    Raises:
        ValueError: ``z`` is anything else, nothing was compiled, or the processor lacks the instruction set.
    """
    suits = z.is_contiguous() and z.device.type == "cpu" and z.dtype in (torch.float32, torch.float64)
    if not (available() and suits and z.numel() % 4 == 0):
        raise ValueError(
            f"no kernel for {z.dtype} of shape {tuple(z.shape)} and strides {z.stride()} on {z.device} ({describe()})"
        )
    out = torch.empty_like(z)
    name = instruction_set or instruction_sets()[0]
    wide = z.dtype == torch.float64
    finite = _native.two_of_four(z.data_ptr(), out.data_ptr(), z.numel() // 4, lam, wide, torch.get_num_threads(), name)
    return out if finite else None
