"""What workers have summed over the inputs of matrices: kept, told of, and fetched from one another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from halve.maths.gram import GramAccumulator, Statistics
from halve.model.collect import Sums
from halve.workers import terms
from halve.workers.fetching import LostError, fetch
from halve.workers.messages import Message, unpack


def on_host(sums: Sums) -> Sums:
    """Return sums in the memory of the machine: a GPU holds those of one shard at a time."""
    for name, each in sums.accumulators.items():
        tensors = {kind: tensor.cpu() for kind, tensor in each.tensors.items()}
        sums.accumulators[name] = GramAccumulator.of(name, each.d_in, each.counts, tensors)
    return sums


class NotThereError(Exception):
    """A message that another worker had is lost; the text is its place among those asked for."""


def _fetched(place: int, message: Any) -> Message:
    """Return a message, which may be a reference to one in Ray's store."""
    if isinstance(message, np.ndarray):
        return message
    try:
        return fetch(message)
    except LostError as error:
        raise NotThereError(str(place)) from error


def told(parts: Mapping[int, Sums], shards: Sequence[int], first: int) -> dict[str, Any]:
    """Return what a part is of (`halve.workers.terms.Part`), as plain values: up to where the next one begins.

    Args:
        parts: all of a model's, each by the first of its shards.
        shards: of the model, in their order.
        first: of the part's shards.
    """
    others = [shard for shard in parts if shard > first]
    those = [shard for shard in shards if first <= shard < min(others, default=shard + 1)]
    sums = parts[first]
    known = {name: (each.d_in, list(each.counts)) for name, each in sums.accumulators.items()}
    return {"first": first, "shards": those, "leaders": sums.leaders, "sums": known}


def statistics_of(matrix: str, sums: Sequence[Any], device: torch.device) -> Statistics | None:
    """Return what was summed over the inputs of a matrix; None where that is nothing.

    Args:
        matrix: its name.
        sums: in the order of shards: messages, or references to them, which are fetched one after the other, since each
            may be a gigabyte.
        device: that it is needed on.

    Raises:
        NotThereError: one of them is lost.
    """
    return _total(matrix, (_fetched(place, each) for place, each in enumerate(sums)), device) if sums else None


def _total(matrix: str, messages: Iterable[Message], device: torch.device) -> Statistics:
    """Add up what was summed over the inputs of a matrix, in the order of shards."""
    total: GramAccumulator | None = None
    for message in messages:
        content, tensors = unpack(message, terms.Summed)
        terms.check(content)
        if total is None:
            tensors = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
            total = GramAccumulator.of(matrix, content.d_in, content.counts, tensors)
        else:
            total.absorb(GramAccumulator.of(matrix, content.d_in, content.counts, tensors))
    if total is None:
        raise AssertionError
    return total.finish(last=True)
