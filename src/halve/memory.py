"""What memory there is, asked before it is needed, and what was used: the one home of "does it fit into memory?".

Files on disk are asked for in `halve.checkpoint.room`.
"""

import ctypes
import resource
import sys
from pathlib import Path

import psutil
import torch

from halve.errors import InputError

_CPU = torch.device("cpu")
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Where a container sees its control group, with the files of its limit and use: of version 2, and of version 1."""
_MUCH = 0.5
"""Share of the free memory from which something is left on disk: a run needs some besides."""


def available_memory() -> int:
    """Return the bytes that this process can still have without swapping: of the machine, or of its container."""
    return min([int(psutil.virtual_memory().available), *_left_in_container()])


def _left_in_container() -> list[int]:
    """Return what the control group of a container leaves, nothing where it sets no limit (Linux: cgroups(7))."""
    found = []
    for folder, limit, used in _GROUPS:
        try:
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # none, or "max"
            continue
        files = [int(facts.get(f"total_{name}", facts.get(name, 0))) for name in ("inactive_file", "active_file")]
        found.append(max(0, most - now + sum(files)))  # pages of files are given back
    return found


def would_fill(bytes_needed: int) -> bool:
    """Whether something would take so much of the free memory that it had better be on disk."""
    return bytes_needed > _MUCH * available_memory()


def trim() -> None:
    """Let the C library give freed memory back to the system: glibc keeps pieces of up to 32 MB, a block's worth."""
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and gives back by itself
        if give_back is not None:
            give_back(0)


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


def whole_memory(device: torch.device) -> int:
    """Return the bytes that a device has, free or not."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().total)
    return int(torch.cuda.get_device_properties(device).total_memory)


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
