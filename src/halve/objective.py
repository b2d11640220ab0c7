"""What is minimised, if not the plain loss on the calibration tokens: a shrunk H, targets from the dense model."""

from dataclasses import dataclass

from torch import Tensor

from halve.dense_target import dense_target
from halve.errors import InputError
from halve.gram import Statistics
from halve.options import check_positive, is_number
from halve.pattern import Pattern
from halve.shrinkage import choose_shrinkage, shrink

AUTO = "auto"


@dataclass(frozen=True)
class Objective:
    """What is minimised, where that is not the plain loss on the calibration tokens.

    Attributes:
        shrinkage: how far H is shrunk towards its diagonal (`halve.shrinkage`), in [0, 1]; ``auto`` chooses it by
            held-out loss where the statistics are kept by halves. None is ``auto`` for method ``auto``, and 0 for
            every method that was asked for by name.
        match_dense: α in [0, 1], how far targets are the dense model's outputs (`halve.dense_target`); above 0 it
            needs statistics with ``cross``.
        match_ridge: what holds the weights of such targets near the dense ones, > 0.
    """

    shrinkage: float | str | None = None
    match_dense: float = 0.0
    match_ridge: float = 0.1

    def __post_init__(self) -> None:
        if self.shrinkage not in (None, AUTO) and not (is_number(self.shrinkage) and 0.0 <= self.shrinkage <= 1.0):
            raise InputError(f"shrinkage must be auto or a number from 0 to 1, got {self.shrinkage!r}")
        if not is_number(self.match_dense) or not 0.0 <= self.match_dense <= 1.0:
            raise InputError(f"match_dense must be a number from 0 to 1, got {self.match_dense!r}")
        check_positive("match_ridge", self.match_ridge)

    def chooses_shrinkage(self, method: str) -> bool:
        """Whether ``method`` is to have its shrinkage chosen."""
        return self.shrinkage == AUTO or (self.shrinkage is None and method == AUTO)

    def apply(self, weight: Tensor, stats: Statistics, pattern: Pattern, method: str) -> tuple[Tensor, Tensor, float]:
        """Return what to solve for: the weights to prune, H, and the shrinkage that made it.

        Args:
            weight: (d_out, d_in), W0.
            stats: of the layer's inputs, H not zero.
            pattern: the sparsity pattern.
            method: name of the method.

        Raises:
            FactorisationError: targets from the dense model could not be computed.
        """
        target = dense_target(weight, stats, self.match_dense, self.match_ridge)
        if self.chooses_shrinkage(method):
            amount = choose_shrinkage(target, stats, pattern)
        else:
            amount = 0.0 if self.shrinkage is None else float(self.shrinkage)
        return target, shrink(stats.gram, amount), amount
