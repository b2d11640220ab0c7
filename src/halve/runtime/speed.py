"""How much faster a sparse product is than a dense one, on this machine, measured: for the planner and `accelerate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from halve.device import on_device
from halve.errors import InputError
from halve.maths.grid import Bits
from halve.maths.pattern import Pattern
from halve.memory import check_memory
from halve.runtime import native, packed_matrix, quantised_matrix, semi_structured
from halve.runtime.timing import copies_beyond_cache, take_turns

_SLAB = 64
"""Rows of random weights that a matrix repeats: what is multiplied does not change the time."""
_GPU_WORK = 20
"""Bytes a weight that compressing for sparse tensor cores takes at its peak, in half precision."""


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
    """

    d_out: int
    d_in: int
    batch: int
    dense_seconds: float
    sparse_seconds: float
    dense_call_seconds: float
    sparse_call_seconds: float

    @property
    def ratio(self) -> float:
        """How many times as fast the sparse product is; below 1 it is slower."""
        return self.dense_seconds / self.sparse_seconds

    @property
    def call_ratio(self) -> float:
        """The same with what launches cost, as a program has it that waits for each product or gives the GPU little."""
        return self.dense_call_seconds / self.sparse_call_seconds


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
    if bits is not None and device.type != "cpu":
        raise InputError(f"quantised products are computed on the CPU, not on {device}: use --device cpu")
    if bits is not None and (reason := quantised_matrix.why_not(pattern)):
        raise InputError(reason)
    if device.type == "cpu":
        if dtype not in packed_matrix.DTYPES:
            raise InputError(f"packed products are bfloat16, float16 or float32, not {dtype}")
        return
    if reason := semi_structured.unusable(device):
        raise InputError(f"no sparse products on {device}: {reason}; use --device cpu")
    if pattern.text != "2:4" or dtype not in semi_structured.DTYPES:
        raise InputError(f"sparse tensor cores multiply 2:4 in bfloat16 or float16, not {pattern} in {dtype}")


def unfit(d_out: int, d_in: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return why there is no sparse product with matrices of one shape, as half a sentence; empty if there is."""
    return "" if device.type == "cpu" else semi_structured.unfit(d_out, d_in, dtype)


def sparse_bytes(
    d_out: int, d_in: int, pattern: Pattern, dtype: torch.dtype, device: torch.device, bits: Bits | None = None
) -> int:
    """Return the bytes of a matrix as it is multiplied sparse there."""
    if device.type == "cuda":
        return semi_structured.compressed_bytes(d_out, d_in, dtype)
    if bits is not None:
        return quantised_matrix.quantised_bytes(d_out, d_in, bits)
    return packed_matrix.packed_bytes(d_out, d_in, pattern, dtype)


def describe(device: torch.device, bits: Bits | None = None) -> str:
    """Return what multiplies sparse matrices there."""
    if device.type == "cpu":
        return native.describe(bits)
    library = "cuSPARSELt, algorithm searched" if torch.backends.cusparselt.is_available() else "CUTLASS"
    return f"{library}, on {torch.cuda.get_device_name(device)}"


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
        return rows + 2 * weight + _GPU_WORK * d_out * d_in
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
    multiply = _on_gpu(weight) if device.type == "cuda" else _on_cpu(weight, slab, str(pattern), bits)
    found = []
    with torch.inference_mode(), on_device(device):
        for batch in batches:
            x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(batch)).to(device, dtype)
            turns = take_turns(multiply(x), device=device, seconds=seconds)
            dense, sparse = turns["dense"], turns["sparse"]
            found.append(
                Speed(
                    d_out=d_out,
                    d_in=d_in,
                    batch=batch,
                    dense_seconds=dense.seconds,
                    sparse_seconds=sparse.seconds,
                    dense_call_seconds=dense.call_seconds,
                    sparse_call_seconds=sparse.call_seconds,
                )
            )
    return found


_Contenders = dict[str, list[Callable[[], Tensor]]]


def random_slab(d_out: int, d_in: int, pattern: str | Pattern, dtype: torch.dtype) -> Tensor:
    """Return (rows, d_in) random weights in the pattern, for no more rows than a matrix is built of."""
    random = torch.randn(min(d_out, _SLAB), d_in, generator=torch.Generator().manual_seed(0))
    return Pattern.parse(pattern).project(random).to(dtype)


def repeated(one: packed_matrix.PackedMatrix, d_out: int) -> packed_matrix.PackedMatrix:
    """Return a packed matrix of ``d_out`` rows that repeats the rows of another."""
    times = -(-d_out // one.d_out)
    values = one.values[: one.d_out * one.kept].repeat(times)[: d_out * one.kept]
    rest = values.new_zeros(packed_matrix.OVERREAD)
    mask = one.mask.repeat(times, 1)[:d_out]
    return packed_matrix.PackedMatrix(mask, torch.cat((values, rest)), (d_out, one.d_in), one.pattern)


def _on_cpu(weight: Tensor, slab: Tensor, pattern: str, bits: Bits | None) -> Callable[[Tensor], _Contenders]:
    first: native.AnyPacked = repeated(packed_matrix.pack(slab, pattern), len(weight))
    if isinstance(first, packed_matrix.PackedMatrix) and bits is not None:
        first = quantised_matrix.quantise(first, bits)
    dense = [weight.clone() for _ in range(copies_beyond_cache(weight.nbytes))]
    sparse = [first] + [_copy(first) for _ in range(copies_beyond_cache(first.nbytes) - 1)]

    def contenders(x: Tensor) -> _Contenders:
        return {
            "dense": [partial(linear, x, copy) for copy in dense],
            "sparse": [partial(native.sparse_linear, x, copy) for copy in sparse],
        }

    return contenders


def _copy(one: native.AnyPacked) -> native.AnyPacked:
    if isinstance(one, packed_matrix.PackedMatrix):
        return replace(one, mask=one.mask.clone(), values=one.values.clone())
    return replace(one, places=one.places.clone(), codes=one.codes.clone(), scales=one.scales.clone())


def _on_gpu(weight: Tensor) -> Callable[[Tensor], _Contenders]:
    def contenders(x: Tensor) -> _Contenders:
        sparse = semi_structured.compress(weight, len(x))
        return {"dense": [partial(linear, x, weight)], "sparse": [partial(linear, x, sparse)]}

    return contenders
