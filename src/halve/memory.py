"""What memory there is, asked before it is needed, and what was used: the one home of "does it fit into memory?".

Files on disk are asked for in `halve.checkpoint.room`.
"""

import resource
import sys

import psutil
import torch

from halve.errors import InputError

_CPU = torch.device("cpu")


def available_memory() -> int:
    """Return the bytes that processes can still have without swapping: of the whole machine.

    A container that is given less (a cgroup's limit) is not seen.
    """
    return int(psutil.virtual_memory().available)


def peak_memory() -> int:
    """Return the most resident memory in bytes that this process has had so far, as the kernel counted it.

    Of this psutil tells only the present value, from which a peak between two looks is missing. On Linux a program
    begins with the peak of the process that started it.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # macOS alone counts bytes, all others KiB: getrusage(2) of each
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, or kept by PyTorch for reuse."""
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
    if bytes_needed > free:
        raise InputError(
            f"{what} need {bytes_needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are available: {remedy}"
        )
