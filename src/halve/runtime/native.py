"""Products of vectors with packed matrices, on the CPU: the compiled kernels, and the reference they are held to.

The kernels, built from ``src/native``, read packed weights once for a few rows of x and expand them in registers. More
rows than `register_rows` says are for PyTorch's dense product, to which the weights are handed unpacked, a tile of rows
at a time; in float32 where the processor has no product of the 16 bits. Without the compiled module everything is
computed by `reference`, slowly, and `describe` says so.

With quantised weights the kernels quantise x too: every 32 columns to integers from -127 to 127, the largest of them
the largest number. Products of integers are exact, and scaled and summed in float32.
"""

import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from halve.errors import InputError
from halve.runtime.compiled import broken, instruction_sets, library, quantised_instruction_sets
from halve.runtime.packed_matrix import DTYPES, PackedMatrix, unpack
from halve.runtime.quantised_matrix import DenseIntegers, QuantisedMatrix
from halve.torch_internals import has_dense_products, processor_has

AnyPacked = PackedMatrix | QuantisedMatrix
"""A matrix that can be multiplied with packed."""
REFERENCE = "reference"
"""In place of an instruction set: compute with PyTorch what the kernels are held to."""
X_BLOCK = 32
"""Columns of x that are quantised together."""
_SMALLEST = 1e-30
"""What is smaller than that in all columns of a block of x is taken for 0."""
_TILE = 1 << 21
"""Weights unpacked at a time for larger batches: few enough to stay in a cache until they are multiplied, and so many
that threads seldom wait for each other, which on a busy machine takes them milliseconds."""


def register_rows(instruction_set: str, dtype: torch.dtype | None, amx: bool) -> int:
    """Return up to how many rows of x the kernels multiply; with more, unpacking for a dense product is faster.

    Found by measurement on two cores of each kind, and never while running: the same call always takes the same way.

    Args:
        instruction_set: one of `instruction_sets`, or of `quantised_instruction_sets`.
        dtype: of the matrix, one of `DTYPES`; None where it is quantised.
        amx: whether the processor multiplies tiles of this dtype.
    """
    if dtype is None:
        return 8 if instruction_set == "portable" else 64
    if amx and dtype != torch.float32:
        return 4
    if instruction_set == "avx2":
        return 64 if dtype == torch.float32 else 256
    return 8 if instruction_set == "portable" else 16


def describe(bits: int | None = None) -> str:
    """Return what multiplies packed matrices on this machine, or why it is slow; quantised ones of so many bits."""
    if bits is not None and quantised_instruction_sets():
        return f"native, {quantised_instruction_sets()[0]}, int{bits}"
    if instruction_sets():
        return f"native, {instruction_sets()[0]}"
    why = f"cannot be loaded ({broken})" if broken else "are not built (no C++ compiler at installation?)"
    return f"the packed kernels {why}: every product unpacks its weights"


def sparse_linear(
    x: Tensor, packed: AnyPacked, bias: Tensor | None = None, instruction_set: str | None = None
) -> Tensor:
    """Return ``x Wᵀ + bias`` for a packed W, summed in float32, on as many threads as torch uses.

    On processors with AVX-512 products of bfloat16 take subnormal numbers for zeros. Where W is quantised, a few rows
    of x are too, see above, and one that holds NaN or infinity makes its row of the result NaN.

    Args:
        x: (..., d_in), of the matrix's dtype.
        packed: W, (d_out, d_in).
        bias: (d_out,), of the matrix's dtype.
        instruction_set: one of `instruction_sets`, of `quantised_instruction_sets` where W is quantised, or
            `REFERENCE`; None takes the best there is.

    Returns:
        Tensor: (..., d_out), of the matrix's dtype.

    Raises:
        InputError: shapes, dtypes or devices do not go together, a gradient is asked for, or the processor lacks the
            instruction set.
    """
    _check(x, packed, bias)
    name = _choose(instruction_set, packed)
    if torch.is_autocast_enabled("cpu"):  # which would lower the products of what is unpacked
        with torch.autocast("cpu", enabled=False):
            return sparse_linear(x, packed, bias, name)
    if name == REFERENCE:
        return reference(x, packed, bias)
    flat = x.reshape(-1, packed.d_in).contiguous()
    rows = flat.shape[0]
    if rows > _register_rows_here(name, None if isinstance(packed, QuantisedMatrix) else packed.dtype):
        return _tile_by_tile(flat, packed, bias, name).view(*x.shape[:-1], packed.d_out)
    y = flat.new_empty(rows, packed.d_out)
    if rows:
        bias = None if bias is None else bias.contiguous()
        start = 0 if bias is None else bias.data_ptr()
        rest = flat.data_ptr(), rows, start, y.data_ptr(), torch.get_num_threads()
        if isinstance(packed, QuantisedMatrix):
            library.multiply_quantised(name, *_quantised_operand(packed), *rest)
        else:
            library.multiply(name, *_operand(packed), *rest)
    return y.view(*x.shape[:-1], packed.d_out)


