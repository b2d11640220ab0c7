"""AST: weights and mask trained together, with gradients straight through the mask (arXiv 2407.20584, 2102.04010).

The forward pass multiplies with W ⊙ M; the gradient of W ⊙ M is given to all of W, as if there were no mask; and what
is pruned decays by λ_t w, which is added to the gradient, as in SR-STE. M is chosen again every few steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import Function

from halve.checks import check_count, check_not_negative, check_positive
from halve.errors import InputError
from halve.learning.learner import Step
from halve.learning.methods.mask_learner import (
    InputScales,
    MaskLearner,
    Parametrisation,
    load_masks,
    mask_of,
    parametrise,
    save_masks,
    stored,
    train_only,
    weights_and_vectors,
)
from halve.maths.pattern import Pattern
from halve.model.masked import PrunedParameter

Metric = Literal["inputs", "magnitude"]


@dataclass(frozen=True)
class ASTOptions:
    """Options of ast.

    Attributes:
        decay: λ of pruned weights, >= 0, in the unit of gradient over weight.
        ramp: share of the steps in which λ_t rises from 0 to λ, 0 < ramp <= 1.
        every: steps between two choices of the mask.
        metric: what the largest are kept of: ``inputs`` is Wanda's ``|w|·rms(x)``, ``magnitude`` is ``|w|``.
    """

    decay: float = 1e-4
    ramp: float = 0.25
    every: int = 10
    metric: Metric = "inputs"

    def __post_init__(self) -> None:
        check_not_negative("decay of ast", self.decay)
        check_positive("ramp of ast", self.ramp)
        if self.ramp > 1.0:
            raise InputError(f"ramp of ast is a share of the steps, at most 1, got {self.ramp!r}")
        check_count("every of ast", self.every)
        if self.metric not in get_args(Metric):
            raise InputError(f"metric of ast must be one of {', '.join(get_args(Metric))}, got {self.metric!r}")


class AST(MaskLearner):
    """The learner; ``diagonals`` are for metric ``inputs``.

    Attributes:
        by_magnitude: names of the targets without second moments of their inputs, which go by ``|w|``.
    """

    def __init__(
        self,
        targets: Iterable[PrunedParameter],
        pattern: Pattern,
        options: ASTOptions,
        *,
        prior: Mapping[str, Tensor] | None = None,
        diagonals: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(targets, pattern)
        self._options = options
        self._scales = InputScales(self.targets, diagonals if options.metric == "inputs" else None)
        self.by_magnitude = self._scales.by_magnitude
        self._forward: dict[str, _StraightThrough] = {}
        self._changed = 0.0

    def attach(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Choose the first masks and let the model multiply with them; return targets, norms and biases."""
        for name, target in self.targets.items():
            self._forward[name] = _StraightThrough(self._best(target))
            parametrise(model, target, self._forward[name])
        return train_only(model, weights_and_vectors(model, self.targets.values()))

    def begin_step(self, step: Step) -> None:
        """Choose the masks again, every so many steps."""
        if step.number % self._options.every:
            return
        changed, entries = 0, 0
        for name, target in self.targets.items():
            mask = self._best(target)
            changed += int((mask != self._forward[name].mask).sum())
            entries += mask.numel()
            self._forward[name].mask = mask
        self._changed = changed / entries

    @torch.no_grad()
    def before_update(self, step: Step) -> None:
        """Add λ_t w to the gradients of pruned weights."""
        strength = self._options.decay * min(1.0, step.share / self._options.ramp)
        for name, target in self.targets.items():
            weight = stored(target)
            if weight.grad is not None:
                pruned = torch.logical_not(self._forward[name].mask)  # of a mask of whole numbers, ~ would be -1 or -2
                weight.grad.add_(weight * pruned, alpha=strength)

    def choose(self) -> dict[str, Tensor]:
        """Return the masks that the model multiplies with."""
        return {name: masked.mask for name, masked in self._forward.items()}

    def facts(self) -> Mapping[str, float]:
        """Return ``changed``: the share of the masks' entries that the last choice changed."""
        return {"changed": self._changed}

    def state(self) -> Mapping[str, Tensor]:
        """Return the masks, which were chosen from earlier weights."""
        return {"changed": torch.tensor(self._changed, dtype=torch.float64), **save_masks(self.choose())}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self._changed = float(state["changed"])
        for name, mask in load_masks(state, self.targets).items():
            self._forward[name].mask = mask

    @torch.no_grad()
    def _best(self, target: PrunedParameter) -> Tensor:
        return mask_of(target, self._scales.scores(target, stored(target)), self.pattern)


class _StraightThrough(Parametrisation):
    """W ⊙ M, whose gradient is that of W."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def effective(self, weight: Tensor) -> Tensor:
        masked: Tensor = _Through.apply(weight, self.mask)  # type: ignore[no-untyped-call]
        return masked


class _Through(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG004
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None
