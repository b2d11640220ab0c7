"""How much faster a sparse product is than a dense one, on this machine, measured: for the planner and `accelerate`."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from halve.device import on_device
from halve.errors import InputError
from halve.maths.grid import Bits
from halve.maths.pattern import Pattern
from halve.memory import check_memory
from halve.runtime import kernels, native, packed_matrix, quantised_matrix, semi_structured
from halve.runtime.kernels.gpu_matrix import GpuMatrix
from halve.runtime.kernels.gpu_matrix import sparse_linear as gpu_linear
from halve.runtime.timing import copies_beyond_cache, take_turns

_SLAB = 64
"""Rows of random weights that a matrix repeats: what is multiplied does not change the time."""
_GPU_WORK = 20
"""Bytes a weight that compressing for sparse tensor cores takes at its peak, in half precision."""

Product = Literal["packed", "tensor cores"]
"""How a sparse product is computed: from a packed matrix, as on the CPU always, or by a GPU's sparse tensor cores."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times of one product, x Wᵀ for x (batch, d_in) and W (d_out, d_in), dense and with W in a pattern.

    Attributes:
        d_out: rows of W.
        d_in: columns of W.
        batch: rows of x.
        dense_seconds: median; on a GPU the device's own time, without what launches cost.
        sparse_seconds: likewise.
        dense_call_seconds: from the call to its end, the same on the CPU.
        sparse_call_seconds: likewise.
        product: which sparse product was timed, on a GPU the one of the greater `lesser_ratio`.
    """

    d_out: int
    d_in: int
    batch: int
    dense_seconds: float
    sparse_seconds: float
    dense_call_seconds: float
    sparse_call_seconds: float
    product: Product = "packed"

    @property
    def ratio(self) -> float:
        """How many times as fast the sparse product is; below 1 it is slower."""
        return self.dense_seconds / self.sparse_seconds

    @property
    def call_ratio(self) -> float:
        """The same with what launches cost, as a program has it that waits for each product or gives the GPU little."""
        return self.dense_call_seconds / self.sparse_call_seconds

    @property
    def lesser_ratio(self) -> float:
        """The lesser of the two: how many times as fast it is at least, whatever launches cost."""
        return min(self.ratio, self.call_ratio)


def check_measurable(
    pattern: str | Pattern, dtype: torch.dtype, device: torch.device, bits: Bits | None = None
) -> None:
    """Check that there are sparse products of this kind on this machine.

    Args:
        pattern: of the weights.
        dtype: of what is multiplied, and of the weights unless they are quantised.
        device: where.
        bits: of the integers that the weights are quantised to; None where they are not.

    Raises:
        InputError: there are none.
    """
    pattern = Pattern.parse(pattern)
    if bits is not None and (reason := quantised_matrix.why_not(pattern)):
        raise InputError(reason)
    if device.type == "cpu":
        if dtype not in packed_matrix.DTYPES:
            raise InputError(f"packed products are bfloat16, float16 or float32, not {dtype}")
        return
    reasons = dict.fromkeys([kernels.unusable(device)] if bits is not None else _nothing_usable(device))
    if all(reasons):
        kind = "sparse" if bits is None else "quantised"
        raise InputError(f"no {kind} products on {device}: {', and '.join(reasons)}; use --device cpu")
    if pattern.text != "2:4" or dtype not in semi_structured.DTYPES:
        multiplied = "sparse tensor cores multiply" if bits is None else "quantised products on a GPU are of"
        raise InputError(f"{multiplied} 2:4 in bfloat16 or float16, not {pattern} in {dtype}")


def _nothing_usable(device: torch.device) -> tuple[str, str]:
    """Return why there are no sparse tensor cores on a GPU, and why no packed products; empty where there are."""
    return semi_structured.unusable(device), kernels.unusable(device)


def unfit(d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return why there is no sparse product with matrices of one shape, as half a sentence; empty if there is."""
    if device.type == "cpu" or _multiplied_packed(d_in, device):
        return ""
    return semi_structured.unfit(d_out, d_in, dtype)


def products(
    d_out: int, d_in: int, batch: int, dtype: torch.dtype, device: torch.device, bits: Bits | None = None
) -> tuple[Product, ...]:
    """Return the sparse products that a matrix can have at a batch; the first is taken where nothing is measured.

    On a GPU packed ones are for as many rows as decoding has, unless there are no others.
    """
    if device.type == "cpu":
        return ("packed",)
    packed = _multiplied_packed(d_in, device)
    cores = bits is None and not semi_structured.unusable(device) and not semi_structured.unfit(d_out, d_in, dtype)
    found: list[Product] = ["tensor cores"] if cores else []
    return (*found, "packed") if packed and (batch <= kernels.ROWS or not cores) else tuple(found)


