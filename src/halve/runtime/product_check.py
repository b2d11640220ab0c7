"""Whether a sparse layer multiplies as the dense one does whose place it takes, element by element."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from halve.errors import HalveError
from halve.model.layers import layer_matrix
from halve.runtime.kernels import LANE_ROWS
from halve.runtime.kernels.gpu_linear import GpuLinear
from halve.runtime.linear import SparseLinear
from halve.runtime.native import multiplies_integers, quantised_input
from halve.runtime.packed_matrix import unpack
from halve.runtime.quantised_matrix import QuantisedMatrix

_PRODUCT = {torch.float32: 2.0**-14, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Error that rounding explains: this share of an element, and a 16th of it of the magnitudes that were summed up."""


def check_product(
    name: str, layer: nn.Module, sparse: nn.Module, expected_of: Callable[[Tensor], Tensor], rows: int
) -> None:
    """Hold every element of a sparse product of random inputs to the dense layer's.

    Args:
        name: of the layer.
        layer: the plain one.
        sparse: the one that takes its place.
        expected_of: what `reference_of` returns for them.
        rows: of the inputs.

    Raises:
        HalveError: one is off by more than rounding explains.
    """
    matrix, bias = layer_matrix(layer), cast("Tensor | None", layer.bias)
    x = torch.randn(rows, matrix.shape[1], generator=torch.Generator().manual_seed(rows)).to(matrix)
    share = _PRODUCT[matrix.dtype]
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        expected, got = expected_of(x), sparse(x).float()
        magnitude = linear(x.abs(), matrix.abs(), None if bias is None else bias.abs()).float()
    wrong = ~((got - expected).abs() <= share * expected.abs() + share / 16 * magnitude)
    if bool(wrong.any()):
        raise HalveError(
            f"the sparse product of {name} with {rows} rows is wrong in {int(wrong.sum())} of {wrong.numel()} elements"
        )


def reference_of(layer: nn.Module, sparse: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what gives the product that a sparse layer should give, float32.

    Of a quantised layer that is the product of a dense one with the rounded weights and, where there are few rows, with
    inputs rounded likewise on the CPU; on a GPU they are not.

    Args:
        layer: the plain one.
        sparse: the one that takes its place.
    """
    packed = sparse.packed if isinstance(sparse, SparseLinear | GpuLinear) else None
    if not isinstance(packed, QuantisedMatrix):
        return lambda x: cast("Tensor", layer(x)).float()
    place = layer_matrix(layer).device
    exact = unpack(replace(packed, dtype=torch.float32).dequantised()).to(place)
    stored = exact.to(packed.dtype).float()  # what many rows are multiplied with
    own = cast("Tensor | None", sparse.bias)
    bias = None if own is None else own.float()

    def expected(x: Tensor) -> Tensor:
        if isinstance(sparse, GpuLinear):
            return linear(x.float(), exact if len(x) <= LANE_ROWS else stored, bias)
        if multiplies_integers(len(x), packed):
            return linear(quantised_input(x), exact, bias)
        return linear(x.float(), stored, bias)

    return expected
