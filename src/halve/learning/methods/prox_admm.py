"""prox-admm: weights and mask trained together, with the exact operator of a growing λ e_{N+1} (Halve).

Let V = W · d / c, where d is the metric (the root of the loss's curvature along each weight) and c makes the mean
magnitude 1, and let P_λ(W) be the exact operator applied to V, and scaled back. There are two forms. ``proximal`` sends
the weights themselves through it after every step of Adam, W ← P_λ(W). ``admm`` gives them a sparse copy Z and a dual
variable U: Adam minimises the loss plus ρ/2 ‖W - Z + U‖², and every few steps Z ← P_λ(W + U), U ← U + W - Z. In both λ
grows geometrically until, at a given share of the steps, the mask is that of the N largest of every group of V (of the
scaled W + U), and stays for the rest of the training.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halve.checks import check_count, check_not_negative, check_positive
from halve.errors import InputError
from halve.learning.learner import Step
from halve.learning.methods.mask_learner import (
    InputScales,
    MaskLearner,
    checked_prior,
    hold,
    load_masks,
    save_masks,
    stored,
    train_only,
    weights_and_vectors,
)
from halve.maths.pattern import Pattern, apply_mask
from halve.maths.proximal import prox
from halve.model.masked import PrunedParameter

Metric = Literal["inputs", "adam", "magnitude"]
Form = Literal["proximal", "admm"]
_SMALLEST = 1e-30
_FLOOR = 1e-4
"""Least curvature of a weight, as a share of the mean one: Adam's second moments of some weights are 0."""


@dataclass(frozen=True)
class ProxADMMOptions:
    """Options of prox-admm.

    Attributes:
        form: ``proximal`` or ``admm``.
        metric: ``inputs``, the root mean square of each input; ``adam``, the root of Adam's second moment;
            ``magnitude``, 1.
        lambda_start: first λ, > 0; dimensionless, for weights of mean magnitude 1.
        lambda_end: λ when the mask is fixed, >= ``lambda_start``.
        fixed_from: share of the steps after which the mask is fixed, 0 < fixed_from <= 1.
        rho: ρ of form ``admm``, > 0, in the unit of gradient over weight.
        every: steps between two updates of Z and U in form ``admm``.
        revive: share of its dense value that a weight begins with that a prior has pruned, 0 to 1.
    """

    form: Form = "proximal"
    metric: Metric = "inputs"
    lambda_start: float = 1e-3
    lambda_end: float = 1.0
    fixed_from: float = 0.5
    rho: float = 0.01
    every: int = 8
    revive: float = 0.5

    def __post_init__(self) -> None:
        for name, choices in (("form", get_args(Form)), ("metric", get_args(Metric))):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} of prox-admm must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("lambda_start", "lambda_end", "fixed_from", "rho"):
            check_positive(f"{name} of prox-admm", getattr(self, name))
        check_count("every of prox-admm", self.every)
        check_not_negative("revive of prox-admm", self.revive)
        if self.lambda_end < self.lambda_start:
            raise InputError(
                f"lambda_end of prox-admm must be at least lambda_start = {self.lambda_start:g}, "
                f"got {self.lambda_end!r}"
            )
        for name in ("fixed_from", "revive"):
            if getattr(self, name) > 1.0:
                raise InputError(f"{name} of prox-admm is a share, at most 1, got {getattr(self, name)!r}")


