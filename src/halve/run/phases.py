"""Seconds and peak memory by phase of a run."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

_INTERVAL = 0.05
"""Seconds between two looks at the memory."""


class Phase(StrEnum):
    """What a run is doing; its seconds and memory are counted by these, and listeners are told.

    Seconds are counted for those from ``LOAD`` to ``VERIFY``; the others only tell what is about to happen.
    """

    LOAD = "load"
    MEASURE = "measure"
    """Which matrices are faster sparse."""
    CALIBRATE = "calibrate"
    DAMAGE = "damage"
    """Which matrices cost most."""
    EVALUATE = "evaluate"
    """Perplexity, and top-1 accuracy, of the dense model and of the pruned one."""
    CAPTURE = "capture"
    """What enters the first block."""
    GRADIENTS = "gradients"
    """Backward passes for the methods that weigh gradients."""
    COLLECT = "collect"
    """Forward passes that gather statistics."""
    REORDER = "reorder"
    """Folds of channels are found and proven, and their orders chosen."""
    SOLVE = "solve"
    NORMS = "norms"
    """Forward passes for the statistics of batch norms."""
    RECONSTRUCT = "reconstruct"
    REPLAY = "replay"
    """Forward passes through the pruned block, and through the dense one."""
    COMMIT = "commit"
    """Keeping a finished block."""
    WRITE = "write"
    VERIFY = "verify"
    GENERATE = "generate"
    """The model is going to write its calibration text."""
    PLAN = "plan"
    RESTORE = "restore"
    """A matrix is taken over from an earlier process."""
    DONE = "done"


class Phases:
    """Adds up the wall-clock seconds of every phase, and keeps the most memory that was seen in it.

    Memory is looked at 20 times a second, so that a shorter peak can be missed.

    Args:
        device: where the work is done; the memory of a CUDA device is kept too, and what it synchronises is counted.

    Attributes:
        device: see above.
        seconds: by phase, in the order in which phases began first.
        peak_memory: bytes of this process's resident memory, by phase.
        peak_device_memory: bytes allocated on the CUDA device, by phase; empty without one.
    """

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self._taken: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, int] = {}
        self.peak_device_memory: dict[str, int] = {}

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Count what is done inside towards a phase; not to be nested."""
        import torch  # the command line imports this module for its names, and has to come up at once

        self.seconds.setdefault(phase, 0.0)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        try:
            with self._watching(phase):
                yield
                if on_gpu:
                    torch.cuda.synchronize(self.device)
        finally:
            self.seconds[phase] += time.perf_counter() - started
            if on_gpu:
                allocated = torch.cuda.max_memory_allocated(self.device)
                self.peak_device_memory[phase] = max(allocated, self.peak_device_memory.get(phase, 0))

    @contextmanager
    def _watching(self, phase: str) -> Iterator[None]:
        process, done = psutil.Process(), threading.Event()

        def look() -> None:
            self.peak_memory[phase] = max(process.memory_info().rss, self.peak_memory.get(phase, 0))

        def watch() -> None:
            while not done.wait(_INTERVAL):
                look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            look()

    def take(self) -> dict[str, Any]:
        """Return the seconds since the last call, and the peaks, as plain JSON values to keep with a finished block."""
        spent = {phase: value - self._taken.get(phase, 0.0) for phase, value in self.seconds.items()}
        self._taken = dict(self.seconds)
        return {
            "seconds": spent,
            "peak_memory": dict(self.peak_memory),
            "peak_device_memory": dict(self.peak_device_memory),
        }

    def add(self, taken: Mapping[str, Any]) -> None:
        """Count what an earlier process did, which `take` returned there."""
        for phase, value in taken["seconds"].items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
            self._taken[phase] = self._taken.get(phase, 0.0) + value
        for mine, theirs in (
            (self.peak_memory, taken["peak_memory"]),
            (self.peak_device_memory, taken["peak_device_memory"]),
        ):
            mine.update({phase: max(value, mine.get(phase, 0)) for phase, value in theirs.items()})
