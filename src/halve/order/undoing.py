"""Tensors whose channels were reordered, in the order that they had before."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor

from halve.errors import InputError
from halve.order.folds import Move, inverse


class Undoing:
    """Puts the tensors of a reordered checkpoint back.

    Args:
        orders: the channels (`halve.order.folds.Order`) and moves of every order, with names of tensors on disk.

    Attributes:
        untouched: names of tensors that were found as they were before, though they are said to have been moved.
        undone: names of those that were found moved.
    """

    def __init__(self, orders: Iterable[tuple[Tensor, Sequence[Move]]]) -> None:
        self._moves: defaultdict[str, list[tuple[Tensor, Move]]] = defaultdict(list)
        for channels, moves in orders:
            for move in moves:
                self._moves[move.parameter].append((inverse(channels), move))
        self.untouched: list[str] = []
        self.undone: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._moves

    def back(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the order of before.

        Raises:
            InputError: it is not of the shape that was moved.
        """
        for channels, move in reversed(self._moves.get(name, [])):
            try:
                tensor = move.applied(tensor, channels)
            except (IndexError, RuntimeError) as error:
                raise InputError(
                    f"tensor {name!r} of shape {tuple(tensor.shape)} cannot have had its channels reordered as is on "
                    f"record: {error}"
                ) from error
        return tensor

    @property
    def problem(self) -> str:
        """What is wrong where some tensors were moved and others that go with them were not; empty if nothing is."""
        if not (self.untouched and self.undone):
            return ""
        return (
            f"channels of {self.undone[0]!r} are in another order than the original's, as is on record, and those of "
            f"{self.untouched[0]!r}, which go with such, are not"
        )
