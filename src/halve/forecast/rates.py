"""How fast this machine is, measured in a few seconds: what turns counted operations into time."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from halve.checkpoint.durable import write_file
from halve.checkpoint.shards import CHUNK
from halve.forecast.operations import Counts
from halve.maths.linalg import full_precision

_LARGEST = 2048
"""Side of the matrices that are measured: larger ones are no slower for their size."""
_ON_DISK = 1 << 27
"""Bytes that are read and written, at most."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        forward: operations of products in the dtype of forward passes.
        float32: operations of float32 products.
        factorisation: operations of Cholesky factorisations with inverses.
        bytes: that a pass over memory reads and writes.
        reading: bytes from disk.
        writing: bytes to disk, flushed, with their hash; 0 where that could not be measured.
    """

    forward: float
    float32: float
    factorisation: float
    bytes: float
    reading: float
    writing: float

    def seconds(self, counts: Counts) -> float:
        """Return how long it takes to do what was counted; nothing overlaps."""
        return (
            counts.forward / self.forward
            + counts.float32 / self.float32
            + counts.factorisation / self.factorisation
            + counts.bytes / self.bytes
        )


def measured_rates(
    device: torch.device,
    precision: torch.dtype,
    tokens: int,
    sides: Sequence[int],
    files: Sequence[Path],
    out: Path,
    *,
    lasting: float = 0.2,
) -> Rates:
    """Measure a device, at the shapes of a run.

    Args:
        device: where blocks run.
        precision: of the products in forward passes.
        tokens: in a batch.
        sides: of the matrices.
        files: of the model, for the disk that they are read from; none leaves reading as fast as writing.
        out: where is written to; the nearest directory above it is measured.
        lasting: seconds that each rate is measured for; three times of what is measured at least.
    """
    side = min(_LARGEST, max(sides, default=1))
    x = torch.randn(max(1, min(tokens, _LARGEST)), side, device=device)
    square = torch.randn(side, side, device=device)
    gram = square.mT @ square / side + torch.eye(side, device=device)
    narrow_x, narrow = x.to(precision), square.to(precision)
    took = partial(_typical, device, lasting)
    forward = 2.0 * x.numel() * side / took(lambda: narrow_x @ narrow)
    with full_precision():
        float32 = 2.0 * side**3 / took(lambda: square @ square)
        factorisation = side**3 / took(lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(gram).L))
    planes = torch.zeros(4, side, side, device=device)
    passes = 3.0 * planes.nbytes / took(lambda: planes.add_(planes))
    writing = _writing(out, lasting)
    reading = _reading(files) if files else writing or passes
    return Rates(forward, float32, factorisation, passes, reading, writing)


def _typical(device: torch.device, lasting: float, work: Callable[[], object]) -> float:
    """Return the median of the seconds that some work takes; the first time is not counted."""
    work()
    taken: list[float] = []
    while sum(taken) < lasting or len(taken) < 3:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[len(taken) // 2]


def _reading(files: Sequence[Path]) -> float:
    """Return the bytes a second from the largest file, which the system is asked to forget first."""
    path = max(files, key=lambda each: each.stat().st_size)
    begun, count = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, _ON_DISK, os.POSIX_FADV_DONTNEED)
        while count < _ON_DISK and (chunk := file.read(CHUNK)):
            count += len(chunk)
    return max(1, count) / max(1e-9, time.perf_counter() - begun)


def _writing(out: Path, lasting: float) -> float:
    """Return the bytes a second to the volume that an output directory is going to be on, 0 where none can be written.

    The directory itself is left alone: it may hold a run.
    """
    there = next(place for place in out.absolute().parents if place.is_dir())
    chunk, count = os.urandom(1 << 20), max(1, round(160 * lasting))
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".halve-") as folder:
            begun = time.perf_counter()
            write_file(Path(folder) / "rate", (chunk for _ in range(count)), "rate")
            return count * len(chunk) / (time.perf_counter() - begun)
    except OSError:
        return 0.0
