"""How many positions of a picture every layer of a model sees: a pass on the meta device, which computes nothing."""

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halve.images.processor import input_name
from halve.model.layers import is_convolution, is_linear


def layer_positions(model: nn.Module, height: int, width: int) -> dict[str, float]:
    """Return how many positions of a picture each linear layer and convolution multiplies, by the layer's name.

    Args:
        model: that takes pictures; it is left as it is.
        height: of the picture as the model gets it, in pixels.
        width: likewise.

    Returns:
        dict[str, float]: of layers that ran; empty for a model that does not run without weights.
    """
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): _on_meta(tensor) for tensor in tensors}
    found: dict[str, float] = {}

    def look(name: str, layer: nn.Module, _args: Any, output: Tensor) -> None:
        channels = layer.out_channels if is_convolution(layer) else output.shape[-1]
        found[name] = found.get(name, 0.0) + output.numel() / channels

    with ExitStack() as stack:
        try:
            outline = copy.deepcopy(model, memo).eval()
            for name, layer in outline.named_modules():
                if is_linear(layer) or is_convolution(layer):
                    stack.callback(layer.register_forward_hook(partial(look, name)).remove)
            channels = getattr(getattr(model, "config", None), "num_channels", 3)
            with torch.no_grad(), torch.device("meta"):
                outline(**{input_name(model): torch.empty(1, channels, height, width, dtype=_dtype(model))})
        except Exception:  # noqa: BLE001 - a model may raise anything; then it is foreseen by its first hidden state
            return {}
    return found


def _on_meta(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _dtype(model: nn.Module) -> torch.dtype:
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
