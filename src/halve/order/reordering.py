"""What a run does with a block before its matrices are pruned: find its folds, and choose an order for each."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halve.errors import HalveError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.model.layers import parameter_or_buffer
from halve.model.plan import Matrix
from halve.order.chains import find_chains
from halve.order.choosing import choose_order, estimated_loss
from halve.order.finding import find_folds
from halve.order.folds import Fold, Order
from halve.order.proving import is_proven
from halve.order.saliency import by_unit, saliencies
from halve.order.trial import Trial

NONE, FOLD = ORDERS = ("none", "fold")
"""What can be asked for: channels stay where they are, or move where that folds into neighbouring weights."""
_SEED = 20


@dataclass(frozen=True)
class Reordered:
    """What came of the folds of one block, or of several.

    Attributes:
        orders: those that were chosen.
        found: matrices for whose inputs a fold was guessed that fits the pattern.
        proven: folds of them that were proven; for those without an order no better one was found, or none could be
            estimated.
    """

    orders: tuple[Order, ...] = ()
    found: int = 0
    proven: int = 0

    def __add__(self, other: "Reordered") -> "Reordered":
        return Reordered(self.orders + other.orders, self.found + other.found, self.proven + other.proven)


class Reorderer:
    """Finds the folds of one block after the other, and chooses orders.

    Nothing is carried from one block to the next: a run that is continued has not seen the blocks before, and has to
    come to the same bytes.

    Args:
        pattern: N:M that is pruned to.
        fixed: full names of parameters and buffers that must not move.
    """

    def __init__(self, pattern: Pattern, fixed: Collection[str]) -> None:
        self._pattern = pattern
        self._fixed = fixed

    def folds(self, name: str, trial: Trial, matrices: Sequence[Matrix], number: int) -> tuple[list[Fold], int]:
        """Return the folds of a block that are proven, and for how many consumers some were found.

        Args:
            name: full name of the block.
            trial: of the block.
            matrices: of the block.
            number: of the block, from which what is tried is drawn.
        """
        plain = [m for m in matrices if m.expert is None and not m.routed and not m.repeated]
        prefix = f"{name}."
        consumers = [m.parameter.removeprefix(prefix) for m in plain]
        fixed = {each.removeprefix(prefix) for each in self._fixed if each.startswith(prefix)}
        generator = torch.Generator().manual_seed(_SEED + number)
        found: set[str] = set()
        proven: list[Fold] = []
        for find in (find_folds, find_chains):
            moved = {(move.parameter, move.dim) for fold in proven for move in fold.moves}
            taken = {fold.consumer for fold in proven}
            left = [consumer for consumer in consumers if consumer not in taken]
            for fold in find(trial, left, fixed, _SEED) if left else ():
                free = moved.isdisjoint((move.parameter, move.dim) for move in fold.moves)
                if free and self._pattern.fits(fold.width) and not self._breaks_up(trial.block, fold):
                    found.add(fold.consumer)
                    proven += [fold] if is_proven(trial, fold, generator) else []
        return proven, len(found)

    def _breaks_up(self, block: nn.Module, fold: Fold) -> bool:
        """Whether what moves beside the consumer has the pattern along its channels, as a matrix pruned before has."""
        for move in fold.moves[1:]:
            tensor = parameter_or_buffer(block, move.parameter).data
            if tensor.ndim > 1 and self._pattern.fits(tensor.shape[move.dim]):
                rows = tensor.movedim(move.dim, -1).flatten(0, -2)
                if self._pattern.satisfied_by(rows):
                    return True
        return False

    def choose(
        self,
        name: str,
        block: nn.Module,
        folds: Sequence[Fold],
        matrices: Sequence[Matrix],
        statistics: Mapping[str, Statistics | None],
        warn: Callable[[str], None],
    ) -> list[Order]:
        """Choose an order for every fold by the loss that pruning its consumer is estimated to take.

        Args:
            name: full name of the block.
            block: a float32 working copy, left as it is.
            folds: of the block.
            matrices: of the block.
            statistics: of the matrices' inputs, by the matrices' names.
            warn: called with a sentence for every fold that no order can be chosen for.

        Returns:
            list[Order]: those that lower the estimate.
        """
        orders = []
        by_parameter = {matrix.parameter: matrix for matrix in matrices}
        for number, fold in enumerate(folds):
            matrix = by_parameter[f"{name}.{fold.consumer}"]
            stats = statistics.get(matrix.name)
            if stats is None:
                continue
            weight = matrix.view(block.get_parameter(fold.consumer).data)
            try:
                saliency = saliencies(weight, stats.gram.to(weight.device))
            except HalveError as error:
                warn(f"reordering: the inputs of {name}.{fold.consumer} stay in their order: {error}")
                continue
            laid = by_unit(saliency, fold.units, fold.moves[0].repeats, matrix.taps)
            generator = torch.Generator().manual_seed(_SEED + number)
            channels = choose_order(laid, self._pattern, generator)
            before, after = (estimated_loss(laid, self._pattern, order) for order in (None, channels.to(laid.device)))
            if after < before:
                orders.append(Order(name, fold, channels, after / before))
        return orders


def shared_parameters(model: nn.Module) -> set[str]:
    """Return the full names of parameters that several modules have: what moves for one would move for all."""
    everything = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in everything)
    return {name for name, parameter in everything if uses[id(parameter)] > 1}


def reordered(statistics: Statistics, index: Tensor) -> Statistics:
    """Return the statistics of a matrix's inputs in another order; what they were is left as it is.

    Args:
        statistics: of the inputs.
        index: (d_in,) int64, which input comes to each place.
    """

    def moved(square: Tensor) -> Tensor:
        places = index.to(square.device)
        return square.index_select(0, places).index_select(1, places)

    halves, cross = statistics.halves, statistics.cross
    return replace(
        statistics,
        gram=moved(statistics.gram),
        halves=None if halves is None else (moved(halves[0]), moved(halves[1])),
        cross=None if cross is None else moved(cross),
    )
