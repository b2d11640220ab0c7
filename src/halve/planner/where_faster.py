"""Leaving dense what would not be faster sparse: every shape is measured once, before a run prunes anything.

What was measured is part of the run's fingerprint, so that a run that goes on goes by what its beginning measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from halve.checks import check_count, check_positive
from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.model.classify import make_plan
from halve.model.layers import CONVOLUTION, EXPERTS_IN_ONE
from halve.model.plan import Matrix
from halve.option_groups import internal, option

_RATIOS = "only_where_faster.ratios."
"""How the fields of a fingerprint begin that hold what was measured."""


@dataclass(frozen=True)
class WhereFaster:
    """Prune only matrices whose products are measured to be faster sparse on this machine.

    Attributes:
        factor: leave matrices dense whose products are not this many times as fast sparse on this machine, measured
            before anything is pruned; a run that goes on does not measure again.
        batch: rows of the products that are measured: sequences decoded at once, or tokens of a prompt.
        ratios: how many times as fast they are, to two decimals, by shape (``"576x1536"``: d_out, d_in); 0 where
            there is no sparse product of that shape. What is given is measured anew.

    Raises:
        InputError: a number is out of range.
    """

    factor: float = option(name="only_where_faster")
    batch: int = option(1, name="faster_at_batch")
    ratios: Mapping[str, float] = internal(factory=dict)

    def __post_init__(self) -> None:
        check_positive("only_where_faster", self.factor)
        check_count("faster_at_batch", self.batch)

    @classmethod
    def of(cls, given: "WhereFaster | float | None") -> "WhereFaster | None":
        """Return what is meant: a number is a factor."""
        return given if given is None or isinstance(given, cls) else cls(given)  # type: ignore[arg-type]

    def measured(
        self,
        model: nn.Module,
        pattern: Pattern,
        skip: Sequence[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        begun: Mapping[str, str] | None = None,
    ) -> "WhereFaster":
        """Return the same with the ratios of a model's matrices.

        Args:
            model: in memory.
            pattern: to prune to.
            skip: shell-style patterns of parameters that stay dense anyway.
            dtype: of the weights that will be run.
            device: where they are measured.
            begun: fingerprint of the run that is to go on: what is in it is taken, and nothing is measured.

        Raises:
            InputError: no matrix is fast enough, there are no sparse products here, or too little memory.
        """
        if begun is not None:
            kept = {
                name.removeprefix(_RATIOS): float(value) for name, value in begun.items() if name.startswith(_RATIOS)
            }
            return replace(self, ratios=dict(sorted(kept.items())))
        plan = make_plan(model, pattern, skip=skip)
        shapes = dict.fromkeys((matrix.d_out, matrix.d_in) for matrix in plan.matrices if matrix.layout != "conv")
        if not shapes:
            raise InputError(
                "all that could be pruned are convolutions, and there is no sparse product of those, so nothing would "
                "be faster: leave that out (only_where_faster)"
            )
        ratios = {_name(*shape): _ratio(*shape, self.batch, pattern, dtype, device) for shape in shapes}
        best = max(ratios, key=lambda shape: ratios[shape])
        if ratios[best] < self.factor:
            raise InputError(
                f"no matrix is {self.factor:g} times as fast at {pattern} as dense at batch {self.batch} on this "
                f"machine, the best {ratios[best]:.2f} times ({best}), and nothing was pruned: see `halve plan`, or "
                "ask for less"
            )
        return replace(self, ratios=dict(sorted(ratios.items())))  # the record's order, whoever measured

    def why_dense(self, matrix: Matrix, pattern: Pattern) -> str:
        """Return why a matrix stays dense, as half a sentence; empty if it is fast enough."""
        if matrix.layout == "conv":
            return CONVOLUTION
        if matrix.expert is not None:
            return EXPERTS_IN_ONE
        return self._reason(self.ratios.get(_name(matrix.d_out, matrix.d_in), 0.0), pattern)

    def reasons(self, pattern: Pattern) -> set[str]:
        """Return everything that `why_dense` may say."""
        return {CONVOLUTION, EXPERTS_IN_ONE, *(self._reason(ratio, pattern) for ratio in self.ratios.values())} - {""}

    def _reason(self, ratio: float, pattern: Pattern) -> str:
        if ratio >= self.factor:
            return ""
        if not ratio:
            return f"there is no sparse product of its shape at {pattern} on this machine"
        return (
            f"{pattern} is {ratio:.2f} times as fast as dense at batch {self.batch} on this machine, less than the "
            f"{self.factor:g} asked for"
        )


def _name(d_out: int, d_in: int) -> str:
    return f"{d_out}x{d_in}"


def _ratio(d_out: int, d_in: int, batch: int, pattern: Pattern, dtype: torch.dtype, device: torch.device) -> float:
    """Measure one shape; to two decimals, which are what is decided by and what is told; 0 if it has no product."""
    from halve.runtime import speed

    speed.check_measurable(pattern, dtype, device)
    if speed.unfit(d_out, d_in, dtype, device):
        return 0.0
    remedy = "free some, or leave only_where_faster out"
    speed.check_room(d_out, d_in, batch, pattern=pattern, dtype=dtype, device=device, remedy=remedy)
    return round(speed.measure(d_out, d_in, [batch], pattern=pattern, dtype=dtype, device=device)[0].ratio, 2)
