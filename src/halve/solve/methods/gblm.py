"""GBLM-Pruner: Wanda's score and the gradient of the language model's loss (Das et al. 2023, arXiv 2311.04902)."""

from dataclasses import dataclass

from torch import Tensor

from halve.checks import check_not_negative
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern, apply_mask
from halve.solve.gradient_scores import gradient_of, input_norms
from halve.solve.outcome import Outcome, Status


@dataclass(frozen=True)
class GBLMOptions:
    """Options of GBLM.

    Attributes:
        gradient_scale: what every sample's gradient is multiplied by, >= 0; 0 leaves Wanda's score.
    """

    gradient_scale: float = 100.0

    def __post_init__(self) -> None:
        check_not_negative("gradient_scale of gblm", self.gradient_scale)


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: GBLMOptions) -> Outcome:
    """Keep the largest ``|w_ij| (‖x_j‖ + √Σ (100 g_ij)²)`` of each group, or of each row where there are none.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs, with the gradient of the loss; of the Gram matrix only the diagonal is used.
        pattern: N:M or a percentage.
        options: the scale.

    Returns:
        Outcome: the kept weights bit for bit, the rest +0.0.

    Raises:
        CalibrationError: the Gram matrix or the gradient is zero.
    """
    gradient = gradient_of(stats)
    norms = input_norms(stats, gradient) + options.gradient_scale * gradient.root
    return Outcome(apply_mask(weight, pattern.keep_mask(weight.float().abs() * norms)), Status.OK, "gblm")
