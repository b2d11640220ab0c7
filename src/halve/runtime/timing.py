"""Timing that holds on a machine that is not idle: contenders take turns, caches are defeated, medians count."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from halve.errors import InputError
from halve.torch_internals import keep_gpu_busy

CACHES = 4
"""How many last-level caches the copies of a weight fill together."""
_UNKNOWN_CACHE = 64 << 20
FLUSH_BYTES = 1 << 28
"""More than the second-level cache of any GPU."""
_WAIT_CYCLES = 2_000_000
"""For about a millisecond the GPU waits, while Python gets ahead of it: launches then cost no device time."""


@dataclass(frozen=True)
class Turns:
    """Seconds of every turn of one contender.

    Attributes:
        call: from the call to its end; on a GPU until it is synchronised, launches included.
        device: what the GPU itself took; on the CPU the same as ``call``.
    """

    call: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median of the device's seconds."""
        return statistics.median(self.device)

    @property
    def call_seconds(self) -> float:
        """Median of the calls' seconds."""
        return statistics.median(self.call)


def last_level_cache() -> int:
    """Return the bytes of the processor's largest cache; 64 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = (int(size[:-1]) * units[size[-1]] for size in sizes if size[:-1].isdigit() and size[-1] in units)
    return max(known, default=_UNKNOWN_CACHE)


def copies_beyond_cache(nbytes: int, cache: int | None = None) -> int:
    """Return how many copies of a weight have to be gone round so that none is still in a cache when it is read.

    Args:
        nbytes: of one copy.
        cache: bytes of the last-level cache; None asks the system.
    """
    return max(2, -(-CACHES * (last_level_cache() if cache is None else cache) // nbytes))


def take_turns(
    contenders: Mapping[str, Sequence[Callable[[], object]]],
    *,
    device: torch.device,
    least: int = 5,
    most: int = 50,
    seconds: float = 0.5,
) -> dict[str, Turns]:
    """Time calls that do the same work, one turn each, round after round.

    Args:
        contenders: by name, the calls that one of them goes round: each with a copy of the weights of its own, so
            that they are read from memory. On a GPU the cache is flushed before every call instead.
        device: where they compute.
        least: rounds at least; one more goes before them and is not counted.
        most: rounds at most.
        seconds: after which no round is begun, beyond the least.

    Raises:
        InputError: there is nothing to time.
    """
    if not contenders or not all(contenders.values()) or least < 1:
        raise InputError("there is nothing to time: every contender needs a call, and at least one round")
    turn = _gpu_turn() if device.type == "cuda" else _cpu_turn
    found = {name: Turns() for name in contenders}
    deadline = time.perf_counter() + seconds
    for number in range(max(least, most) + 1):
        if number > least and time.perf_counter() > deadline:
            break
        for name, calls in contenders.items():
            call_seconds, device_seconds = turn(calls[number % len(calls)])
            if number:
                found[name].call.append(call_seconds)
                found[name].device.append(device_seconds)
    return found


def _cpu_turn(call: Callable[[], object]) -> tuple[float, float]:
    begin = time.perf_counter()
    call()
    taken = time.perf_counter() - begin
    return taken, taken


def _gpu_turn() -> Callable[[Callable[[], object]], tuple[float, float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def turn(call: Callable[[], object]) -> tuple[float, float]:
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        flush.zero_()
        keep_gpu_busy(_WAIT_CYCLES)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start, begin.elapsed_time(end) / 1e3

    return turn
