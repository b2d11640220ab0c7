"""What a model says, and how far what it says is from what it said."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from halve.device import model_device, own_settings, weight_dtype
from halve.errors import InputError, UnsupportedModelError
from halve.maths.linalg import is_finite
from halve.model.blocks import Batch
from halve.model.calls import to_device

_AT_ONCE = 1 << 24
"""Most entries of log-probabilities that are compared at a time."""
_NO_LABEL = -100
"""What stands for padding among labels, as in PyTorch's losses."""
_FED = ("decoder_input_ids", "labels")


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return a model's logits, (…, classes), without gradients.

    Raises:
        UnsupportedModelError: it has none.
    """
    ready = to_device(dict(batch), model_device(model), weight_dtype(model))
    with torch.no_grad(), own_settings(model):
        output = model(**ready)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise UnsupportedModelError(
            f"keep_dense goes by how pruning changes a model's logits, and {type(model).__name__} gives none: name "
            "what is to stay dense with skip"
        )
    return logits


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logarithms of a model's probabilities at the positions that count, (positions, classes) float32.

    Args:
        model: with logits.
        batch: padded positions of its ``attention_mask``, or where it feeds a decoder ``decoder_attention_mask``, do
            not count, nor without one do those whose label is -100; of images there is one position each.

    Raises:
        UnsupportedModelError: as `logits_of`.
        InputError: the logits are not finite.
    """
    logits = logits_of(model, batch)
    if not is_finite(logits):
        raise InputError(
            f"{type(model).__name__} gives NaN or infinity on the calibration data, so no damage can be measured: "
            "check its weights, or leave keep_dense out"
        )
    mask = batch.get("decoder_attention_mask" if any(name in batch for name in _FED) else "attention_mask")
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.to(logits.device, torch.bool)]
    elif (labels := batch.get("labels")) is not None and labels.shape == logits.shape[:-1]:
        logits = logits[labels.to(logits.device) != _NO_LABEL]
    return F.log_softmax(logits.reshape(-1, logits.shape[-1]).float(), dim=-1)


def divergence(before: Tensor, after: Tensor) -> float:
    """Return the sum over positions of ``KL(before ‖ after)``, in nats.

    Args:
        before: (positions, classes) log-probabilities.
        after: likewise.
    """
    rows = max(1, _AT_ONCE // before.shape[-1])
    total = 0.0
    for was, now in zip(torch.split(before, rows), torch.split(after, rows), strict=True):
        total += float(F.kl_div(now, was, reduction="none", log_target=True).sum(-1).double().sum())
    return total
