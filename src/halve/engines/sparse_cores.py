"""Layers of an engine on a GPU: 2:4 on sparse tensor cores where that is measured to be faster than dense.

Written for vLLM on CUDA, and held to the dense product in tests; how much it gains there is not measured yet.
"""

from collections.abc import MutableMapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from halve.engines.layer_product import Product
from halve.memory import free_memory
from halve.runtime import semi_structured
from halve.runtime.semi_structured import SemiStructuredLinear
from halve.runtime.timing import take_turns

ROWS = 16
"""Rows of x at which both are measured: requests that are decoded together."""
_MARGIN = 1.05
"""How much faster it has to be: what measuring may miss."""
Gains = MutableMapping[tuple[torch.Size, torch.dtype], float]
"""How many times as fast the sparse product is as the dense one, by the weight's shape and dtype, on one device."""


def compressed_product(weight: Tensor, gains: Gains) -> tuple[Product | None, int, str]:
    """Return the product with a 2:4 weight on sparse tensor cores and its bytes, or None and why it stays dense.

    Args:
        weight: (d_out, d_in), at 2:4, on a CUDA device.
        gains: what has been measured there before; what is measured now is added.
    """
    dtype = weight.dtype
    reason = semi_structured.unusable(weight.device) or semi_structured.unfit(weight.shape[0], weight.shape[1], dtype)
    if not reason and dtype not in semi_structured.DTYPES:
        reason = f"sparse tensor cores do not multiply {str(dtype).removeprefix('torch.')}"
    if reason:
        return None, 0, reason
    key = weight.shape, dtype
    if gains.get(key, _MARGIN) < _MARGIN:
        return None, 0, _too_slow(gains[key])
    if _working_bytes(weight) > free_memory(weight.device):
        return None, 0, "there is no room to compress it"
    layer = SemiStructuredLinear(weight, None, ROWS)
    product = partial(_product, layer)
    if key not in gains:
        gains[key] = _gain(product, weight)
    return (None, 0, _too_slow(gains[key])) if gains[key] < _MARGIN else (product, layer.nbytes, "")


def _working_bytes(weight: Tensor) -> int:
    """Return about what compressing takes: the compressed weight, and to check it that unpacked, by an identity."""
    return 3 * weight.nbytes + weight.shape[1] ** 2 * weight.itemsize


def _too_slow(gain: float) -> str:
    return f"sparse tensor cores are {gain:.2f} times as fast as a dense product"


def _gain(product: Product, weight: Tensor) -> float:
    """Measure how many times as fast the sparse product is as the dense one."""
    x = torch.zeros(ROWS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    contenders = {"sparse": [lambda: product(x, None)], "dense": [lambda: linear(x, weight)]}
    turns = take_turns(contenders, device=weight.device, seconds=0.05)
    return turns["dense"].seconds / turns["sparse"].seconds


def _product(layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = layer(x)
    return y if bias is None else y + bias
