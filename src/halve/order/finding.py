"""Which folds a block may have, found by trying: an output of one layer is changed, and it is seen what that reaches.

Where single outputs of a layer reach single inputs of another, the two are tied channel by channel: gate and up to
down, values to the output projection, several copies where query heads share a head of values. Where they reach whole
runs of neighbouring inputs, as queries do, these are the heads, which channels must not leave. Nothing is known of
names. What is found here is a guess from a few outputs, and `halve.order.proving` judges it.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from halve.model.layers import is_conv1d, is_linear, layer_matrix
from halve.order.folds import Fold, Move, segments
from halve.order.trial import Trial

_FEW, _MANY = 8, 24
"""Outputs of a layer that are tried: of one that is wider than its inputs, many, since it may be several in one."""
_TAIL = 8
"""Of the many, so many are of the last eighth, where the values are."""
_REACHED = 1e-5
"""Least change of an input, as a share of the largest one: others are rounding."""


@dataclass(frozen=True)
class _Tie:
    """One output of a layer that reaches some inputs of another: ``row`` of the one, ``reached`` of the other."""

    layer: str
    row: int
    reached: tuple[int, ...]


def find_folds(trial: Trial, consumers: Collection[str], fixed: Collection[str], seed: int) -> list[Fold]:
    """Guess the folds of a block.

    Args:
        trial: of the block.
        consumers: weights whose inputs may be reordered, by their names in the block.
        fixed: parameters of the block that must not move.
        seed: which outputs are tried.

    Returns:
        list[Fold]: at most one a consumer, in the order of the layers.
    """
    if not trial.has_positions:
        return []
    generator = torch.Generator().manual_seed(seed)
    before = trial.unchanged(0)
    linear = [name for name, module in trial.layers.items() if is_linear(module)]
    once = [name for name in linear if before.calls[name] == 1 and name in before.inputs]
    targets = [name for name in once if f"{name}.weight" in consumers and f"{name}.weight" not in fixed]
    ties: defaultdict[str, list[_Tie]] = defaultdict(list)
    for source in once:
        names = {f"{source}.{leaf}" for leaf, _ in trial.layers[source].named_parameters(recurse=False)}
        d_out, d_in = layer_matrix(trial.layers[source]).shape
        for row in _tried(d_out, d_in, generator):
            after = trial.run(0, {source: partial(changed, channel=row)})
            for target in targets:
                places = reached(after.inputs.get(target), before.inputs[target])
                if target != source and places and names.isdisjoint(fixed):
                    ties[target].append(_Tie(source, row, places))
    folds = (_fold(trial, target, ties[target]) for target in targets)
    return [fold for fold in folds if fold is not None]


def _tried(d_out: int, d_in: int, generator: torch.Generator) -> list[int]:
    """Draw outputs from all parts of a layer."""
    parts = list(segments(d_out, _MANY - _TAIL if d_out > d_in else _FEW))
    if d_out > d_in:
        tail = range(d_out - d_out // 8, d_out)
        parts += [range(tail.start + part.start, tail.start + part.stop) for part in segments(len(tail), _TAIL)]
    drawn = [part.start + int(torch.randint(len(part), (), generator=generator)) for part in parts if len(part)]
    return sorted(set(drawn))


def changed(output: Tensor, channel: int, axis: int = -1) -> Tensor:
    """Return outputs with a wave added to one channel, of the height of all."""
    found = output.clone()
    one = found.select(axis, channel)
    wave = torch.linspace(1.0, 9.0, one.numel(), device=output.device).cos()
    one += (found.std() + 1e-3) * wave.view_as(one)
    return found


def reached(after: Tensor | None, before: Tensor, axis: int = -1) -> tuple[int, ...]:
    """Return which channels of the inputs of a layer have changed; none where they have another shape."""
    if after is None or after.shape != before.shape or torch.equal(after, before):
        return ()
    change = (after - before).abs().movedim(axis, -1).flatten(0, -2).amax(0)
    if float(change.max()) <= _REACHED * float(before.abs().max()):
        return ()
    return tuple(torch.nonzero(change > _REACHED * change.max()).flatten().tolist())


def _fold(trial: Trial, target: str, ties: Sequence[_Tie]) -> Fold | None:
    """Guess one fold from what reaches its consumer."""
    size = layer_matrix(trial.layers[target]).shape[1]
    width = min((len(tie.reached) for tie in ties if _is_head(tie.reached, size)), default=size)
    channelwise = [(tie, place) for tie in ties if (place := _place(tie.reached, width)) is not None]
    if not channelwise:
        return None
    repeats = max(len(tie.reached) for tie, _ in channelwise)
    heads = size // width
    if size % width or heads % repeats:
        return None
    rows: defaultdict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for tie, (head, channel) in channelwise:
        shared = len(tie.reached)
        if shared not in (1, repeats) or head % shared:
            return None
        rows[tie.layer, repeats // shared].append((head // shared, tie.row - channel))
    moves = [moves_along(trial, target, 1, 0, width, repeats)[0]]
    for (layer, alike), found in rows.items():
        for start, stride in _progressions(found, width, heads):
            moves += moves_along(trial, layer, 0, start, stride, alike)
    fold = Fold(f"{target}.weight", heads // repeats, width, tuple(moves))
    order = torch.arange(width).repeat(fold.units, 1)
    try:
        for move in moves:
            move.index(order, trial.block.get_parameter(move.parameter).shape[move.dim])
    except IndexError:
        return None
    return fold if len(moves) > 1 else None


def _is_head(reached: Sequence[int], size: int) -> bool:
    """Whether inputs are neighbours, some but not all, that begin at a multiple of their number."""
    count = len(reached)
    return 1 < count < size and reached[-1] - reached[0] == count - 1 and reached[0] % count == 0 and size % count == 0


def _place(reached: Sequence[int], width: int) -> tuple[int, int] | None:
    """Return head and channel of the first of some inputs, if they are the same channel of neighbouring heads."""
    head, channel = divmod(reached[0], width)
    alike = all(other == reached[0] + step * width for step, other in enumerate(reached))
    return (head, channel) if alike else None


def _progressions(found: Sequence[tuple[int, int]], width: int, heads: int) -> list[tuple[int, int]]:
    """Return where heads begin and how far apart, from some pairs of a head and where its first channel is.

    With one head, every distinct beginning is a part of its own, as gate and up in one layer are.
    """
    if heads == 1:
        return [(start, width) for start in sorted({start for _, start in found})]
    begins: dict[int, int] = {}
    for head, start in found:
        if begins.setdefault(head, start) != start:
            return []
    first, last = min(begins), max(begins)
    stride = width if first == last else (begins[last] - begins[first]) // (last - first)
    start = begins[first] - first * stride
    straight = all(begin == start + head * stride for head, begin in begins.items())
    return [(start, stride)] if straight and stride >= width and start >= 0 else []


def moves_along(trial: Trial, layer: str, dim: int, start: int, stride: int, repeats: int = 1) -> list[Move]:
    """Return the moves of a layer's outputs (``dim`` 0 of its matrix) with its bias, or of its inputs (``dim`` 1)."""
    module = trial.layers[layer]
    lies = 1 - dim if is_conv1d(module) else dim
    moves = [Move(f"{layer}.weight", lies, start, stride, repeats)]
    if dim == 0 and getattr(module, "bias", None) is not None:
        moves.append(Move(f"{layer}.bias", 0, start, stride, repeats))
    return moves
