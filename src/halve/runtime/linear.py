"""`SparseLinear`: a linear layer whose weight is packed, quantised or not, in place of ``torch.nn.Linear``.

It is a custom operator, ``halve::sparse_linear``, so that ``torch.compile`` traces through it; gradients flow to the
inputs and the bias, never to the weights, which are frozen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from halve.errors import InputError
from halve.maths.grid import Bits
from halve.maths.pattern import Pattern
from halve.model.layers import Layout, is_conv1d, layer_matrix
from halve.runtime.compressed_linear import CompressedLinear
from halve.runtime.native import AnyPacked, expand, few_rows, sparse_linear
from halve.runtime.packed_matrix import DTYPES, PackedMatrix, pack
from halve.runtime.quantised_matrix import QuantisedMatrix, quantise
from halve.torch_internals import has_tangent, is_recorded

Parts = tuple[Tensor, Tensor, Tensor | None, int, str, int, int]
"""What operators take of a packed matrix: mask, values, None, d_in, pattern, 0 and the number of its dtype in `DTYPES`;
of a quantised one places, codes, scales, d_in, pattern, bits and that number."""


def _parts(packed: AnyPacked) -> Parts:
    held = DTYPES.index(packed.dtype)
    if isinstance(packed, QuantisedMatrix):
        return packed.places, packed.codes, packed.scales, packed.d_in, packed.pattern, packed.bits, held
    return packed.mask, packed.values, None, packed.d_in, packed.pattern, 0, held


def _matrix(
    mask: Tensor, values: Tensor, scales: Tensor | None, d_in: int, pattern: str, bits: int, held: int
) -> AnyPacked:
    """Return the packed matrix of its parts."""
    if scales is None:
        return PackedMatrix(mask, values, (len(mask), d_in), pattern)
    return QuantisedMatrix(mask, values, scales, (len(mask), d_in), cast("Bits", bits), DTYPES[held])


@torch.library.custom_op("halve::sparse_linear", mutates_args=(), device_types="cpu")
def _operator(
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    values: Tensor,
    scales: Tensor | None,
    d_in: int,
    pattern: str,
    bits: int,
    held: int,
) -> Tensor:
    with torch.no_grad():
        return sparse_linear(x, _matrix(mask, values, scales, d_in, pattern, bits, held), bias)


@_operator.register_fake
def _fake(x: Tensor, bias: Tensor | None, mask: Tensor, *rest: Any) -> Tensor:
    del bias, rest
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, _, mask, values, scales, *ctx.rest = inputs
    ctx.save_for_backward(mask, values, scales)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = gradient @ torch.ops.halve.unpack(*ctx.saved_tensors, *ctx.rest)
    if ctx.needs_input_grad[1]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return to_x, to_bias, *[None] * 7


_operator.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("halve::unpack", mutates_args=(), device_types="cpu")
def _unpack_operator(
    mask: Tensor, values: Tensor, scales: Tensor | None, d_in: int, pattern: str, bits: int, held: int
) -> Tensor:
    return expand(_matrix(mask, values, scales, d_in, pattern, bits, held), 0, len(mask))


@_unpack_operator.register_fake
def _fake_unpack(
    mask: Tensor, values: Tensor, scales: Tensor | None, d_in: int, pattern: str, bits: int, held: int
) -> Tensor:
    del scales, pattern, bits
    return values.new_empty(mask.shape[0], d_in, dtype=DTYPES[held])


def is_watched(x: Tensor) -> bool:
    """Return whether something records or transforms what is computed, and so has to see operators."""
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
    scales: Tensor | None
    """The bits of the scales, int16: to what converts a module to another dtype they are no numbers."""
    empty: Tensor
    """Nothing, in the dtype of the products: converted when the module is."""
    as_decoded = False
    """Whether any number of rows is multiplied a few at a time, see `multiplied_as_decoded`."""

    def __init__(self, packed: AnyPacked, bias: Tensor | None = None, layout: Layout = "out_in") -> None:
        super().__init__(packed.shape, bias, layout)
        if bias is not None and (bias.shape != (packed.d_out,) or bias.dtype != packed.dtype):
            raise InputError(
                f"a bias of {bias.dtype} and shape {tuple(bias.shape)} does not go with a packed matrix of shape "
                f"{packed.shape} in {packed.dtype}"
            )
        for name in ("mask", "values", "scales", "empty"):
            self.register_buffer(name, None, persistent=False)
        self._hold(packed)

    @classmethod
    def of(cls, layer: nn.Module, pattern: str | Pattern, bits: Bits | None = None) -> "SparseLinear":
        """Pack a ``Linear`` or ``Conv1D``, and quantise it to so many bits; the bias is shared, not copied.

        Raises:
            InputError: as `halve.runtime.packed_matrix.pack` and `halve.runtime.quantised_matrix.quantise`.
        """
        packed = pack(layer_matrix(layer), pattern)
        layout: Layout = "in_out" if is_conv1d(layer) else "out_in"
        return cls(packed if bits is None else quantise(packed, bits), cast("Tensor | None", layer.bias), layout)

    def _hold(self, packed: AnyPacked) -> None:
        self.mask, self.values, scales, _, self.pattern, self.bits, _ = _parts(packed)
        self.scales = None if scales is None else scales.view(torch.int16)
        self.empty = torch.empty(0, dtype=packed.dtype)
        self._packed, self._made_of = packed, self._held()

    def _held(self) -> tuple[Tensor | None, ...]:
        return self.mask, self.values, self.scales, self.empty

    def _operand(self) -> Parts:
        """Return what the operators take, made of nothing but buffers, as whatever records a module wants it."""
        if self.empty.dtype not in DTYPES:
            raise InputError(f"packed matrices multiply bfloat16, float16 or float32, not {self.empty.dtype}")
        scales = None if self.scales is None else self.scales.view(torch.float16)
        held = DTYPES.index(self.empty.dtype)
        return self.mask, self.values, scales, self.in_features, self.pattern, self.bits, held

    @property
    def packed(self) -> AnyPacked:
        """The packed weight.

        Raises:
            InputError: the layer has been moved or converted to where there are no packed matrices.
        """
        held = self._held()
        if any(one is not other for one, other in zip(held, self._made_of, strict=True)):
            self._packed, self._made_of = _matrix(*self._operand()), held
        return self._packed

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
            return self._multiply(x.to(self.empty.dtype)).to(torch.get_autocast_dtype("cpu"))
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        if has_tangent(x):
            raise InputError("a SparseLinear has no forward-mode derivative: restore the plain layer for that")
        bias = self.bias
        wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if wanted or is_watched(x):
            return cast("Tensor", _operator(x, bias, *self._operand()))
        if self.as_decoded:
            rows = torch.split(x.reshape(-1, self.in_features), few_rows(self.empty.dtype))
            return torch.cat([sparse_linear(few, self.packed, bias) for few in rows]).view(*x.shape[:-1], -1)
        return sparse_linear(x, self.packed, bias)  # beside a small product, the operator would cost as much again

    def extra_repr(self) -> str:
        """Return what is printed between the brackets."""
        values = f", values=int{self.bits}" if self.bits else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, dtype={self.empty.dtype}{values}"
        )

    def _dense(self) -> Tensor:
        return expand(self.packed, 0, self.out_features)

    def _take(self, matrix: Tensor) -> None:
        if self.bits and torch.equal(matrix, self._dense()):  # its own: rounding it again might change it
            return
        packed = pack(matrix.to("cpu", self.empty.dtype), self.pattern)
        self._hold(quantise(packed, cast("Bits", self.bits)) if self.bits else packed)


@contextmanager
def multiplied_as_decoded(model: nn.Module) -> Iterator[int]:
    """Let packed layers multiply all rows as they do the few of a decoding step, which is slower; yield how many do.

    Where weights are integers those kernels round the inputs to 8 bits too, as a product of many rows does not: what is
    measured of a model meanwhile is of the products that it decodes by.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    try:
        for layer in layers:
            layer.as_decoded = True
        yield len(layers)
    finally:
        for layer in layers:
            layer.as_decoded = False
