"""A block on short samples: what goes through its layers, and everything that comes out of it."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halve.maths.linalg import full_precision
from halve.model.blocks import replaced_forward
from halve.model.calls import is_constant, leaves, put_together, to_device
from halve.model.layers import channel_parameters, has_own_weight
from halve.model.stream import Stream

_NOISE = 0.5
"""Noise on the hidden state, in its own standard deviations: no two positions are alike, which would hide a head."""

Change = Callable[[Tensor], Tensor]


class Passed:
    """What one pass of a sample showed.

    Attributes:
        inputs: of every layer, by its name in the block; of one that was called more than once, the last.
        outputs: likewise, where it is a tensor that the layer has computed.
        calls: how often each was called.
        returned: every tensor that the block returned, or has in what it was given.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.returned: list[Tensor] = []


class Trial:
    """Runs a block on short samples.

    Args:
        block: a float32 working copy.
        stream: of short samples, which is at this block; it stays there.
        place: the block's index in its stack.
        device: of the block.
        generator: on the CPU, for the noise.

    Attributes:
        layers: by name in the block: linear layers, convolutions, and what has a number of its own for each channel.
    """

    def __init__(
        self, block: nn.Module, stream: Stream, place: int, device: torch.device, generator: torch.Generator
    ) -> None:
        self.block = block
        self._stream = stream
        self._place = place
        self._device = device
        self._hidden: list[Tensor] = []
        self._unchanged: dict[int, Passed] = {}
        for sample in range(len(stream.hidden)):
            hidden = stream.hidden[sample].float()
            noise = torch.randn(hidden.shape, generator=generator)
            self._hidden.append((hidden + _NOISE * hidden.std() * noise).to(device))
        self.layers: Mapping[str, nn.Module] = {
            name: module
            for name, module in block.named_modules()
            if name and (has_own_weight(module) or channel_parameters(module))
        }

    @property
    def samples(self) -> range:
        """Their numbers."""
        return range(len(self._hidden))

    @property
    def has_positions(self) -> bool:
        """Whether every sample has several positions, without which attention mixes nothing."""
        return all(hidden.ndim >= 3 and hidden[0, ..., 0].numel() > 1 for hidden in self._hidden)

    def unchanged(self, sample: int) -> Passed:
        """Return what a pass of a sample shows in the block as it was first; it is run once."""
        if sample not in self._unchanged:
            self._unchanged[sample] = self.run(sample)
        return self._unchanged[sample]

    @torch.no_grad()
    def run(
        self, sample: int, changes: Mapping[str, Change] | None = None, given: Mapping[str, Tensor] | None = None
    ) -> Passed:
        """Run the block on a sample.

        Args:
            sample: its number.
            changes: what is done to the outputs of layers, by the name of the layer.
            given: what layers return, by name, instead of computing it; what is beyond them then sees no further back.
        """
        seen = Passed()
        call = self._stream.call(self._place, sample, self._device)
        args, kwargs = put_together(self._hidden[sample].clone(), call)
        with ExitStack() as stack, full_precision():
            for name, layer in self.layers.items():
                hook = partial(self._look, seen, name, (changes or {}).get(name), known=name in (given or {}))
                stack.enter_context(layer.register_forward_hook(hook))
            for name, output in (given or {}).items():
                stack.enter_context(replaced_forward(self.layers[name], lambda *_, _given=output, **__: _given.clone()))
            output = self.block(*args, **kwargs)
        seen.returned = [tensor.clone() for tensor in tensors_in((output, args, kwargs))]
        return seen

    def _look(
        self, seen: Passed, name: str, change: Change | None, _layer: nn.Module, args: Any, output: Any, *, known: bool
    ) -> Tensor | None:
        seen.calls[name] += 1
        if args and isinstance(args[0], Tensor):
            seen.inputs[name] = args[0].clone()  # an activation may be written over it
        found = output if change is None else change(output)
        if isinstance(found, Tensor) and not known:
            seen.outputs[name] = found.clone()
        return None if change is None else found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every floating-point tensor in a nest of containers and objects, always in the same order."""
    for _, leaf in leaves(value):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point():
                yield leaf
        elif not is_constant(leaf):
            memo: dict[int, Any] = {}
            copy.deepcopy(leaf, memo)
            yield from (each for each in memo.values() if isinstance(each, Tensor) and each.is_floating_point())


def unlike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest relative difference of tensors from others, infinity where they are not as many, or shaped so.

    From zeros, everything but zeros differs infinitely. A tensor that is not finite in both is left out of account,
    entry by entry, as masks are.
    """
    if len(found) != len(wanted) or any(one.shape != other.shape for one, other in zip(found, wanted, strict=True)):
        return float("inf")
    worst = 0.0
    for pair in zip(found, wanted, strict=True):
        one, other = to_device(pair, torch.device("cpu"), torch.float64)
        both = one.isfinite() & other.isfinite()
        if not torch.equal(one.isfinite(), other.isfinite()):
            return float("inf")
        difference, size = float((one[both] - other[both]).norm()), float(other[both].norm())
        if difference:
            worst = max(worst, difference / size if size else float("inf"))
    return worst
