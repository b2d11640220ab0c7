"""Iterations over rows that end at different times: which are still under way, and where their results belong."""

import torch
from torch import Tensor


class ActiveRows:
    """Keeps the results of rows that have finished, and packs the others together once that pays.

    The rows of an iteration do not depend on one another. One that has finished is written into the result at once and
    stays in the iteration's tensors, where whatever becomes of it is ignored, until a share of the rows there have
    finished; packing at every look would copy more than it saves.

    Args:
        result: (n, …), written in place; what it holds of a row stays until that row is written.
        share: of the rows in the iteration's tensors, in [0, 1]: once so many have finished, `pack` leaves them out.

    Attributes:
        finished: (rows,) bool, of the rows in the iteration's tensors.
        unfinished: how many of them are still under way.
    """

    def __init__(self, result: Tensor, share: float) -> None:
        self._result = result
        self._share = share
        self._numbers = torch.arange(len(result), device=result.device)
        self.finished = torch.zeros_like(self._numbers, dtype=torch.bool)
        self.unfinished = len(result)

    def __len__(self) -> int:
        """Return the number of rows in the iteration's tensors."""
        return len(self._numbers)

    def finish(self, ready: Tensor, value: Tensor) -> Tensor:
        """Write the rows that are ready and were not finished yet into the result.

        Args:
            ready: (rows,) bool.
            value: (rows, …), what the iteration has for every row.

        Returns:
            Tensor: the numbers in the result of the rows that were written.
        """
        places = (ready & ~self.finished).nonzero().squeeze(-1)  # the one look that waits for a GPU
        numbers = self._numbers[places]
        self._result[numbers] = value[places]
        self.finished[places] = True
        self.unfinished -= len(places)
        return numbers

    def pack(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors (rows, …) without the finished rows if these are a large enough share, and else as given.

        All tensors of the iteration have to go through the same call.
        """
        if len(self) - self.unfinished < self._share * len(self):
            return tensors
        left = ~self.finished
        self._numbers, self.finished = self._numbers[left], self.finished[left]
        return tuple(tensor[left] for tensor in tensors)

    def result(self, value: Tensor) -> Tensor:
        """Return the result with the rows that are still under way as ``value`` (rows, …) has them."""
        left = ~self.finished
        self._result[self._numbers[left]] = value[left]
        return self._result


def some_rows(wanted: Tensor) -> Tensor | slice:
    """Return what selects the rows that are wanted, (rows,) bool, without a copy where that is all of them."""
    return slice(None) if bool(wanted.all()) else wanted
