"""How vLLM's linear layers load and multiply under ``--quantization halve``.

Every one of them starts with a plain weight, as without Halve; vLLM's own loaders slice and fuse what the checkpoint
has. When all is loaded a weight at 2:4 is packed, whole as fused, and the plain one let go.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod

from halve.engines.layer_product import Product, hold, multiply
from halve.engines.layer_tally import LayerTally
from halve.engines.layer_weight import LayerWeight, check_split, why_dense
from halve.engines.packed_tensor import taking
from halve.engines.sparse_cores import Gains, compressed_product
from halve.errors import InputError
from halve.maths.grid import Bits
from halve.runtime.native import sparse_linear

_READ_BY_ATTENTION = "_cpu_skip_gemm_dispatch"
"""What vLLM sets on a layer whose weight its attention reads itself."""


class HalveLinearMethod(LinearMethodBase):  # type: ignore[misc] # vLLM need not be installed
    """What a linear layer of vLLM does with its weight.

    Args:
        name: of the layer in the model.
        bits: of the integers that plain weights are rounded to; None leaves them as they are.
        tally: is told what becomes of the layer.
        gains: of sparse tensor cores, as measured for the model's layers so far.
    """

    def __init__(self, name: str, bits: Bits | None, tally: LayerTally, gains: Gains) -> None:
        super().__init__()
        self.name, self.bits, self.tally, self.gains = name, bits, tally, gains
        self.dense = UnquantizedLinearMethod()
        self.loading: LayerWeight | None = None
        tally.expect(name)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer a plain weight, as vLLM does, that packed tensors can be copied into packed.

        Raises:
            InputError: tensor parallelism would cut groups of four.
        """
        check_split(self.name, input_size, input_size_per_partition)
        extra_weight_attrs["weight_loader"] = partial(self._load, extra_weight_attrs["weight_loader"])
        sizes = input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype
        self.dense.create_weights(layer, *sizes, **extra_weight_attrs)
        self.loading = LayerWeight(cast("Tensor", layer.weight).data)
        self.d_out = sum(output_partition_sizes)

    def _load(self, loader: Callable[..., None], parameter: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.loading is None:
            raise InputError(f"{self.name} is loaded already: to change its weight, start vLLM again")
        with taking(self.loading.take):
            loader(parameter, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weight, or leave it to vLLM, and put on record which, and why.

        Raises:
            InputError: weights are too large for the scales of integers.
        """
        if self.loading is None:
            return
        plain = cast("Tensor", layer.weight)
        plain_bytes = plain.nbytes
        product, nbytes, reason = self._product(layer, self.loading)
        self.loading = None
        if product is not None:
            layer.weight = nn.Parameter(plain.data.new_empty(0), requires_grad=False)
            self.tally.pack(self.name, plain_bytes, nbytes)
        else:
            self.dense.process_weights_after_loading(layer)
            product = partial(_dense_product, self.dense, weakref.ref(layer))
            self.tally.leave(self.name, reason)
        layer.halve_number = hold(layer, product)
        if getattr(layer, _READ_BY_ATTENTION, False):
            layer.quant_method = self.dense

    def _product(self, layer: nn.Module, weight: LayerWeight) -> tuple[Product | None, int, str]:
        """Return the packed product and its bytes; or None and why the layer stays dense, its weight then complete."""
        if getattr(layer, _READ_BY_ATTENTION, False):
            weight.mix()
            return None, 0, "attention reads its weight itself"
        if weight.data.device.type != "cpu":
            weight.mix()
            reason = why_dense(weight.data) or ("on a GPU the plugin multiplies no integers" if self.bits else "")
            return (None, 0, reason) if reason else compressed_product(weight.data, self.gains)
        matrix, reason = weight.became(self.bits)
        return (None, 0, reason) if matrix is None else (partial(_packed_product, matrix), matrix.nbytes, "")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x Wᵀ + bias``, (..., d_out), for x of shape (..., d_in)."""
        return multiply(x, bias, cast("Tensor", layer.halve_number), self.d_out)


def _packed_product(matrix: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return sparse_linear(x, matrix, bias)


def _dense_product(dense: Any, layer: "weakref.ref[nn.Module]", x: Tensor, bias: Tensor | None) -> Tensor:
    return cast("Tensor", dense.apply(layer(), x, bias))
