"""Which layers of a model are packed, and why the others are not: one line in an engine's log when all are loaded."""

from collections import defaultdict
from collections.abc import Callable

from halve.errors import first_few
from halve.maths.grid import Bits
from halve.runtime.native import describe


def multiplied_by(device_type: str, bits: Bits | None) -> str:
    """Return what multiplies an engine's packed layers on a kind of device, integers of so many bits."""
    if device_type == "cpu":
        return describe(bits)
    return "sparse tensor cores through torch, Halve's Triton kernels are not used here"


class LayerTally:
    """Counts the layers of one model.

    Args:
        say: is given the line.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._expected: set[str] = set()
        self._packed: dict[str, tuple[int, int]] = {}
        self._dense: defaultdict[str, list[str]] = defaultdict(list)

    def expect(self, name: str) -> None:
        """Wait for a layer before the line is written."""
        self._expected.add(name)

    def leave(self, name: str, reason: str) -> None:
        """Put on record that a layer is dense, and why, as half a sentence."""
        if name not in self._dense[reason]:
            self._dense[reason].append(name)
        self._done(name)

    def pack(self, name: str, plain_bytes: int, nbytes: int) -> None:
        """Put on record that a layer is packed, in so many bytes instead of so many."""
        self._packed[name] = plain_bytes, nbytes
        self._done(name)

    def _done(self, name: str) -> None:
        if name not in self._expected:
            return
        self._expected.remove(name)
        if not self._expected:
            self._say(self.line())

    def line(self) -> str:
        """Return what is known so far, as one line."""
        dense = sum(map(len, self._dense.values()))
        plain, packed = (sum(sizes) for sizes in zip(*self._packed.values(), strict=True)) if self._packed else (0, 0)
        parts = [f"{len(self._packed)} of {len(self._packed) + dense} layers packed"]
        if self._packed:
            parts[0] += f", {plain / 1e6:.1f} MB of weights in {packed / 1e6:.1f} MB"
        parts += [f"{len(names)} dense because {reason}: {first_few(names)}" for reason, names in self._dense.items()]
        return "; ".join(parts)
