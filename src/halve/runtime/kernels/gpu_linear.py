"""`GpuLinear`: a linear layer whose weight is packed, quantised or not, on a GPU, in place of ``torch.nn.Linear``."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from halve.errors import InputError
from halve.maths.grid import Bits
from halve.model.layers import Layout, is_conv1d, layer_matrix
from halve.runtime.compressed_linear import CompressedLinear
from halve.runtime.kernels import DTYPES
from halve.runtime.kernels.gpu_matrix import GpuMatrix, sparse_linear, unpacked
from halve.runtime.native import AnyPacked
from halve.runtime.packed_matrix import pack, unpack
from halve.runtime.quantised_matrix import PATTERN, QuantisedMatrix, quantise


@torch.library.custom_op("halve::gpu_linear", mutates_args=())
def _operator(
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    values: Tensor,
    scales: Tensor | None,
    d_in: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    parts = (mask, values) if scales is None else (mask, values, scales)
    return sparse_linear(x, GpuMatrix(parts, (len(mask), d_in), cast("Bits | None", bits or None), dtype), bias)


@_operator.register_fake
def _fake(x: Tensor, bias: Tensor | None, mask: Tensor, *rest: Any) -> Tensor:
    del bias, rest
    return x.new_empty(*x.shape[:-1], mask.shape[0])


class GpuLinear(CompressedLinear):
    """``y = x Wᵀ + b`` with a packed 2:4 W on a GPU, without gradients.

    It can be moved and converted like any layer; where there are no such products they are refused, not slow.

    Args:
        matrix: W, (d_out, d_in).
        bias: (d_out,), of the matrix's dtype.
        layout: of the weight in the plain layer.
    """

    mask: Tensor
    values: Tensor
    scales: Tensor | None
    """The bits of the scales, int16: to what converts a module to another dtype they are no numbers."""
    empty: Tensor
    """Nothing, in the dtype of the products: converted when the module is."""

    def __init__(self, matrix: GpuMatrix, bias: Tensor | None = None, layout: Layout = "out_in") -> None:
        super().__init__(matrix.shape, bias, layout)
        for name in ("mask", "values", "scales", "empty"):
            self.register_buffer(name, None, persistent=False)
        self._hold(matrix)

    @classmethod
    def of(cls, layer: nn.Module, bits: Bits | None = None) -> "GpuLinear":
        """Pack a ``Linear`` or ``Conv1D`` where it is, and quantise it to so many bits; the bias is shared, not copied.

        Raises:
            InputError: as `halve.runtime.packed_matrix.pack` and `halve.runtime.quantised_matrix.quantise`.
        """
        layout: Layout = "in_out" if is_conv1d(layer) else "out_in"
        return cls(_pack(layer_matrix(layer), bits), cast("Tensor | None", layer.bias), layout)

    def _hold(self, matrix: GpuMatrix) -> None:
        self.mask, self.values, *scales = matrix.parts
        self.scales = scales[0].view(torch.int16) if scales else None
        self.empty = torch.empty(0, dtype=matrix.dtype, device=matrix.device)
        self.bits = matrix.bits

    @property
    def matrix(self) -> GpuMatrix:
        """The packed weight, where the layer is."""
        scales = () if self.scales is None else (self.scales.view(torch.float16),)
        shape = self.out_features, self.in_features
        return GpuMatrix((self.mask, self.values, *scales), shape, self.bits, self.empty.dtype)

    @property
    def packed(self) -> AnyPacked:
        """The packed weight on the CPU."""
        return self.matrix.packed()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(part.nbytes for part in (self.mask, self.values, self.scales) if part is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x of shape (..., in_features), of the weight's dtype unless under autocast.

        Raises:
            InputError: as `halve.runtime.kernels.gpu_matrix.sparse_linear`; a gradient is asked for.
        """
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                product = self.forward(x.to(self.empty.dtype))
            return product.to(torch.get_autocast_dtype(x.device.type))
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError("packed products on a GPU have no gradient: restore the plain layer for that")
        bias = None if self.bias is None else self.bias.detach()
        if torch.compiler.is_compiling():
            scales = None if self.scales is None else self.scales.view(torch.float16)
            parts = self.mask, self.values, scales
            return cast("Tensor", _operator(x, bias, *parts, self.in_features, self.bits or 0, self.empty.dtype))
        return sparse_linear(x, self.matrix, bias)

    def extra_repr(self) -> str:
        """Return what is printed between the brackets."""
        values = f", values=int{self.bits}" if self.bits else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.empty.dtype}{values}"
        )

    def _dense(self) -> Tensor:
        matrix = self.matrix
        if matrix.device.type == "cuda" and matrix.dtype in DTYPES:
            return unpacked(matrix)
        packed = matrix.packed()
        return unpack(packed.dequantised() if isinstance(packed, QuantisedMatrix) else packed).to(matrix.device)

    def _take(self, matrix: Tensor) -> None:
        matrix = matrix.to(self.mask.device)
        if self.bits and torch.equal(matrix, self._dense()):  # its own: rounding it again might change it
            return
        self._hold(_pack(matrix.to(self.empty.dtype), self.bits))


def _pack(matrix: Tensor, bits: Bits | None) -> GpuMatrix:
    """Pack a matrix, and quantise it to so many bits, and put it where it was: the work is done on the CPU."""
    packed = pack(matrix.cpu(), PATTERN)
    return GpuMatrix.of(packed if bits is None else quantise(packed, bits), matrix.device)