def reference(x: Tensor, packed: AnyPacked, bias: Tensor | None = None) -> Tensor:
    """Compute `sparse_linear` with PyTorch: unpack, multiply in float32, round; x is not quantised."""
    weight = unpack(_in_floats(packed)).float()
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(packed.dtype)


def quantised_input(x: Tensor) -> Tensor:
    """Return x, (..., d_in), as the kernels quantise it for quantised weights, in float32: what tests hold them to."""
    d_in = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -d_in % X_BLOCK))
    blocks = padded.view(*x.shape[:-1], padded.shape[-1] // X_BLOCK, X_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    steps = torch.where(largest < _SMALLEST, 0.0, torch.full_like(largest, 127.0) / largest)
    integers = (blocks.double() * steps.double()).round()
    found: Tensor = (integers.float() * (largest / 127.0)).flatten(-2)[..., :d_in]
    return found


def multiplies_integers(rows: int, packed: QuantisedMatrix) -> bool:
    """Return whether so many rows of x are quantised to be multiplied with a matrix here."""
    name = _choose(None, packed)
    return name != REFERENCE and rows <= _register_rows_here(name, None)


def expand(packed: AnyPacked, start: int, stop: int, instruction_set: str | None = None) -> Tensor:
    """Return the rows ``[start, stop)`` unpacked, (stop - start, d_in); bit for bit what `unpack` gives.

    Where the matrix is quantised, of what `QuantisedMatrix.dequantised` returns.

    Raises:
        InputError: there are no such rows, or the processor lacks the instruction set.
    """
    if not 0 <= start <= stop <= packed.d_out:
        raise InputError(f"rows {start} to {stop} do not exist in a matrix of {packed.d_out}")
    name = _choose(instruction_set, packed)
    if name == REFERENCE:
        return unpack(_in_floats(packed))[start:stop]
    out = torch.empty(stop - start, packed.d_in, dtype=packed.dtype)
    _expand_into(out, packed, start, name)
    return out


def dense_linear(x: Tensor, weight: Tensor, instruction_set: str | None = None) -> Tensor:
    """Return ``x Wᵀ`` for a dense W by the loops of `sparse_linear`: shows in benchmarks what sparsity itself gains.

    Args:
        x: (batch, d_in), contiguous, at least one row, d_in a multiple of 64.
        weight: W, (d_out, d_in), contiguous, of the same dtype, one of `DTYPES`.
        instruction_set: one of `instruction_sets`; None takes the best.

    Raises:
        InputError: the arguments are anything else, or nothing was compiled.
    """
    name = _choose(instruction_set)
    fits = (
        name != REFERENCE
        and x.ndim == weight.ndim == 2
        and x.dtype == weight.dtype in DTYPES
        and x.device.type == weight.device.type == "cpu"
        and x.shape[1] == weight.shape[1]
        and x.shape[1] % 64 == 0
        and len(x) >= 1
        and x.is_contiguous()
        and weight.is_contiguous()
    )
    if not fits:
        raise InputError(f"no dense kernel for x {tuple(x.shape)} and W {tuple(weight.shape)} in {weight.dtype}")
    y = x.new_empty(len(x), len(weight))
    library.multiply(
        name,
        DTYPES.index(weight.dtype),
        0,
        weight.data_ptr(),
        len(weight),
        weight.shape[1],
        weight.shape[1],
        False,
        x.data_ptr(),
        len(x),
        0,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def dense_integers_linear(x: Tensor, matrix: DenseIntegers, instruction_set: str | None = None) -> Tensor:
    """Return ``x Wᵀ`` for a dense W of integers; x is quantised too, as for a quantised packed one.

    Args:
        x: (..., d_in), of the matrix's dtype, with at most as many rows as `multiplies_dense_integers` says.
        matrix: W, (d_out, d_in).
        instruction_set: one of `quantised_instruction_sets`; None takes the best.

    Raises:
        InputError: x does not go with the matrix, or nothing was compiled.
    """
    names, (d_out, d_in) = quantised_instruction_sets(), matrix.shape
    name = instruction_set or (names[0] if names else "")
    if name not in names or x.shape[-1:] != (d_in,) or x.dtype != matrix.dtype or not x.is_cpu:
        raise InputError(f"no kernel for x {tuple(x.shape)} in {x.dtype} and dense integers {matrix.shape}")
    flat = x.reshape(-1, d_in).contiguous()
    y = flat.new_empty(len(flat), d_out)
    if len(flat):
        library.multiply_quantised(
            name,
            DTYPES.index(matrix.dtype),
            0,
            matrix.codes.data_ptr(),
            matrix.scales.data_ptr(),
            d_out,
            d_in,
            8,
            flat.data_ptr(),
            len(flat),
            0,
            y.data_ptr(),
            torch.get_num_threads(),
        )
    return y.view(*x.shape[:-1], d_out)


def multiplies_dense_integers(rows: int) -> bool:
    """Return whether so many rows are multiplied with dense integers here, rather than with a dense matrix."""
    names = quantised_instruction_sets()
    return bool(names) and rows <= _register_rows_here(names[0], None)


def _operand(packed: PackedMatrix) -> tuple[int, int, int, int, int, int, bool]:
    """Return a packed matrix as the compiled functions take it."""
    parts = DTYPES.index(packed.dtype), packed.mask.data_ptr(), packed.values.data_ptr()
    return *parts, packed.d_out, packed.d_in, packed.kept, packed.half_of_every_byte


def _quantised_operand(packed: QuantisedMatrix) -> tuple[int, int, int, int, int, int, int]:
    """Return a quantised matrix as the compiled functions take it."""
    parts = packed.places.data_ptr(), packed.codes.data_ptr(), packed.scales.data_ptr()
    return DTYPES.index(packed.dtype), *parts, packed.d_out, packed.d_in, packed.bits


def few_rows(dtype: torch.dtype) -> int:
    """Return up to how many rows of x the best kernels here multiply with packed, dense or quantised matrices."""
    return min(_register_rows_here(_choose(None), dtype), _register_rows_here(quantised_instruction_sets()[0], None))


def operand(packed: AnyPacked) -> list[int]:
    """Return a packed matrix as the compiled decoder takes it, without its bias.

    The numbers are addresses in memory: whoever uses them holds the matrix.
    """
    if isinstance(packed, QuantisedMatrix):
        _, places, codes, scales, d_out, d_in, bits = _quantised_operand(packed)
        return [bits, places, codes, scales, d_out, d_in]
    _, mask, values, d_out, d_in, kept, half = _operand(packed)
    return [0, mask, values, int(half), kept, d_out, d_in]


def dense_operand(weight: Tensor) -> list[int]:
    """Return a dense weight, (d_out, d_in) with d_in a multiple of 64, contiguous, as `operand` a packed one."""
    d_out, d_in = weight.shape
    return [0, 0, weight.data_ptr(), 0, d_in, d_out, d_in]


def _in_floats(packed: AnyPacked) -> PackedMatrix:
    return packed.dequantised() if isinstance(packed, QuantisedMatrix) else packed


def _choose(instruction_set: str | None, packed: AnyPacked | None = None) -> str:
    found = quantised_instruction_sets() if isinstance(packed, QuantisedMatrix) else instruction_sets()
    if instruction_set is None:
        return _best(found)
    names = (*found, REFERENCE)
    if instruction_set not in names:
        raise InputError(f"this processor has no instruction set called {instruction_set!r}, only {', '.join(names)}")
    return instruction_set


@cache
def _best(found: tuple[str, ...]) -> str:
    """Return what multiplies unless something else is asked for; where that is slow, say so, once."""
    if found:
        return found[0]
    warnings.warn(describe(), RuntimeWarning, stacklevel=2)
    return REFERENCE


def _check(x: Tensor, packed: AnyPacked, bias: Tensor | None) -> None:
    _check_one("x", x, packed, fits=x.ndim > 0 and x.shape[-1] == packed.d_in)
    if bias is not None:
        _check_one("bias", bias, packed, fits=bias.shape == (packed.d_out,))


def _check_one(name: str, given: Tensor, packed: AnyPacked, *, fits: bool) -> None:
    if not fits or given.dtype != packed.dtype or not given.is_cpu:
        raise InputError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)} on {given.device}, which does not go with "
            f"a packed matrix of shape {packed.shape} in {packed.dtype} on the CPU"
        )
    if given.requires_grad and torch.is_grad_enabled():
        raise InputError(f"packed products have no gradient: multiply under torch.no_grad() or detach {name}")


