"""Leaving dense what costs most: decided once by measured damage, before a run prunes anything.

What was chosen is part of the run's fingerprint, so that a run that goes on goes by what its beginning measured.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from halve.checks import check_count
from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.model.plan import Matrix, Plan
from halve.option_groups import internal, option
from halve.sensitivity.alone import damages_alone
from halve.sensitivity.budget import fewest_dense
from halve.sensitivity.choose import choose
from halve.sensitivity.quick import caution_of_unreached, input_norms
from halve.sensitivity.samples import Samples, working
from halve.sensitivity.units import Unit, units_of

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*x")
_KEPT, _PRUNED = "keep_dense.kept.", "keep_dense.pruned."
"""How the fields of a fingerprint begin that hold what was measured."""


@dataclass(frozen=True)
class KeepDense:
    """Leave the matrices dense that cost most per weight.

    Attributes:
        amount: leave dense what damages the model most, per weight, when it is pruned alone: ``10%`` of the weights
            that would be pruned; or ``1.5x``, as few as keep perplexity within so many times the dense model's, on
            sequences of the calibration text that the damage was not measured on, with everything else pruned by
            ``wanda``. A run that goes on does not measure again.
        tokens: of the calibration set that damage is measured on, about; a budget of perplexity takes as many again.
        kept: damage of each parameter that stays dense, by name: nats a position, to six digits.
        pruned: the same of all others. What is given is measured anew.

    Raises:
        InputError: an amount is neither, or a number is out of range.
    """

    amount: str = option(name="keep_dense")
    tokens: int = option(512, name="keep_dense_tokens")
    kept: Mapping[str, float] = internal(factory=dict)
    pruned: Mapping[str, float] = internal(factory=dict)

    def __post_init__(self) -> None:
        check_count("keep_dense_tokens", self.tokens)
        share, ratio = self.share, self.ratio
        if (share is None or not 0.0 < share < 1.0) and (ratio is None or not ratio > 1.0):
            raise InputError(
                f"keep_dense = {self.amount!r} is neither a share of the weights between 0% and 100%, such as 10%, nor "
                "how many times the perplexity may grow, above 1, such as 1.5x"
            )

    @property
    def share(self) -> float | None:
        """Share of the weights that stays dense, 0 to 1; None if a perplexity is asked for."""
        found = _SHARE.fullmatch(self.amount.strip()) if isinstance(self.amount, str) else None
        return None if found is None else float(found[1]) / 100.0

    @property
    def ratio(self) -> float | None:
        """How many times the dense model's perplexity is allowed; None if a share is asked for."""
        found = _RATIO.fullmatch(self.amount.strip()) if isinstance(self.amount, str) else None
        return None if found is None else float(found[1])

    def recalled(self, begun: Mapping[str, str]) -> "KeepDense":
        """Return the same with what the fingerprint of a run that is to go on has measured."""
        kept, pruned = (
            {name.removeprefix(prefix): float(value) for name, value in begun.items() if name.startswith(prefix)}
            for prefix in (_KEPT, _PRUNED)
        )
        return replace(self, kept=kept, pruned=pruned)

    def measured(
        self,
        model: nn.Module,
        plan: Plan,
        samples: Samples,
        pattern: Pattern,
        *,
        together: Collection[Sequence[str]] = (),
        device: torch.device,
        warn: Callable[[str], None] = lambda _: None,
    ) -> "KeepDense":
        """Return the same with the choice for a model.

        Memory: a float32 copy of the model, unless it is float32 and runs on the CPU; what every block returns for one
        batch; and three times the log-probabilities of a batch.

        Args:
            model: dense, on the CPU, in evaluation mode.
            plan: what would be pruned of it.
            samples: of the calibration set.
            pattern: to prune to.
            together: names of parameters that are stored in one tensor.
            device: where the model is run.
            warn: called with a sentence on what the choice suffers from, or what takes long, before it takes long.

        Raises:
            InputError: nothing fits the share, all would stay dense, or there is too little memory.
            UnsupportedModelError: the model gives no logits.
        """
        units = units_of(plan, together)
        most = self._most(units)
        ratio = self.ratio
        if ratio is not None:
            samples.check_held_out(model)
        with working(model, device) as copied:
            norms = input_norms(copied, plan.matrices, samples.judging)
            if caution := caution_of_unreached(plan.matrices, norms):
                warn(caution)
            found = damages_alone(copied, plan.blocks, units, samples.judging, norms, pattern, warn)
            damages = {name: float(f"{damage:.6g}") for name, damage in found.items()}
            if ratio is None:
                chosen = choose(units, damages, most)
            else:
                chosen = fewest_dense(copied, units, damages, samples.held_out, norms, pattern, ratio)
        names = {unit.name for unit in chosen}
        kept = {name: damages[unit.name] for unit in units if unit.name in names for name in unit.parameters}
        pruned = {name: damages[unit.name] for unit in units if unit.name not in names for name in unit.parameters}
        return replace(self, kept=dict(sorted(kept.items())), pruned=dict(sorted(pruned.items())))

    def _most(self, units: Sequence[Unit]) -> int:
        """Return how many weights may stay dense, and refuse a share that holds no unit."""
        whole = sum(unit.weights for unit in units)
        if self.share is None:
            return whole
        smallest = min(unit.weights for unit in units)
        if self.share * whole < smallest:
            raise InputError(
                f"keep_dense = {self.amount} of {whole:,} weights is less than the smallest matrix has, "
                f"{smallest:,}: ask for {100 * smallest / whole:.2g}% or more"
            )
        return int(self.share * whole)

    def why_dense(self, matrix: Matrix) -> str:
        """Return why a matrix stays dense, as half a sentence; empty if it does not."""
        return self.reason if matrix.parameter in self.kept else ""

    @property
    def reason(self) -> str:
        """Why matrices stay dense: the same of all, so that they are counted together; `kept` has their damages."""
        return f"kept dense: it costs most per weight (keep_dense {self.amount})"
