"""What a solver hands back: the weights, and the truth about how they came to be."""

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor


class Status(StrEnum):
    """How a solve ended."""

    OK = "ok"
    MAX_ITER = "max_iter"
    """The iteration limit was reached; the weights have the pattern, the optimum was not."""
    FELL_BACK = "fell_back"
    """Another method than the one asked for was used; ``reason`` names it."""
    FAILED = "failed"
    """No pruned weights; ``weight`` is the input, unchanged."""


@dataclass(frozen=True)
class Outcome:
    """The result of pruning one matrix.

    Attributes:
        weight: (d_out, d_in), the dtype of the given weight, already in the pattern unless ``status`` is FAILED.
        status: how the solve ended.
        method: the method that made the mask (not the one asked for, after a fallback).
        reason: empty when OK, otherwise one sentence.
        facts: numbers worth reporting, such as ``relative_loss``, ``relative_loss_before_refit``, ``iterations``,
            ``damping``, ``tokens``, ``seconds``.
    """

    weight: Tensor
    status: Status
    method: str
    reason: str = ""
    facts: dict[str, float] = field(default_factory=dict)
