"""What is minimised, if not the plain loss on the calibration tokens: a shrunk H, targets from the dense model."""

from dataclasses import dataclass

from torch import Tensor

from halve.checks import check_positive, is_number
from halve.errors import InputError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.defaults import Defaults
from halve.solve.dense_target import dense_target
from halve.solve.shrinkage import choose_shrinkage, shrink

AUTO = "auto"
"""The shrinkage that is chosen by held-out loss."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, where that is not the plain loss on the calibration tokens.

    Attributes:
        shrinkage: how far H is shrunk towards its diagonal (`halve.solve.shrinkage`), in [0, 1]; ``auto`` chooses it by
            held-out loss where the statistics are kept by halves. Where nobody says it is ``auto`` for method
            ``auto``, and 0 for the others.
        match_dense: how far targets are the dense model's outputs, α in [0, 1] (`halve.solve.dense_target`); above 0 it
            needs statistics with ``cross``. Where nobody says, and the statistics have it, it is 0.25 for method
            ``auto`` with more effort than ``fast``, and 0 for the others; in mixtures of experts it is 0.
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
    def of(cls, asked: "Objective | None") -> "Objective":
        """Return what was asked for, or the defaults.

        Raises:
            InputError: it is something else.
        """
        if asked is not None and not isinstance(asked, cls):
            raise InputError(
                f"objective must be a halve.Objective, such as Objective(shrinkage=0.1), got {type(asked).__name__}"
            )
        return asked or cls()

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

    def chooses_shrinkage(self, defaults: Defaults) -> bool:
        """Whether a method with these defaults is to have its shrinkage chosen."""
        return self.shrinkage == AUTO or (self.shrinkage is None and defaults.choose_shrinkage)

    @property
    def insists_on_dense(self) -> bool:
        """Whether targets from the dense model were asked for, so that to go without them would be a fault."""
        return self.match_dense is not None and self.match_dense > 0.0

    def blend(self, defaults: Defaults) -> float:
        """Return α for a method with these defaults, where statistics have both models' inputs."""
        return defaults.match_dense if self.match_dense is None else self.match_dense

    def apply(
        self, weight: Tensor, stats: Statistics, pattern: Pattern, defaults: Defaults
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return what to solve for: the weights to prune, H, and the facts ``shrinkage`` and ``match_dense``, if not 0.

        Args:
            weight: (d_out, d_in), W0.
            stats: of the layer's inputs, H not zero.
            pattern: the sparsity pattern.
            defaults: of the method.

        Raises:
            FactorisationError: targets from the dense model could not be computed.
        """
        blend = 0.0 if stats.cross is None else self.blend(defaults)
        target = dense_target(weight, stats, blend, self.match_ridge)
        if self.chooses_shrinkage(defaults):
            amount = choose_shrinkage(target, stats, pattern)
        else:
            amount = 0.0 if self.shrinkage is None else float(self.shrinkage)
        facts = {"shrinkage": amount, "match_dense": blend}
        return target, shrink(stats.gram, amount), {name: value for name, value in facts.items() if value}