def _multiplied_packed(d_in: int, device: torch.device) -> bool:
    return d_in % 4 == 0 and not kernels.unusable(device)


def sparse_bytes(
    d_out: int, d_in: int, pattern: Pattern, dtype: torch.dtype, device: torch.device, bits: Bits | None = None
) -> int:
    """Return the bytes of a matrix as it is multiplied sparse there."""
    if bits is not None:
        return quantised_matrix.quantised_bytes(d_out, d_in, bits)
    if device.type == "cuda" and not semi_structured.unfit(d_out, d_in, dtype):
        return semi_structured.compressed_bytes(d_out, d_in, dtype)  # packed it would be a few bytes more
    return packed_matrix.packed_bytes(d_out, d_in, pattern, dtype)


def describe(device: torch.device, bits: Bits | None = None, used: Collection[Product] | None = None) -> str:
    """Return what multiplies sparse matrices there, and on a GPU what cannot and why.

    Args:
        device: where.
        bits: of the integers that weights are quantised to; None where they are not.
        used: which products are computed; None where that is not decided yet.
    """
    if device.type == "cpu":
        return native.describe(bits)
    found = []
    why_not_packed = kernels.unusable(device)
    if not why_not_packed and (used is None or "packed" in used):
        found.append(kernels.describe(bits))
    if bits is None and not semi_structured.unusable(device) and (used is None or "tensor cores" in used):
        found.append("cuSPARSELt, algorithm searched" if torch.backends.cusparselt.is_available() else "CUTLASS")
    missing = f"; no packed products: {why_not_packed}" if why_not_packed else ""
    return f"{' and '.join(found)}, on {torch.cuda.get_device_name(device)}{missing}"


def needed_bytes(
    d_out: int,
    d_in: int,
    batch: int,
    *,
    pattern: str | Pattern,
    dtype: torch.dtype,
    device: torch.device,
    bits: Bits | None = None,
) -> int:
    """Return the memory that `measure` takes for one shape and batch, in bytes, on the device."""
    weight, rows = d_out * d_in * dtype.itemsize, batch * (d_in + 2 * d_out) * dtype.itemsize
    if device.type == "cuda":
        packed = sparse_bytes(d_out, d_in, Pattern.parse(pattern), dtype, device, bits)
        return rows + 2 * weight + packed + (0 if bits else _GPU_WORK * d_out * d_in)
    both = (weight, sparse_bytes(d_out, d_in, Pattern.parse(pattern), dtype, device, bits))
    copies = sum(copies_beyond_cache(size) * size for size in both)
    wide = 4 * batch * (d_in + d_out)  # where 16 bits are multiplied in 32
    return rows + wide + weight + copies  # and what they are copies of


def check_room(
    d_out: int,
    d_in: int,
    batch: int,
    *,
    pattern: str | Pattern,
    dtype: torch.dtype,
    device: torch.device,
    bits: Bits | None = None,
    remedy: str,
) -> None:
    """Check that `measure` has the memory for one shape and batch.

    Raises:
        InputError: it has not; the message ends with the remedy.
    """
    needed = needed_bytes(d_out, d_in, batch, pattern=pattern, dtype=dtype, device=device, bits=bits)
    check_memory(f"the matrices of {d_out} x {d_in} to measure at batch {batch}", needed, remedy, device)


