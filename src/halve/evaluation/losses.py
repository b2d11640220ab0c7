"""The loss of tokens under logits, and sums of it over windows."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from halve.errors import InputError

LOGITS_AT_ONCE = 2**24
"""Elements of the logits that are held in float32: 64 MiB."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood (n,) of targets (n,) under logits (n, vocabulary), in float32 or float64."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def finite_sums(losses: Tensor, first: int, source: str) -> list[float]:
    """Sum losses (windows, tokens) over each window, in float64.

    Args:
        losses: of consecutive windows.
        first: number of the first one, for messages.
        source: of the text, likewise.

    Raises:
        InputError: a sum is not finite.
    """
    sums = losses.cpu().double().sum(-1)
    if not bool(sums.isfinite().all()):
        window = first + int(sums.isfinite().logical_not().nonzero()[0])
        raise InputError(
            f"the loss of window {window} of {source!r} (counted from 0) is not finite: "
            "the model's weights or activations are broken"
        )
    found: list[float] = sums.tolist()
    return found
