"""One process at a time: who writes to a directory holds its lock, and a killed process leaves none behind.

The package filelock would not make this shorter: up to 3 it empties a file that another process holds, which says
who; 4 leaves writing that down to us, and where ``flock`` is missing takes a file that a killed process leaves behind.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halve.checkpoint.durable import crash_point
from halve.errors import InputError


@contextmanager
def locked(path: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a directory for this process alone.

    Args:
        path: the lock's file, made if it does not exist.
        out: the directory, for the message.

    Raises:
        InputError: another process holds it; the message names that process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise InputError(
                f"{out} is being written by another process ({holder}): wait for it, or write to another directory"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
        crash_point("unlock")
    finally:
        os.close(descriptor)
