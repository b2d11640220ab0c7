"""What a trainer asks of a way to learn: which parameters, what happens around every step, and how it ends N:M."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Step:
    """Where a training stands.

    Attributes:
        number: optimiser steps that are done, from 0.
        total: optimiser steps that it will take in all.
    """

    number: int
    total: int

    @property
    def share(self) -> float:
        """Share of the steps that are done, 0 to 1."""
        return self.number / max(1, self.total)


class Learner:
    """A way to learn. The trainer calls its methods in the order in which they stand here.

    ``attach`` once, after the model is on its device; then in every optimiser step ``begin_step``, ``penalty`` in each
    forward pass of it, ``before_update`` when all gradients are there and clipped, and ``after_update`` when the
    optimiser has stepped; ``look_back`` and ``finish`` once.
    """

    notes: tuple[str, ...] = ()
    """Sentences on what one might not expect of the training."""

    def attach(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Prepare a model, float32 and on its device, and return the parameters to train; no other needs a gradient."""
        raise NotImplementedError

    def optimiser(self, parameters: Iterable[nn.Parameter], rate: float, decay: float) -> Optimizer:
        """Return the optimiser; its learning rate is ``rate`` at the peak, and follows the trainer's schedule.

        Args:
            parameters: that `attach` returned.
            rate: learning rate, > 0.
            decay: weight decay of matrices; vectors have none.
        """
        given = list(parameters)
        groups = [
            {"params": [each for each in given if each.ndim > 1], "weight_decay": decay},
            {"params": [each for each in given if each.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # Fused: on the CPU the plain one spends most of its time on square roots of the zeros of pruned weights.
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)

    def doubts(self, rates: Iterable[float]) -> str | None:
        """Say, before anything is trained, why these learning rates will not lead to a good end; None if they may.

        Args:
            rates: the learning rate of every optimiser step, in order.
        """
        return None

    def begin_step(self, step: Step) -> None:
        """Do what comes before the forward passes of an optimiser step."""

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss of one forward pass, a scalar; None adds nothing."""
        return None

    def before_update(self, step: Step) -> None:
        """Change gradients, before the optimiser's step."""

    def after_update(self, step: Step, optimiser: Optimizer) -> None:
        """Change weights or the optimiser's moments, after the optimiser's step; ``step`` is the one just taken."""

    def state(self) -> Mapping[str, Tensor]:
        """Return what a resumed training needs besides parameters and the optimiser's state, by name."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, in a learner that was attached to a model with the saved parameters."""

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Make the model what `finish` would leave, as far as it computes, and put it back after."""
        yield

    def look_back(self, measure: Callable[[], float]) -> None:
        """Measure what `finish` makes impossible to measure.

        Args:
            measure: returns the held-out loss, in nats a token, of the model as it computes now.
        """

    def detach(self) -> None:
        """Take everything off the model, whatever its weights are then: a trial's are put back by who made it."""
        self.finish()

    def finish(self) -> None:
        """Leave the model N:M in its own parameters, with nothing attached to it."""
        raise NotImplementedError
