"""Running a model from one of its blocks on: those before it return what they have returned, and are not computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from halve.errors import InputError
from halve.model.blocks import Batch, replaced_forward
from halve.sensitivity.logits import log_probabilities

_SAME = 1e-4
"""How far log-probabilities may move where nothing was changed."""


class Passage:
    """What the blocks of a model return for one batch.

    Args:
        members: the blocks.

    Attributes:
        order: indices of the blocks in the order in which they ran.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.order: list[int] = []
        self._members = members
        self._returned: dict[int, Any] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what each block returns inside."""
        self.order.clear()

        def keep(index: int, _module: nn.Module, _args: Any, output: Any) -> None:
            self.order.append(index)
            self._returned[index] = output

        with ExitStack() as stack:
            for index, block in enumerate(self._members):
                stack.callback(block.register_forward_hook(partial(keep, index)).remove)
            yield

    @contextmanager
    def beginning_at(self, block: int) -> Iterator[None]:
        """Let the blocks that ran before one return what they did, without computing it."""

        def giving(output: Any) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: output

        with ExitStack() as stack:
            for index in self.order[: self.order.index(block)]:
                stack.enter_context(replaced_forward(self._members[index], giving(self._returned[index])))
            yield


def beginnings(model: nn.Module, members: Sequence[nn.Module], short: Batch) -> Mapping[int, int]:
    """Return for each block the latest one at which a pass through it may begin: itself, or else the very first.

    Not itself where that is proved wrong on a sample: blocks that write into an object for later ones have to run.

    Args:
        model: where it is run.
        members: its blocks.
        short: a short batch.

    Raises:
        InputError: there is too little memory.
    """
    passage = Passage(members)
    with passage.recording():
        whole = log_probabilities(model, short)
    found = {}
    for block in passage.order:
        found[block] = block
        try:
            with passage.beginning_at(block):
                moved = float((log_probabilities(model, short) - whole).abs().amax())
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise InputError(
                "there is too little memory to measure what pruning costs: give fewer keep_dense_tokens, or shorter "
                "sequences of calibration text"
            ) from error
        except Exception:  # noqa: BLE001 - a model may raise anything where something is missing
            moved = float("inf")
        if not moved <= _SAME:
            found[block] = passage.order[0]
    return found