def _multiplies(dtype: torch.dtype) -> bool:
    """Return whether PyTorch's product of this dtype is faster here than that of float32."""
    if dtype == torch.float32:
        return True
    return has_dense_products(dtype)


def _amx(dtype: torch.dtype) -> bool:
    """Return whether the processor multiplies tiles of this dtype."""
    if dtype == torch.bfloat16:
        return processor_has("amx_bf16")
    return dtype == torch.float16 and processor_has("amx_fp16")


@cache
def _register_rows_here(name: str, dtype: torch.dtype | None) -> int:
    return register_rows(name, dtype, dtype is not None and _amx(dtype))


def _tile_by_tile(x: Tensor, packed: AnyPacked, bias: Tensor | None, name: str) -> Tensor:
    """Compute `sparse_linear` with PyTorch's product; x is (batch, d_in)."""
    dtype = packed.dtype if _multiplies(packed.dtype) else torch.float32
    x, y = x.detach().to(dtype), x.new_empty(len(x), packed.d_out, dtype=dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    for start, tile in _tiles(packed, name, dtype):
        part = slice(start, start + len(tile))
        if dtype != torch.float32:
            y[:, part] = torch.nn.functional.linear(x, tile, None if bias is None else bias[part])
        elif bias is None:  # written where it belongs: threads wait for each other once less
            torch.mm(x, tile.T, out=y[:, part])
        else:
            torch.addmm(bias[part], x, tile.T, out=y[:, part])
    return y.to(packed.dtype)


def _tiles(packed: AnyPacked, name: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield tiles of rows unpacked to ``dtype``, each with the number of its first row; the next overwrites it."""
    step = min(packed.d_out, max(1, _TILE // packed.d_in))
    buffer = torch.empty(step, packed.d_in, dtype=packed.dtype)
    wide = buffer if dtype == packed.dtype else torch.empty_like(buffer, dtype=dtype)
    for start in range(0, packed.d_out, step):
        tile = buffer[: packed.d_out - start]
        _expand_into(tile, packed, start, name)
        yield start, tile if wide is buffer else wide[: len(tile)].copy_(tile)


def _expand_into(out: Tensor, packed: AnyPacked, start: int, name: str) -> None:
    rest = start, start + len(out), out.data_ptr(), torch.get_num_threads()
    if isinstance(packed, QuantisedMatrix):
        library.expand_quantised(name, *_quantised_operand(packed), *rest)
    else:
        library.expand(name, *_operand(packed), *rest)
