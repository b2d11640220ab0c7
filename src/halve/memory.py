"""What memory there is, asked before it is needed."""

from pathlib import Path

import torch

from halve.errors import InputError

_MEMINFO = Path("/proc/meminfo")
_CPU = torch.device("cpu")


def available_memory() -> int | None:
    """Return the bytes that processes can still have without swapping; None where the system does not say."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, or kept by PyTorch for reuse; None where the system does not say."""
    if device.type != "cuda":
        return available_memory()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def check_memory(what: str, bytes_needed: int, remedy: str, device: torch.device = _CPU) -> None:
    """Refuse what cannot fit.

    Args:
        what: is going to be held, in the plural.
        bytes_needed: at least.
        remedy: what the user can do.
        device: where.

    Raises:
        InputError: less is available.
    """
    free = free_memory(device)
    if free is not None and bytes_needed > free:
        raise InputError(
            f"{what} need {bytes_needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are available: {remedy}"
        )