class ProxADMM(MaskLearner):
    """The learner.

    Args:
        targets: the parameters to prune.
        pattern: N:M.
        options: of the method.
        prior: weights of a pruned checkpoint by name, which the training begins from; None begins from the model's.
        diagonals: second moments of the inputs, for metric ``inputs``.

    Attributes:
        by_magnitude: with metric ``inputs``, names of the targets without second moments, whose metric is 1.
    """

    def __init__(
        self,
        targets: Iterable[PrunedParameter],
        pattern: Pattern,
        options: ProxADMMOptions,
        *,
        prior: Mapping[str, Tensor] | None = None,
        diagonals: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(targets, pattern)
        self._options = options
        self._scales = InputScales(self.targets, diagonals if options.metric == "inputs" else None)
        self.by_magnitude = self._scales.by_magnitude if options.metric == "inputs" else ()
        self._prior = None if prior is None else checked_prior(prior, self.targets, pattern)
        self._sizes: dict[str, float] = {}
        self._copies: dict[str, Tensor] = {}
        self._duals: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._lam, self._done = options.lambda_start, 0.0

    @torch.no_grad()
    def attach(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Begin from the prior, where there is one; return targets, norms and biases."""
        for name, target in self.targets.items():
            weight = stored(target)
            if self._prior is not None:
                start = self._prior[name].to(weight.device, weight.dtype)
                weight.copy_(torch.where(start != 0, start, weight * self._options.revive))
            self._sizes[name] = float(self._scales.scores(target, weight).mean())
            if self._options.form == "admm":
                self._copies[name], self._duals[name] = weight.clone(), torch.zeros_like(weight)
        self._prior = None
        return train_only(model, weights_and_vectors(model, self.targets.values()))

    @torch.no_grad()
    def before_update(self, step: Step) -> None:
        """Zero the gradients outside a fixed mask; before, add that of the distance to the sparse copies."""
        for name, target in self.targets.items():
            weight = stored(target)
            if weight.grad is None:
                continue
            if self._masks:
                weight.grad.mul_(self._masks[name])
            elif self._copies:
                weight.grad.add_(weight - self._copies[name] + self._duals[name], alpha=self._options.rho)

    @torch.no_grad()
    def after_update(self, step: Step, optimiser: Optimizer) -> None:
        """Apply the operator with the λ of this step, or hold the fixed mask."""
        if not self._masks:
            taken = (step.number + 1) / max(1.0, self._options.fixed_from * step.total)
            growth = self._options.lambda_end / self._options.lambda_start
            self._lam = self._options.lambda_start * growth ** min(1.0, taken)
            self._shrink(step, optimiser)
            if taken >= 1.0:
                self._masks = {name: self._best(target, optimiser) for name, target in self.targets.items()}
                self._copies, self._duals = {}, {}
                for name, target in self.targets.items():
                    hold(stored(target), self._masks[name], optimiser)
        for name, target in self.targets.items():
            if self._masks:
                stored(target).copy_(apply_mask(stored(target), self._masks[name]))

    @torch.no_grad()
    def choose(self) -> dict[str, Tensor]:
        """Return the masks, fixed or as the metric has them now (`adam` counts as `magnitude` here)."""
        return dict(self._masks) or {name: self._best(target, None) for name, target in self.targets.items()}

    def facts(self) -> Mapping[str, float]:
        """Return ``lambda``, and ``share``: of the groups that had the pattern after the last operator."""
        return {"lambda": self._lam, "share": self._done}

    def state(self) -> Mapping[str, Tensor]:
        """Return the masks once they are fixed, what is moved towards them before, and the magnitudes at the start."""
        saved = {
            "numbers": torch.tensor([self._lam, self._done], dtype=torch.float64),
            "sizes": torch.tensor([self._sizes[name] for name in self.targets], dtype=torch.float64),
            **save_masks(self._masks),
        }
        for name in self._copies:
            saved[f"copy.{name}"] = self._copies[name].contiguous()
            saved[f"dual.{name}"] = self._duals[name].contiguous()
        return saved

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self._lam, self._done = state["numbers"].tolist()
        self._sizes = dict(zip(self.targets, state["sizes"].tolist(), strict=True))
        self._masks = load_masks(state, self.targets)
        self._copies, self._duals = {}, {}
        for name, target in self.targets.items():  # of a state before the masks were fixed, in a learner that has them
            if f"copy.{name}" in state:
                device = stored(target).device
                self._copies[name] = state[f"copy.{name}"].to(device, copy=True)
                self._duals[name] = state[f"dual.{name}"].to(device, copy=True)

    def _shrink(self, step: Step, optimiser: Optimizer) -> None:
        done, groups = 0, 0
        if self._copies and (step.number + 1) % self._options.every:
            return
        for name, target in self.targets.items():
            weight = stored(target)
            if self._copies:
                wanted = weight + self._duals[name]
                sparse = self._operator(target, wanted, optimiser)
                self._copies[name], self._duals[name] = sparse, wanted - sparse
            else:
                sparse = self._operator(target, weight, optimiser)
                weight.copy_(sparse)
            violating = self.pattern.violating_groups(target.inputs_last(sparse))
            groups += violating.numel()
            done += violating.numel() - int(violating.sum())
        self._done = done / groups

    def _operator(self, target: PrunedParameter, weight: Tensor, optimiser: Optimizer) -> Tensor:
        """Return P_λ(weight), laid out as the parameter; what the operator leaves as it is keeps its bits."""
        metric = self._metric(target, optimiser)
        scaled = target.inputs_last(weight) * metric
        sparse = prox(scaled, self._lam, self.pattern)
        return target.as_stored(torch.where(sparse == scaled, target.inputs_last(weight), sparse / metric))

    def _metric(self, target: PrunedParameter, optimiser: Optimizer | None) -> Tensor:
        """Return d / c, which broadcasts against the weights with their inputs last."""
        if self._options.metric != "adam" or optimiser is None:
            return self._scales.of(target) / max(self._sizes[target.name], _SMALLEST)
        squares = optimiser.state.get(stored(target), {}).get("exp_avg_sq")
        if squares is None:
            raise InputError(
                f"metric adam of prox-admm needs Adam's second moments, and the optimiser has none of {target.name}: "
                "use the learner's own optimiser, or another metric"
            )
        found = target.inputs_last(squares.clamp_min(_FLOOR * float(squares.mean())).sqrt())
        size = float((found * target.inputs_last(stored(target)).abs()).mean())
        return found / max(size, _SMALLEST)

    def _best(self, target: PrunedParameter, optimiser: Optimizer | None) -> Tensor:
        weight = stored(target)
        wanted = weight + self._duals[target.name] if self._copies else weight
        scores = target.inputs_last(wanted).abs() * self._metric(target, optimiser)
        return target.as_stored(self.pattern.keep_mask(scores))
