"""`SparseLinear`: a linear layer whose weight is packed, in place of ``torch.nn.Linear``.

It is a custom operator, ``halve::sparse_linear``, so that ``torch.compile`` traces through it; gradients flow to the
inputs and the bias, never to the weights, which are frozen.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.model.layers import Layout, is_conv1d, layer_matrix
from halve.runtime.compressed_linear import CompressedLinear
from halve.runtime.native import expand, sparse_linear
from halve.runtime.packed_matrix import PackedMatrix, pack
from halve.torch_internals import has_tangent, is_recorded


@torch.library.custom_op("halve::sparse_linear", mutates_args=(), device_types="cpu")
def _operator(x: Tensor, mask: Tensor, values: Tensor, bias: Tensor | None, d_in: int, pattern: str) -> Tensor:
    with torch.no_grad():
        return sparse_linear(x, PackedMatrix(mask, values, (len(mask), d_in), pattern), bias)


@_operator.register_fake
def _fake(x: Tensor, mask: Tensor, values: Tensor, bias: Tensor | None, d_in: int, pattern: str) -> Tensor:
    del values, bias, d_in, pattern
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, mask, values, _, ctx.d_in, ctx.pattern = inputs
    ctx.save_for_backward(mask, values)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
    mask, values = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = gradient @ torch.ops.halve.unpack(mask, values, ctx.d_in, ctx.pattern)
    if ctx.needs_input_grad[3]:
        to_bias = gradient.reshape(-1, len(mask)).sum(0)
    return to_x, None, None, to_bias, None, None


_operator.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("halve::unpack", mutates_args=(), device_types="cpu")
def _unpack_operator(mask: Tensor, values: Tensor, d_in: int, pattern: str) -> Tensor:
    return expand(PackedMatrix(mask, values, (len(mask), d_in), pattern), 0, len(mask))


@_unpack_operator.register_fake
def _fake_unpack(mask: Tensor, values: Tensor, d_in: int, pattern: str) -> Tensor:
    del pattern
    return values.new_empty(mask.shape[0], d_in)


def _watched(x: Tensor) -> bool:
    """Whether something records or transforms what is computed, and so has to see the operator."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or is_recorded()


class SparseLinear(CompressedLinear):
    """``y = x Wᵀ + b`` with a packed W on the CPU.

    Args:
        packed: W, (d_out, d_in).
        bias: (d_out,), of the matrix's dtype.
        layout: of the weight in the plain layer.

    Raises:
        InputError: the bias does not go with the matrix.
    """

    mask: Tensor
    values: Tensor

    def __init__(self, packed: PackedMatrix, bias: Tensor | None = None, layout: Layout = "out_in") -> None:
        super().__init__(packed.shape, bias, layout)
        if bias is not None and (bias.shape != (packed.d_out,) or bias.dtype != packed.dtype):
            raise InputError(
                f"a bias of {bias.dtype} and shape {tuple(bias.shape)} does not go with a packed matrix of shape "
                f"{packed.shape} in {packed.dtype}"
            )
        self.pattern = packed.pattern
        self.register_buffer("mask", packed.mask, persistent=False)
        self.register_buffer("values", packed.values, persistent=False)
        self._packed = packed

    @classmethod
    def of(cls, layer: nn.Module, pattern: str | Pattern) -> "SparseLinear":
        """Pack a ``Linear`` or ``Conv1D``; the bias is shared, not copied.

        Raises:
            InputError: as `halve.runtime.packed_matrix.pack`.
        """
        packed = pack(layer_matrix(layer), pattern)
        return cls(packed, cast("Tensor | None", layer.bias), "in_out" if is_conv1d(layer) else "out_in")

    @property
    def packed(self) -> PackedMatrix:
        """The packed weight.

        Raises:
            InputError: the layer has been moved or converted to where there are no packed matrices.
        """
        known, mask, values = self._packed, self.mask, self.values
        if known.mask is not mask or known.values is not values:
            known = self._packed = PackedMatrix(mask, values, (self.out_features, self.in_features), self.pattern)
        return known

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.packed.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x of shape (..., in_features), of the weight's dtype unless under autocast.

        Raises:
            InputError: as `halve.runtime.native.sparse_linear`.
        """
        if torch.is_autocast_enabled("cpu"):
            return self._multiply(x.to(self.values.dtype)).to(torch.get_autocast_dtype("cpu"))
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        if has_tangent(x):
            raise InputError("a SparseLinear has no forward-mode derivative: restore the plain layer for that")
        bias = self.bias
        wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if wanted or _watched(x):
            return cast("Tensor", _operator(x, self.mask, self.values, bias, self.in_features, self.pattern))
        return sparse_linear(x, self.packed, bias)  # beside a small product, the operator would cost as much again

    def extra_repr(self) -> str:
        """Return what is printed between the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, dtype={self.values.dtype}"
        )

    def _dense(self) -> Tensor:
        return expand(self.packed, 0, self.out_features)

    def _take(self, matrix: Tensor) -> None:
        packed = pack(matrix.to("cpu", self.values.dtype), self.pattern)
        self.mask, self.values = packed.mask, packed.values
