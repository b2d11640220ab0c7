"""What the methods that weigh gradients have in common: which gradients, and the two norms that a score adds up."""

import math
from enum import StrEnum

from torch import Tensor

from halve.errors import CalibrationError, InputError
from halve.maths.gram import Gradient, Statistics
from halve.maths.quadratic import feature_scales


class GradientOf(StrEnum):
    """Of what a method needs the gradient, for each calibration sample by itself."""

    LOSS = "loss"
    """The mean cross-entropy of a sample's tokens under the dense model: takes a backward pass through all of it."""
    OUTPUT = "output"
    """The 2-norm of what a block returns for a sample: takes a backward pass through that block alone."""


def gradient_of(stats: Statistics) -> Gradient:
    """Return the gradient that came with the statistics.

    Raises:
        InputError: none did.
        CalibrationError: it is zero everywhere.
    """
    if stats.gradient is None:
        raise InputError("the statistics have no gradient, which this method weighs: give one")
    if not bool(stats.gradient.root.any()):
        raise CalibrationError("the gradients are zero: what they were taken of does not depend on this matrix")
    return stats.gradient


def input_norms(stats: Statistics, gradient: Gradient) -> Tensor:
    """Return ``‖x_j‖ = √(Σ x_j² / samples)`` of every input feature, the sum running over all tokens.

    Wanda's own norm, of which only the ratios between features matter there. Beside a gradient of one sample's loss
    the scale matters: it grows with the tokens of a sample.

    Args:
        stats: of the inputs.
        gradient: for the number of samples.

    Returns:
        Tensor: (d_in,) float32; dead features have the floor of `feature_scales`.

    Raises:
        CalibrationError: the Gram matrix is zero.
    """
    return feature_scales(stats.gram) * math.sqrt(stats.tokens / gradient.samples)
