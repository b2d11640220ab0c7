"""What is minimised, if not the plain loss on the calibration tokens: a shrunk H, targets from the dense model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from halve.dense_target import dense_target
from halve.errors import InputError
from halve.gram import Statistics
from halve.methods.auto import FAST
from halve.options import check_positive, is_number
from halve.pattern import Pattern
from halve.shrinkage import choose_shrinkage, shrink

AUTO = "auto"

MATCH_DENSE = 0.25
"""How far the targets of method ``auto`` are the dense model's outputs, where both models' inputs are known."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, where that is not the plain loss on the calibration tokens.

    Attributes:
        shrinkage: how far H is shrunk towards its diagonal (`halve.shrinkage`), in [0, 1]; ``auto`` chooses it by
            held-out loss where the statistics are kept by halves. None is ``auto`` for method ``auto``, and 0 for
            every method that was asked for by name.
        match_dense: α in [0, 1], how far targets are the dense model's outputs (`halve.dense_target`); above 0 it
            needs statistics with ``cross``. None is `MATCH_DENSE` for method ``auto`` where the statistics have it,
            but 0 with effort ``fast``, since they take a second forward pass, and 0 elsewhere.
        match_ridge: what holds the weights of such targets near the dense ones, > 0.
    """

    shrinkage: float | str | None = None
    match_dense: float | None = None
    match_ridge: float = 0.1

    def __post_init__(self) -> None:
        if self.shrinkage not in (None, AUTO) and not (is_number(self.shrinkage) and 0.0 <= self.shrinkage <= 1.0):
            raise InputError(f"shrinkage must be auto or a number from 0 to 1, got {self.shrinkage!r}")
        if self.match_dense is not None and not (is_number(self.match_dense) and 0.0 <= self.match_dense <= 1.0):
            raise InputError(f"match_dense must be a number from 0 to 1, got {self.match_dense!r}")
        check_positive("match_ridge", self.match_ridge)

    @classmethod
    def of(cls, asked: "Objective | None", options: Mapping[str, Any]) -> "Objective":
        """Return what was asked for, or the defaults: for effort ``fast`` they leave the dense model's outputs out.

        Args:
            asked: the user's, None if there is none.
            options: of the method.

        Raises:
            InputError: it is something else.
        """
        if asked is not None and not isinstance(asked, cls):
            raise InputError(
                f"objective must be a halve.Objective, such as Objective(shrinkage=0.1), got {type(asked).__name__}"
            )
        objective = asked or cls()
        if objective.match_dense is None and options.get("effort") == FAST:
            return replace(objective, match_dense=0.0)
        return objective

    def check_statistics(self, gram: Tensor | Statistics | None) -> None:
        """Refuse a Gram matrix that lacks what was expressly asked for.

        Raises:
            InputError: shrinkage is to be chosen without halves, or targets computed without the dense model's inputs.
        """
        if self.insists_on_dense and not (isinstance(gram, Statistics) and gram.cross is not None):
            raise InputError("match_dense needs statistics with the dense model's inputs (cross): set it to 0")
        if self.shrinkage == AUTO and gram is not None and not isinstance(gram, Statistics):
            raise InputError(
                "shrinkage auto judges on one half of the tokens what was fitted on the other: give Statistics with "
                "halves (GramAccumulator(…, halves=True)), or a number"
            )

    def chooses_shrinkage(self, method: str) -> bool:
        """Whether ``method`` is to have its shrinkage chosen."""
        return self.shrinkage == AUTO or (self.shrinkage is None and method == AUTO)

    @property
    def insists_on_dense(self) -> bool:
        """Whether targets from the dense model were asked for, so that to go without them would be a fault."""
        return self.match_dense is not None and self.match_dense > 0.0

    def blend(self, method: str) -> float:
        """Return α for ``method``, where statistics have both models' inputs."""
        if self.match_dense is not None:
            return self.match_dense
        return MATCH_DENSE if method == AUTO else 0.0

    def apply(
        self, weight: Tensor, stats: Statistics, pattern: Pattern, method: str
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return what to solve for: the weights to prune, H, and the facts ``shrinkage`` and ``match_dense``, if not 0.

        Args:
            weight: (d_out, d_in), W0.
            stats: of the layer's inputs, H not zero.
            pattern: the sparsity pattern.
            method: name of the method.

        Raises:
            FactorisationError: targets from the dense model could not be computed.
        """
        blend = 0.0 if stats.cross is None else self.blend(method)
        target = dense_target(weight, stats, blend, self.match_ridge)
        if self.chooses_shrinkage(method):
            amount = choose_shrinkage(target, stats, pattern)
        else:
            amount = 0.0 if self.shrinkage is None else float(self.shrinkage)
        facts = {"shrinkage": amount, "match_dense": blend}
        return target, shrink(stats.gram, amount), {name: value for name, value in facts.items() if value}