def measure(
    d_out: int,
    d_in: int,
    batches: Sequence[int],
    *,
    pattern: str | Pattern = "2:4",
    dtype: torch.dtype,
    device: torch.device,
    bits: Bits | None = None,
    seconds: float = 0.5,
) -> list[Speed]:
    """Time products of one shape, dense by ``torch.nn.functional.linear`` and sparse, in turns, on random values.

    On the CPU on as many threads as torch uses, with weights read from memory; on a GPU with its cache flushed.

    Args:
        d_out: rows of the weight.
        d_in: its columns.
        batches: rows of the inputs, each at least 1.
        pattern: on a GPU only 2:4.
        dtype: of weights and inputs.
        device: where.
        bits: of the integers that the sparse weights are quantised to; None where they are not.
        seconds: for one batch, at least 5 turns whatever they take.

    Returns:
        list[Speed]: one a batch.

    Raises:
        InputError: as `check_measurable`, or the pattern does not fit ``d_in``.
    """
    check_measurable(pattern, dtype, device, bits)
    slab = random_slab(d_out, d_in, pattern, dtype)
    weight = slab.repeat(-(-d_out // len(slab)), 1)[:d_out].to(device)
    multiply = (_on_gpu if device.type == "cuda" else _on_cpu)(weight, slab, str(pattern), bits)
    found = []
    with torch.inference_mode(), on_device(device):
        for batch in batches:
            x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(batch)).to(device, dtype)
            turns = take_turns(multiply(x), device=device, seconds=seconds)
            dense = turns.pop("dense")
            rows = [
                Speed(
                    d_out=d_out,
                    d_in=d_in,
                    batch=batch,
                    dense_seconds=dense.seconds,
                    sparse_seconds=sparse.seconds,
                    dense_call_seconds=dense.call_seconds,
                    sparse_call_seconds=sparse.call_seconds,
                    product=cast("Product", product),
                )
                for product, sparse in turns.items()
            ]
            found.append(max(rows, key=lambda row: (row.lesser_ratio, row.ratio)))
    return found


_Contenders = dict[str, list[Callable[[], Tensor]]]
"""The dense product, and others by the name of their `Product`."""


def random_slab(d_out: int, d_in: int, pattern: str | Pattern, dtype: torch.dtype) -> Tensor:
    """Return (rows, d_in) random weights in the pattern, for no more rows than a matrix is built of."""
    random = torch.randn(min(d_out, _SLAB), d_in, generator=torch.Generator().manual_seed(0))
    return Pattern.parse(pattern).project(random).to(dtype)


def repeated(one: native.AnyPacked, d_out: int) -> native.AnyPacked:
    """Return a packed matrix of ``d_out`` rows that repeats the rows of another."""
    times, shape = -(-d_out // one.d_out), (d_out, one.d_in)

    def rows(part: Tensor) -> Tensor:
        return part.repeat(times, 1)[:d_out]

    def padded(part: Tensor, in_row: int) -> Tensor:
        rest = part.new_zeros(packed_matrix.OVERREAD)
        return torch.cat((part[: one.d_out * in_row].repeat(times)[: d_out * in_row], rest))

    if isinstance(one, packed_matrix.PackedMatrix):
        return replace(one, mask=rows(one.mask), values=padded(one.values, one.kept), shape=shape)
    scales = padded(one.scales, 2 * one.strips)
    return replace(one, places=rows(one.places), codes=rows(one.codes), scales=scales, shape=shape)


def _packed(slab: Tensor, d_out: int, pattern: str, bits: Bits | None) -> native.AnyPacked:
    """Return a matrix of ``d_out`` rows that repeats the slab, packed, and quantised to so many bits."""
    one = packed_matrix.pack(slab, pattern)
    return repeated(one if bits is None else quantised_matrix.quantise(one, bits), d_out)


def _on_cpu(weight: Tensor, slab: Tensor, pattern: str, bits: Bits | None) -> Callable[[Tensor], _Contenders]:
    first = _packed(slab, len(weight), pattern, bits)
    dense = [weight.clone() for _ in range(copies_beyond_cache(weight.nbytes))]
    sparse = [first] + [_copy(first) for _ in range(copies_beyond_cache(first.nbytes) - 1)]

    def contenders(x: Tensor) -> _Contenders:
        return {
            "dense": [partial(linear, x, copy) for copy in dense],
            "packed": [partial(native.sparse_linear, x, copy) for copy in sparse],
        }

    return contenders


def _copy(one: native.AnyPacked) -> native.AnyPacked:
    if isinstance(one, packed_matrix.PackedMatrix):
        return replace(one, mask=one.mask.clone(), values=one.values.clone())
    return replace(one, places=one.places.clone(), codes=one.codes.clone(), scales=one.scales.clone())


def _on_gpu(weight: Tensor, slab: Tensor, pattern: str, bits: Bits | None) -> Callable[[Tensor], _Contenders]:
    d_out, d_in = weight.shape
    matrix = None
    if _multiplied_packed(d_in, weight.device):
        matrix = GpuMatrix.of(_packed(slab, len(weight), pattern, bits), weight.device)

    def contenders(x: Tensor) -> _Contenders:
        found: _Contenders = {"dense": [partial(linear, x, weight)]}
        for product in products(d_out, d_in, len(x), x.dtype, weight.device, bits):
            if matrix is not None and product == "packed":
                found[product] = [partial(gpu_linear, x, matrix)]
            else:
                found[product] = [partial(linear, x, semi_structured.compress(weight, len(x)))]
        return found

    return contenders
