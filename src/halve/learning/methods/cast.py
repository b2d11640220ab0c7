"""CAST: what is not kept decays towards zero in the optimiser; forward passes stay dense (arXiv 2509.25996).

Every few steps M is the N largest magnitudes of every group. With μ the first moment of the gradients as it is summed
up (not bias-corrected) and α the share of steps that are done, a target's weight moves by

    μ̃ = μ where M keeps,   (1 - α) μ + α λ sign(w) elsewhere        w ← w - rate · μ̃ / (√v̂ + ε)

where v averages μ̃² and v̂ is bias-corrected. So what is pruned takes steps of up to α · rate towards zero at the end,
and the sum of those over the training has to be larger than the weights are: `Cast.doubts` looks before it starts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halve.checks import check_count, check_positive
from halve.learning.learner import Step
from halve.learning.methods.mask_learner import (
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

BETAS = (0.9, 0.95)
EPSILON = 1e-8
"""ε, which must be far below λ: steps of pruned weights are λ / (λ + ε) of the rate at the end."""


@dataclass(frozen=True)
class CASTOptions:
    """Options of cast.

    Attributes:
        lam: λ, the pull of pruned weights towards zero, > 0, in the unit of a gradient; it counts beside the moments
            of noisy gradients, and its size is no matter once α has driven those out.
        every: steps between two choices of the mask.
    """

    lam: float = 4e-7
    every: int = 10

    def __post_init__(self) -> None:
        check_positive("lam of cast", self.lam)
        check_count("every of cast", self.every)


class Cast(MaskLearner):
    """The learner. It also trains one scale for each half of each row, folded into the weights at the end."""

    def __init__(
        self,
        targets: Iterable[PrunedParameter],
        pattern: Pattern,
        options: CASTOptions,
        *,
        prior: Mapping[str, Tensor] | None = None,
        diagonals: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(targets, pattern)
        self._options = options
        self._masks: dict[str, Tensor] = {}
        self._scaled: dict[str, _HalfRows] = {}
        self._pull = _Pull(options.lam)

    def doubts(self, rates: Iterable[float]) -> str | None:
        """Say that the learning rates are too small, or too few, for what is pruned to arrive at zero.

        Args:
            rates: the learning rate of every optimiser step of the training, in order.
        """
        planned = list(rates)
        reach = sum(rate * number / len(planned) for number, rate in enumerate(planned))
        sizes = {name: float(stored(target).detach().abs().mean()) for name, target in self.targets.items()}
        name = max(sizes, key=lambda each: sizes[each])
        beyond = sum(size > reach for size in sizes.values())
        if not beyond:
            return None
        return (
            f"method cast can move a pruned weight by {reach:.2g} at most in {len(planned)} steps (the sum of learning "
            f"rate times share of steps), and the mean |w| is larger in {beyond} of {len(sizes)} matrices "
            f"({sizes[name]:.2g} in {name}): train for more tokens, or with a larger learning rate, or use another "
            "method"
        )

    def attach(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Add the scales, all 1; return targets, norms, biases and scales."""
        for name, target in self.targets.items():
            self._scaled[name] = _HalfRows(target, self.pattern)
            parametrise(model, target, self._scaled[name])
        self._masks = self._best()
        scales = [scaled.scales for scaled in self._scaled.values()]
        return train_only(model, [*weights_and_vectors(model, self.targets.values()), *scales])

    def optimiser(self, parameters: Iterable[nn.Parameter], rate: float, decay: float) -> Optimizer:
        """Return a `PullingAdam`; nothing has weight decay: what is pruned is pulled, and scales belong near 1."""
        return PullingAdam(parameters, rate, self._pull)

    def begin_step(self, step: Step) -> None:
        """Choose the masks again, every so many steps, and set α."""
        if step.number % self._options.every == 0:
            self._masks = self._best()
        self._pull.share = step.share
        self._pull.masks = {id(stored(target)): self._masks[name] for name, target in self.targets.items()}

    def choose(self) -> dict[str, Tensor]:
        """Return the masks that the optimiser goes by."""
        return dict(self._masks)

    def outcome(self, target: PrunedParameter, weight: Tensor) -> Tensor:
        """Return the weights with their scales folded in."""
        return self._scaled[target.name].effective(weight)

    def state(self) -> Mapping[str, Tensor]:
        """Return the masks, which were chosen from earlier weights."""
        return save_masks(self._masks)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self._masks = load_masks(state, self.targets)

    @torch.no_grad()
    def facts(self) -> Mapping[str, float]:
        """Return ``left``: the mean magnitude of pruned weights over that of kept ones."""
        sums = torch.zeros(2, dtype=torch.float64)
        for name, target in self.targets.items():
            size, mask = stored(target).abs().double(), self._masks[name]
            sums += torch.stack([(size * ~mask).sum() / (~mask).sum(), (size * mask).sum() / mask.sum()]).cpu()
        return {"left": float(sums[0] / sums[1].clamp_min(1e-30))}

    @torch.no_grad()
    def _best(self) -> dict[str, Tensor]:
        return {name: mask_of(target, stored(target).abs(), self.pattern) for name, target in self.targets.items()}


class _HalfRows(Parametrisation):
    """W times a scale for each half of each row; the halves part at a group's border, so no mask depends on them.

    Attributes:
        scales: (..., d_out, 2), or (..., d_out, 1) for rows of one group.
    """

    def __init__(self, target: PrunedParameter, pattern: Pattern) -> None:
        super().__init__()
        weight = target.inputs_last(stored(target).detach())
        _, group = pattern.budget(weight.shape[-1])
        first = weight.shape[-1] // group // 2 * group
        self._lengths = [length for length in (first, weight.shape[-1] - first) if length]
        self._target = target
        self.scales = nn.Parameter(weight.new_ones(*weight.shape[:-1], len(self._lengths)))

    def effective(self, weight: Tensor) -> Tensor:
        parts = [
            part * self.scales[..., number, None]
            for number, part in enumerate(torch.split(self._target.inputs_last(weight), self._lengths, dim=-1))
        ]
        return self._target.as_stored(torch.cat(parts, dim=-1))


@dataclass
class _Pull:
    """What the optimiser is told of the masks before each step.

    Attributes:
        lam: λ.
        share: α.
        masks: bool, by the `id` of the parameter.
    """

    lam: float
    share: float = 0.0
    masks: Mapping[int, Tensor] = field(default_factory=dict)


class PullingAdam(Optimizer):
    """Adam, in which the first moments of pruned weights give way to a pull towards zero.

    For a parameter without a mask it is Adam, without weight decay.

    Args:
        parameters: to train.
        rate: learning rate, > 0.
        pull: masks, α and λ, set before each step by who chooses them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, pull: _Pull) -> None:
        self._pull = pull
        super().__init__(parameters, {"lr": rate, "betas": BETAS, "eps": EPSILON})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure`` computes the loss again, where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> None:
        first, second = group["betas"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        taken = float(state["step"])
        moment = state["exp_avg"].lerp_(gradient, 1.0 - first)
        mask = self._pull.masks.get(id(parameter))
        if mask is None:
            used, squared = moment / (1.0 - first**taken), gradient
        else:
            alpha = self._pull.share
            pulled = moment * (1.0 - alpha) + parameter.sign() * (alpha * self._pull.lam)
            used = squared = torch.where(mask, moment, pulled)
        state["exp_avg_sq"].mul_(second).addcmul_(squared, squared, value=1.0 - second)
        root = (state["exp_avg_sq"] / (1.0 - second**taken)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(used, root, value=-group["lr"])
