"""Wanda++: Wanda's score and the gradient of the block's output (Yang et al. 2025, arXiv 2503.04992).

In a model the method has rounds: the block's matrices are pruned, and all their weights, the pruned ones too, take
some steps towards the dense block's output (`halve.model.reconstruct.optimise_in_rounds`). What is pruned at last are
the weights that the rounds leave. One matrix by itself has no block, and gets the score alone.
"""

from dataclasses import dataclass

from torch import Tensor

from halve.checks import check_count, check_not_negative, check_positive
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern, apply_mask
from halve.solve.gradient_scores import gradient_of, input_norms
from halve.solve.outcome import Outcome, Status


@dataclass(frozen=True)
class WandaPlusPlusOptions:
    """Options of Wanda++.

    Attributes:
        gradient_scale: weight of the gradient beside the norm of the inputs, >= 0; 0 leaves Wanda's score.
        rounds: of pruning and of steps towards the dense block's output, >= 0.
        round_samples: calibration samples in a round, one step each, drawn anew every time; >= 1.
        learning_rate: of RMSprop in the rounds, > 0.
    """

    gradient_scale: float = 100.0
    rounds: int = 5
    round_samples: int = 32
    learning_rate: float = 3e-7

    def __post_init__(self) -> None:
        check_not_negative("gradient_scale of wanda++", self.gradient_scale)
        check_count("rounds of wanda++", self.rounds, least=0)
        check_count("round_samples of wanda++", self.round_samples)
        check_positive("learning_rate of wanda++", self.learning_rate)


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: WandaPlusPlusOptions) -> Outcome:
    """Keep the largest ``|w_ij| (‖x_j‖ + 100 √(Σ g_ij² / samples))`` of each group, or of each row.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs, with the gradient of the block's output; of the Gram matrix only the diagonal is
            used. If the gradient has tuned weights, they are scored and kept instead of ``weight``.
        pattern: N:M or a percentage.
        options: the scale; the others are for blocks.

    Returns:
        Outcome: the kept weights, given or tuned, the rest +0.0.

    Raises:
        CalibrationError: the Gram matrix or the gradient is zero.
    """
    gradient = gradient_of(stats)
    source = weight if gradient.tuned is None else gradient.tuned
    norms = input_norms(stats, gradient) + options.gradient_scale * gradient.root / gradient.samples**0.5
    mask = pattern.keep_mask(source.float().abs() * norms)
    return Outcome(apply_mask(source.to(weight.dtype), mask), Status.OK, "wanda++")
