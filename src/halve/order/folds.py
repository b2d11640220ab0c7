"""What a fold is: channels that one matrix reads, and whatever else has to move with them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from halve.model.layers import parameter_or_buffer
from halve.model.plan import Matrix


@dataclass(frozen=True)
class Move:
    """Channels along one dimension of a parameter or a buffer that move with an order.

    They lie in heads of equal width: head q begins at ``start + q * stride``, and ``repeats`` neighbouring heads move
    alike, as the query heads do that share a key and value head.

    Attributes:
        parameter: its name, within the block or on disk.
        dim: of the parameter.
        start: of the first head.
        stride: from one head to the next.
        repeats: heads that have one unit's order.
    """

    parameter: str
    dim: int
    start: int
    stride: int
    repeats: int = 1

    def index(self, order: Tensor, size: int) -> Tensor:
        """Return which of ``size`` entries along the dimension comes to each place.

        Args:
            order: (units, width) int64, which channel of its unit comes to each place.
            size: of the dimension.

        Raises:
            IndexError: the heads do not fit into it.
        """
        heads = order.repeat_interleave(self.repeats, dim=0)
        firsts = self.start + self.stride * torch.arange(len(heads))[:, None]
        places = firsts + torch.arange(order.shape[1])
        if self.start < 0 or int(places.max()) >= size:
            raise IndexError(f"{len(heads)} heads do not fit into dimension {self.dim} of {self.parameter}")
        index = torch.arange(size)
        index[places.flatten()] = (firsts + heads).flatten()
        return index

    def applied(self, tensor: Tensor, order: Tensor) -> Tensor:
        """Return ``tensor``, of the parameter's shape, in an order of channels."""
        return tensor.index_select(self.dim, self.index(order, tensor.shape[self.dim]).to(tensor.device))


@dataclass(frozen=True)
class Fold:
    """Channels that can be put into another order without changing what the block computes.

    Attributes:
        consumer: the weight whose inputs they are, by its name within the block.
        units: the channels are cut into so many units, which keep their places, each with an order of its own.
        width: channels of a unit.
        moves: what has to move; the first is the consumer's.
    """

    consumer: str
    units: int
    width: int
    moves: tuple[Move, ...]


@dataclass(frozen=True, eq=False)
class Order:
    """An order that was chosen for a fold of a block.

    Attributes:
        block: full name of the block.
        fold: what moves; names are within the block.
        channels: (units, width) int64 on the CPU, which channel of its unit comes to each place.
        estimate: what pruning is estimated to lose in this order, as a share of what it would lose in the given one.
    """

    block: str
    fold: Fold
    channels: Tensor
    estimate: float

    @property
    def parameters(self) -> tuple[str, ...]:
        """Full names of the parameters and buffers that move, each once."""
        return tuple(dict.fromkeys(f"{self.block}.{move.parameter}" for move in self.fold.moves))

    def applied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the tensors that move, in the order; keys are full names."""
        found: dict[str, Tensor] = {}
        for move in self.fold.moves:
            name = f"{self.block}.{move.parameter}"
            if name in tensors:
                found[name] = move.applied(found.get(name, tensors[name]), self.channels)
        return found

    def of_inputs(self, matrix: Matrix) -> Tensor | None:
        """Return which of a matrix's inputs comes to each place; None where they stay.

        Args:
            matrix: of the block; of a convolution the inputs are the channels of one tap after the other.
        """
        along = 0 if matrix.layout == "in_out" else 1
        for move in self.fold.moves:
            if f"{self.block}.{move.parameter}" == matrix.parameter and move.dim == along:
                channels = matrix.d_in // matrix.taps
                taps = channels * torch.arange(matrix.taps)[:, None]
                return (taps + move.index(self.channels, channels)).flatten()
        return None


def permute(block: nn.Module, fold: Fold, order: Tensor) -> dict[str, Tensor]:
    """Put a block's parameters and buffers into an order, and return what they were before, by name.

    Args:
        block: a working copy; what moves gets new tensors.
        fold: what moves.
        order: (units, width) int64.
    """
    before: dict[str, Tensor] = {}
    for move in fold.moves:
        parameter = parameter_or_buffer(block, move.parameter)
        before.setdefault(move.parameter, parameter.data)
        parameter.data = move.applied(parameter.data, order)
    return before


def random_order(units: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw an order of every unit: (units, width) int64."""
    return torch.stack([torch.randperm(width, generator=generator) for _ in range(units)])


def inverse(order: Tensor) -> Tensor:
    """Return the order that undoes one, (units, width) int64."""
    return order.argsort(dim=-1)


def segments(length: int, parts: int) -> Iterator[range]:
    """Cut ``range(length)`` into so many neighbours of nearly equal size, or fewer where it is short."""
    count = max(1, min(length, parts))
    edges = [index * length // count for index in range(count + 1)]
    for first, after in pairwise(edges):
        yield range(first, after)
