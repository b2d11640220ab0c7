"""ProxSparse: the exact proximal operator of λ e_{N+1} after every step of AdamW (arXiv 2502.00258).

λ is not multiplied by the learning rate. At the end the mask is the N largest weights of every group; as published it
goes onto the original weights. Where no λ is given, a controller finds it: see `_Controller`. What is not here is the
published second term, which holds the weights near the original ones.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halve.checks import check_positive
from halve.errors import InputError
from halve.learning.learner import Step
from halve.learning.methods.mask_learner import MaskLearner, mask_of, stored, train_only, weights_and_vectors
from halve.maths.pattern import Pattern
from halve.maths.proximal import prox
from halve.model.masked import PrunedParameter

Keep = Literal["original", "trained"]

DONE_AT = 0.8
"""Share of the steps at which all groups should have the pattern; the rest is for the last few, and to settle."""
_GAIN = 30.0
"""How far log λ moves in a whole training while e times as many groups as wanted lack the pattern."""
_REST = 1e-4
"""Share of groups that counts as none: what is added before shares are compared by their logarithms."""
_FIRST = 0.3
"""Share of the mean magnitude that the first λ would take from a mean group's weight in all steps."""
_MOST = 1e12


@dataclass(frozen=True)
class ProxSparseOptions:
    """Options of proxsparse.

    Attributes:
        lam: λ, > 0, in the unit of weights to the power 1 - N; None finds it while training.
        keep: what the mask goes onto: the ``original`` weights, as published, or the ``trained`` ones.
    """

    lam: float | None = None
    keep: Keep = "original"

    def __post_init__(self) -> None:
        if self.lam is not None:
            check_positive("lam of proxsparse", self.lam)
        if self.keep not in get_args(Keep):
            raise InputError(f"keep of proxsparse must be one of {', '.join(get_args(Keep))}, got {self.keep!r}")


class ProxSparse(MaskLearner):
    """The learner. With ``keep="original"`` nothing but the targets is trained, for nothing else would be kept."""

    def __init__(
        self,
        targets: Iterable[PrunedParameter],
        pattern: Pattern,
        options: ProxSparseOptions,
        *,
        prior: Mapping[str, Tensor] | None = None,
        diagonals: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(targets, pattern)
        self._options = options
        self._originals: dict[str, Tensor] = {}
        self._controller = None if options.lam is not None else _Controller(pattern)
        self._lam = options.lam or 0.0
        self._done = 0.0

    def attach(self, model: nn.Module) -> Sequence[nn.Parameter]:
        """Keep a copy of the original weights where they are wanted at the end; return what is trained."""
        targets = self.targets.values()
        if self._options.keep == "trained":
            return train_only(model, weights_and_vectors(model, targets))
        self._originals = {name: stored(target).detach().clone() for name, target in self.targets.items()}
        return train_only(model, [stored(target) for target in targets])

    def begin_step(self, step: Step) -> None:
        """Choose the first λ, where none is given, from the magnitudes and the number of steps."""
        if self._controller is not None and self._lam == 0.0:
            self._lam = self._controller.first([stored(target) for target in self.targets.values()], step)

    @torch.no_grad()
    def after_update(self, step: Step, optimiser: Optimizer) -> None:
        """Apply the operator to every target, and let the controller move λ."""
        done, groups = 0, 0
        for target in self.targets.values():
            weight = target.inputs_last(stored(target))
            sparse = prox(weight, self._lam, self.pattern)
            weight.copy_(sparse)
            violating = self.pattern.violating_groups(sparse)
            groups += violating.numel()
            done += violating.numel() - int(violating.sum())
        self._done = done / groups
        if self._controller is not None:
            self._lam = self._controller.next(self._lam, self._done, step)

    @torch.no_grad()
    def choose(self) -> dict[str, Tensor]:
        """Return the masks of the N largest weights of every group."""
        return {name: mask_of(target, stored(target).abs(), self.pattern) for name, target in self.targets.items()}

    def outcome(self, target: PrunedParameter, weight: Tensor) -> Tensor:
        """Return the original weights, or the trained ones."""
        return self._originals.get(target.name, weight)

    def facts(self) -> Mapping[str, float]:
        """Return ``lambda`` as it is, and ``share``: of the groups that had the pattern after the last operator."""
        return {"lambda": self._lam, "share": self._done}

    def state(self) -> Mapping[str, Tensor]:
        """Return λ, the share of groups, and the original weights where they are wanted at the end."""
        numbers = torch.tensor([self._lam, self._done], dtype=torch.float64)
        return {"numbers": numbers, **{f"original.{name}": each for name, each in self._originals.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self._lam, self._done = state["numbers"].tolist()
        for name, original in self._originals.items():
            original.copy_(state[f"original.{name}"])


@dataclass(frozen=True)
class _Controller:
    """Finds λ such that the share of groups that have the pattern grows evenly, and is 1 before the end.

    After every step log λ moves by ``gain · log((1 - share) / (1 - wanted)) / steps``, where the wanted share grows
    linearly to 1 at `DONE_AT` of the steps: λ rises while groups are late, and falls while they are early. Of the
    logarithm of what is left, the last thousandth of the groups moves λ as much as the first half did.
    """

    pattern: Pattern

    def first(self, weights: Sequence[Tensor], step: Step) -> float:
        """Return the λ that would take `_FIRST` of a weight of mean magnitude from itself, in all steps together."""
        assert self.pattern.keep is not None  # noqa: S101 - checked when the learner was made
        assert self.pattern.group is not None  # noqa: S101
        total = sum(float(weight.detach().abs().double().sum()) for weight in weights)
        mean = max(total / sum(weight.numel() for weight in weights), 1e-30)
        slope = math.comb(self.pattern.group - 1, self.pattern.keep) * mean ** (self.pattern.keep - 1)
        return min(max(_FIRST / (step.total * slope), 1.0 / _MOST), _MOST)

    def next(self, lam: float, share: float, step: Step) -> float:
        """Return λ for the next step, given the share after this one."""
        wanted = min(1.0, (step.number + 1) / (DONE_AT * step.total))
        late = math.log((1.0 - share + _REST) / (1.0 - wanted + _REST))
        return min(max(lam * math.exp(_GAIN * late / step.total), 1.0 / _MOST), _MOST)
