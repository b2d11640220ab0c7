"""Which channels between layers may move together, found by trying: with what is between, norms and convolutions.

Every layer is made to return what it returned before, and one of them that with a change in one channel. What then sees
the change is fed by that layer directly, through activations, products or sums, but through no other weights. Where the
change comes to one channel of another layer, the two are tied, and all that is tied to the inputs of a consumer has to
move with them: who makes them, the norms, scales and depthwise convolutions that they pass, and who else reads them, as
a gate of squeeze and excitation does. What reaches more than one channel, or leaves the block, spoils it. As in
`halve.order.finding`, what is found is a guess, and `halve.order.proving` judges it.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from halve.model.layers import (
    channel_parameters,
    is_convolution,
    is_depthwise,
    is_linear,
    layer_matrix,
    parameter_or_buffer,
)
from halve.order.finding import changed, moves_along, reached
from halve.order.folds import Fold, Move, segments
from halve.order.trial import Passed, Trial

_TRIED = 4
"""Outputs of every layer that are tried."""


@dataclass(frozen=True)
class _Layer:
    """A layer as a place that channels come from and go to.

    Attributes:
        name: in the block.
        axis: of its outputs along which the channels are, from the end.
        reads: number of channels that come in.
        makes: number of channels that go out.
        passes: whether every channel that goes out is that which came in, with numbers of its own.
        groups: of a convolution: so many runs of outputs see different inputs.
    """

    name: str
    axis: int
    reads: int
    makes: int
    passes: bool = False
    groups: int = 1


@dataclass(frozen=True)
class _Tie:
    """One channel of a layer that reaches some inputs of another directly."""

    source: str
    channel: int
    target: str
    reached: tuple[int, ...]


def find_chains(trial: Trial, consumers: Collection[str], fixed: Collection[str], seed: int) -> list[Fold]:
    """Guess the folds of a block whose channels pass norms or convolutions, or any that `find_folds` did not find.

    Args:
        trial: of the block.
        consumers: weights whose inputs may be reordered, by their names in the block.
        fixed: parameters and buffers of the block that must not move.
        seed: which outputs are tried.

    Returns:
        list[Fold]: one for all consumers that read the same channels, the largest of them being the one that is named;
            in the order of the layers.
    """
    if not trial.has_positions:
        return []
    channels = _Channels(trial, seed)
    folds: list[Fold] = []
    seen: set[str] = set()
    for name in channels.layers:
        if f"{name}.weight" not in consumers or name in seen:
            continue
        found = channels.tied_to(name)
        if found is None:
            continue
        readers, makers = found
        seen |= readers
        candidates = [reader for reader in readers if f"{reader}.weight" in consumers]
        leader = max(sorted(candidates), key=lambda each: parameter_or_buffer(trial.block, f"{each}.weight").numel())
        fold = channels.fold(leader, readers, makers)
        if fold is not None and not any(move.parameter in fixed for move in fold.moves):
            folds.append(fold)
    return folds


class _Channels:
    """The ties between the layers of a block.

    Args:
        trial: of the block.
        seed: which channels are tried.

    Attributes:
        layers: those that one pass calls once, by name.
    """

    def __init__(self, trial: Trial, seed: int) -> None:
        self._trial = trial
        before = trial.unchanged(0)
        called = [name for name in trial.layers if before.calls[name] == 1]
        given = {name: before.outputs[name] for name in called if name in before.inputs and name in before.outputs}
        found = ((name, self._layer(name, given, before)) for name in given)
        self.layers = {name: layer for name, layer in found if layer is not None}
        self._into: defaultdict[str, list[_Tie]] = defaultdict(list)
        self._out_of: defaultdict[str, list[_Tie]] = defaultdict(list)
        self._leaving: set[str] = set()
        self._try({name: given[name] for name in self.layers}, torch.Generator().manual_seed(seed))

    def _layer(self, name: str, given: dict[str, Tensor], before: Passed) -> _Layer | None:
        """Describe a layer; None for one that turns out not to treat channels one by one."""
        module = self._trial.layers[name]
        if is_convolution(module):
            passes = is_depthwise(module)
            return _Layer(name, -3, module.in_channels, module.out_channels, passes, 1 if passes else module.groups)
        if is_linear(module):
            makes, reads = layer_matrix(module).shape
            return _Layer(name, -1, reads, makes)
        if before.inputs[name].shape != given[name].shape:
            return None
        axis = self._axis_of(name, {other: output for other, output in given.items() if other != name}, given[name])
        return None if axis is None else _Layer(name, axis, *(2 * (given[name].shape[axis],)), passes=True)

    def _axis_of(self, name: str, others: dict[str, Tensor], output: Tensor) -> int | None:
        """Return along which axis of its outputs a norm has its channels: one number that changes, changes one."""
        for leaf in channel_parameters(self._trial.layers[name]):
            tensor = parameter_or_buffer(self._trial.block, f"{name}.{leaf}")
            kept, channel = tensor.data, tensor.numel() // 2
            tensor.data = kept.clone()
            tensor.data.view(-1)[channel] += 1.0
            try:
                after = self._trial.run(0, given=others).outputs[name]
            finally:
                tensor.data = kept
            places = torch.nonzero(after != output).tolist()
            axes = [
                axis
                for axis in range(-output.ndim, 0)
                if output.shape[axis] == kept.numel() and {place[axis] for place in places} == {channel}
            ]
            if places:
                return axes[0] if len(axes) == 1 else None
        return None

    def _try(self, given: dict[str, Tensor], generator: torch.Generator) -> None:
        """Change some outputs of every layer, all others being as they were, and keep what that reaches."""
        before = self._trial.run(0, given=given)
        for layer in self.layers.values():
            for part in segments(layer.makes, _TRIED):
                channel = part.start + int(torch.randint(len(part), (), generator=generator))
                own = changed(given[layer.name], channel, layer.axis)
                after = self._trial.run(0, given={**given, layer.name: own})
                if not _alike(after.returned, before.returned):
                    self._leaving.add(layer.name)
                for target in self.layers.values():
                    axis = -1 if is_linear(self._trial.layers[target.name]) else target.axis
                    inputs = reached(after.inputs.get(target.name), before.inputs[target.name], axis)
                    if inputs:
                        tie = _Tie(layer.name, channel, target.name, inputs)
                        self._into[target.name].append(tie)
                        self._out_of[layer.name].append(tie)

    def tied_to(self, consumer: str) -> tuple[set[str], dict[str, set[int]]] | None:
        """Return who reads the channels that come into a consumer, and who makes them, from which of its outputs on.

        None where one of them treats them otherwise than one by one, or they leave the block.
        """
        width = self.layers[consumer].reads
        readers, makers = {consumer}, defaultdict[str, set[int]](set)
        left = [(consumer, False)]
        while left:
            name, made = left.pop()
            layer = self.layers[name]
            if made and name in self._leaving:
                return None
            for tie in self._out_of[name] if made else self._into[name]:
                if len(tie.reached) != 1 or self.layers[tie.target].reads != width:
                    return None
                if tie.source not in makers:
                    left.append((tie.source, True))
                if tie.target not in readers:
                    left.append((tie.target, False))
                makers[tie.source].add(tie.channel - tie.reached[0])
                readers.add(tie.target)
            if not layer.passes:
                continue
            if made and name not in readers:
                left.append((name, False))
                readers.add(name)
            elif not made and name not in makers:
                left.append((name, True))
                makers[name].add(0)
        return readers, makers

    def fold(self, leader: str, readers: Collection[str], makers: dict[str, set[int]]) -> Fold | None:
        """Return the fold of channels that the leader reads, None where they are in no order that could be moved."""
        sources = [name for name in makers if not self.layers[name].passes]
        if not sources or any(self.layers[name].groups > 1 for name in readers):
            return None
        total = self.layers[leader].reads
        groups = {self.layers[name].groups for name in sources}
        units = max(groups)
        if len(groups - {1}) > 1 or total % units:
            return None
        for name, starts in makers.items():
            places = sorted(starts)
            last = self.layers[name].makes - total
            apart = all(after - first >= total for first, after in pairwise(places))
            if places[0] < 0 or places[-1] > last or not apart or (self.layers[name].groups > 1 and last):
                return None
        width = total // units
        moves = moves_along(self._trial, leader, 1, 0, width)
        others = [name for name in self.layers if name in readers and name != leader and not self.layers[name].passes]
        moves += [move for name in others for move in moves_along(self._trial, name, 1, 0, width)]
        for name in self.layers:
            for start in sorted(makers.get(name, ())):
                moves += self._making(name, start, width)
        return Fold(f"{leader}.weight", units, width, tuple(moves))

    def _making(self, name: str, start: int, width: int) -> list[Move]:
        if not self.layers[name].passes:
            return moves_along(self._trial, name, 0, start, width)
        leaves = channel_parameters(self._trial.layers[name])
        return [Move(f"{name}.{leaf}", dim, start, width) for leaf, dim in leaves.items()]


def _alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))
