"""MaskLLM: a distribution over the masks of every group, learned with the weights frozen (arXiv 2409.17481).

Every group has a logit π_i for each of its C(M, N) masks S_i. A forward pass multiplies with W ⊙ Σ y_i S_i, where
y = softmax((κ π + g) / τ) and g is Gumbel noise; κ rises and τ falls as the training goes on, so that y ends as one
mask. The noise of an optimiser step comes from one seed for each target and is drawn again wherever it is needed: a
recomputed forward pass (gradient checkpointing) and the backward pass see the same, and nothing but the logits is kept.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from halve.checks import check_count, check_not_negative, check_positive
from halve.errors import PatternError
from halve.learning.learner import Step
from halve.learning.methods.mask_learner import (
    MaskLearner,
    Parametrisation,
    checked_prior,
    parametrise,
    stored,
    train_only,
)
from halve.maths.pattern import Pattern
from halve.model.masked import PrunedParameter

MOST_MASKS = 70
"""Masks a group at most, C(8, 4): each has a logit."""
_SEEDS = 2**62


@dataclass(frozen=True)
class MaskLLMOptions:
    """Options of maskllm; the published values.

    Attributes:
        init_std: standard deviation of the logits at the start, > 0.
        prior_strength: α, by how much a prior raises the logits of masks like its own, in units of ``init_std``.
        scale_start: κ at the start, > 0.
        scale_end: κ at the end, > 0.
        temperature_start: τ at the start, > 0.
        temperature_end: τ at the end, > 0.
        keep_large: λ of the reward λ Σ‖W ⊙ M‖² at the start; it falls to 0.
        seed: of the logits and of the noise.
    """

    init_std: float = 0.01
    prior_strength: float = 3.0
    scale_start: float = 1e2
    scale_end: float = 5e2
    temperature_start: float = 4.0
    temperature_end: float = 0.05
    keep_large: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("init_std", "scale_start", "scale_end", "temperature_start", "temperature_end"):
            check_positive(f"{name} of maskllm", getattr(self, name))
        for name in ("prior_strength", "keep_large"):
            check_not_negative(f"{name} of maskllm", getattr(self, name))
        check_count("seed of maskllm", self.seed, least=0)


def all_masks(pattern: Pattern) -> Tensor:
    """Return the masks of a group of ``N:M``: (C(M, N), M) bool, in the order of `itertools.combinations`.

    Raises:
        PatternError: the pattern is unstructured, or there are more than 70.
    """
    if pattern.keep is None or pattern.group is None:
        raise PatternError(f"maskllm learns masks of groups, which {pattern} has none of: choose 2:4, for example")
    count = math.comb(pattern.group, pattern.keep)
    if count > MOST_MASKS:
        raise PatternError(
            f"a group of {pattern} has {count} masks, and maskllm keeps a logit for each, {MOST_MASKS} at most: "
            "choose a pattern with fewer (2:4, 1:8, 4:8), or another method"
        )
    masks = torch.zeros(count, pattern.group, dtype=torch.bool)
    for row, kept in enumerate(combinations(range(pattern.group), pattern.keep)):
        masks[row, list(kept)] = True
    return masks


class MaskLLM(MaskLearner):
    """The learner; ``prior`` has weights of a pruned checkpoint by name, whose masks raise the logits like them.

    Raises:
        PatternError: as `all_masks`.
        InputError: the prior lacks a target, has another shape, or is not N:M.
    """

    def __init__(
        self,
        targets: Iterable[PrunedParameter],
        pattern: Pattern,
        options: MaskLLMOptions,
        *,
        prior: Mapping[str, Tensor] | None = None,
        diagonals: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(targets, pattern)
        self._options = options
        self._masks = all_masks(pattern)
        self._prior = None if prior is None else checked_prior(prior, self.targets, pattern)
        self._generator = torch.Generator().manual_seed(options.seed)
        self._mixtures: dict[str, _Mixture] = {}
        self._reward = options.keep_large

    def doubts(self, rates: Iterable[float]) -> str | None:
        """Say that the learning rates are too small, or too few, for the masks to become others than at the start.

        Adam moves a logit by about the learning rate in a step; two that move towards each other have to meet.
        """
        planned = list(rates)
        reach, apart = 2.0 * sum(planned), self._options.init_std
        if self._prior is not None:
            apart *= max(1.0, self._options.prior_strength)
        if reach >= apart:
            return None
        return (
            f"method maskllm can move two logits towards each other by {reach:.2g} in {len(planned)} steps, and those "
            f"of neighbouring masks begin about {apart:.2g} apart, so it would end with the masks that it begins with: "
            "train for more tokens, or with a larger learning rate (1e-2 serves some tens of steps)"
        )

    def attach(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Freeze the model, and return the logits: one (groups, C(M, N)) for each target."""
        for name, target in self.targets.items():
            weight = stored(target)
            shape = (weight.numel() // self._masks.shape[1], len(self._masks))
            logits = torch.randn(shape, generator=self._generator, dtype=weight.dtype).mul_(self._options.init_std)
            if self._prior is not None:
                logits += self._lift(target, self._prior[name].to("cpu"), logits.dtype)
            self._mixtures[name] = _Mixture(target, logits.to(weight.device), self._masks)
            parametrise(model, target, self._mixtures[name])
        self._prior = None
        return train_only(model, [mixture.logits for mixture in self._mixtures.values()])

    def begin_step(self, step: Step) -> None:
        """Draw the noise of a step, and set κ, τ and the reward's weight, all linear in the share of steps."""
        options, share = self._options, step.share
        scale = options.scale_start + (options.scale_end - options.scale_start) * share
        temperature = options.temperature_start + (options.temperature_end - options.temperature_start) * share
        self._reward = options.keep_large * (1.0 - share)
        self._draw()
        for mixture in self._mixtures.values():
            mixture.scale, mixture.temperature = scale, temperature

    def penalty(self) -> Tensor | None:
        """Return -λ Σ‖W ⊙ M‖², which keeps gradients from vanishing with the weights that are multiplied."""
        if self._reward == 0.0:
            return None
        sums = [mixture.retained(stored(self.targets[name])) for name, mixture in self._mixtures.items()]
        return -self._reward * torch.stack([each.to(sums[0].device) for each in sums]).sum()

    @torch.no_grad()
    def choose(self) -> dict[str, Tensor]:
        """Return the likeliest mask of every group."""
        return {name: mixture.likeliest() for name, mixture in self._mixtures.items()}

    @torch.no_grad()
    def facts(self) -> Mapping[str, float]:
        """Return ``certainty``: the mean probability of the likeliest mask, without noise, at the present κ and τ."""
        groups = sum(len(mixture.logits) for mixture in self._mixtures.values())
        return {"certainty": sum(float(mixture.certainty()) for mixture in self._mixtures.values()) / groups}

    def state(self) -> Mapping[str, Tensor]:
        """Return where the generator of the noise stands."""
        return {"generator": self._generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the generator to where it stood."""
        self._generator.set_state(state["generator"].cpu())

    def _draw(self) -> None:
        seeds = torch.randint(_SEEDS, (len(self._mixtures),), generator=self._generator).tolist()
        for mixture, seed in zip(self._mixtures.values(), seeds, strict=True):
            mixture.seed = seed

    def _lift(self, target: PrunedParameter, prior: Tensor, dtype: torch.dtype) -> Tensor:
        """Return α · std · (⟨prior, mask⟩ - its mean over the masks), (groups, C(M, N)); the mean is 1 for 2:4."""
        kept = self.pattern.groups(target.inputs_last(prior != 0)).flatten(0, -2).to(dtype)
        alike = kept @ self._masks.to(dtype).T
        strength = self._options.prior_strength * self._options.init_std
        return strength * (alike - alike.mean(1, keepdim=True))


class _Mixture(Parametrisation):
    """The weighted sum of the masks of every group of one target.

    Attributes:
        logits: (groups, C(M, N)), groups in the order in which they lie along the rows.
        seed: of the noise.
        scale: κ.
        temperature: τ.
    """

    masks: Tensor

    def __init__(self, target: PrunedParameter, logits: Tensor, masks: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.register_buffer("masks", masks.to(logits.device, logits.dtype), persistent=False)
        self.seed = 0
        self.scale, self.temperature = 1.0, 1.0
        self._target = target
        self._shape = target.inputs_last(stored(target)).shape

    def effective(self, weight: Tensor) -> Tensor:
        """Return W ⊙ M with the noise of the step."""
        mask: Tensor = _SoftMask.apply(self.logits, self._draw(), self.masks)  # type: ignore[no-untyped-call]
        return weight * self._laid_out(mask)

    def retained(self, weight: Tensor) -> Tensor:
        """Return ‖W ⊙ M‖², a scalar."""
        groups = self._target.inputs_last(weight.detach()).reshape(-1, self.masks.shape[1])
        kept: Tensor = _Retained.apply(self.logits, self._draw(), self.masks, groups)  # type: ignore[no-untyped-call]
        return kept

    def certainty(self) -> Tensor:
        """Return the sum over the groups of the largest probability, without noise; float64."""
        return self._draw().without_noise(self.logits).amax(1).double().sum()

    def likeliest(self) -> Tensor:
        """Return the mask of the largest logit of every group: bool, laid out as the weight."""
        return self._laid_out(self.masks.bool()[self.logits.argmax(1)])

    def _draw(self) -> "_Draw":
        return _Draw(self.seed, self.scale, self.temperature)

    def _laid_out(self, mask: Tensor) -> Tensor:
        return self._target.as_stored(mask.reshape(self._shape))


@dataclass(frozen=True)
class _Draw:
    """One drawing of probabilities: the same wherever it is repeated on a device."""

    seed: int
    scale: float
    temperature: float

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return softmax((κ π + g) / τ), (groups, C(M, N))."""
        generator = torch.Generator(logits.device).manual_seed(self.seed)
        gumbel = torch.empty_like(logits).exponential_(generator=generator)
        gumbel = gumbel.clamp_min_(torch.finfo(gumbel.dtype).tiny).log_().neg_()
        return torch.softmax(gumbel.add_(logits, alpha=self.scale).div_(self.temperature), 1)

    def without_noise(self, logits: Tensor) -> Tensor:
        """Return softmax(κ π / τ)."""
        return torch.softmax(logits * (self.scale / self.temperature), 1)

    def gradient(self, logits: Tensor, masks: Tensor, of_mask: Tensor) -> Tensor:
        """Return the gradient of the logits, given that of the mixed masks, (groups, M)."""
        shares = self.probabilities(logits)
        upstream = of_mask.to(masks.dtype) @ masks.T
        inner = (shares * upstream).sum(1, keepdim=True)
        return (upstream - inner).mul_(shares).mul_(self.scale / self.temperature)

    def mixed(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return Σ y_i S_i, (groups, M), in the precision of the logits whatever autocast says."""
        with torch.autocast(logits.device.type, enabled=False):
            return self.probabilities(logits) @ masks


class _SoftMask(Function):
    """The mixed masks, whose probabilities are drawn again for the gradient instead of being kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, draw: _Draw, masks: Tensor) -> Tensor:
        ctx.save_for_backward(logits, masks)
        ctx.draw = draw
        return draw.mixed(logits, masks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, masks = ctx.saved_tensors
        return ctx.draw.gradient(logits, masks, gradients[0]), None, None


class _Retained(Function):
    """The sum of squares that mixed masks retain of weights (groups, M), with the memory of a scalar."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, draw: _Draw, masks: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(logits, masks, weights)
        ctx.draw = draw
        return draw.mixed(logits, masks).mul_(weights).square_().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, masks, weights = ctx.saved_tensors
        of_mask = ctx.draw.mixed(logits, masks).mul_(weights.square()).mul_(2.0 * gradients[0])
        return ctx.draw.gradient(logits, masks, of_mask), None, None, None
