"""Swap the pruned linear layers of a model for sparse ones, where they are faster, and check that nothing else changed.

On the CPU they become `SparseLinear`, on a GPU `GpuLinear` or `SemiStructuredLinear`; the first two are quantised if
asked. Every swapped layer's product is held to the dense one before the dense weight is let go, and the model's output
to what it was; if either fails, everything is put back. Dense weights that are rounded are let go at the end alone.
Models of Llama's kind on the CPU then have their next tokens computed in one call, held to what the modules compute
(`halve.runtime.decoding.next_token`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halve.checks import check_count, check_positive
from halve.device import on_device
from halve.errors import HalveError, InputError, counted
from halve.maths.grid import Bits
from halve.maths.linalg import is_finite
from halve.maths.pattern import Pattern
from halve.model.layers import EXPERTS_IN_ONE, is_fused, is_linear, is_plain_linear, layer_matrix, replace_module
from halve.runtime import speed
from halve.runtime.compressed_linear import noting_reads
from halve.runtime.decoding.next_token import decode_by_modules, decode_in_one_call
from halve.runtime.heads import Head, IntegerHead, check_head, head_to_quantise, output_layer
from halve.runtime.kernels.gpu_linear import GpuLinear
from halve.runtime.linear import SparseLinear
from halve.runtime.probe import Probe, difference, noting_calls
from halve.runtime.product_check import check_product, reference_of
from halve.runtime.quantised_matrix import Values, bits_of
from halve.runtime.semi_structured import SemiStructuredLinear
from halve.runtime.speed import Product, Speed
from halve.torch_internals import has_hooks

_OUTPUT = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.2}
"""Relative difference of a whole model's output that rounding explains, by the dtype of the swapped layers. It grows
from layer to layer, so that wrong kernels are left to the products: this finds a layer in the wrong place."""

_QUANTISED_OUTPUT: dict[Bits, float] = {8: 0.2, 4: 0.7}
"""The same where weights are rounded, which changes the output for good: this finds what is no rounding."""

Sparse = SparseLinear | GpuLinear | SemiStructuredLinear


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did to a model.

    Attributes:
        swapped: names of the layers that are sparse now.
        left_dense: names of the other layers, and why each is dense.
        slower: of these, the ones that are not as much faster as was asked for.
        speeds: what was measured, one a shape; empty if nothing was to be.
        bytes_before: of the weights of the swapped layers.
        bytes_after: of the same, packed.
        difference: relative difference of the model's output on the probe, ``|after - before| / |before|``.
        kernel: what multiplies now.
        head: what the output layer multiplies a few rows with.
        decoding: why a next token is computed module by module; empty where it is computed in one call.
    """

    swapped: tuple[str, ...] = field(repr=False)
    left_dense: Mapping[str, str] = field(repr=False)
    slower: tuple[str, ...] = field(repr=False)
    speeds: tuple[Speed, ...] = field(repr=False)
    bytes_before: int
    bytes_after: int
    difference: float
    kernel: str
    head: Head
    decoding: str

    def __str__(self) -> str:
        """Return what a user wants to know of it, as one sentence."""
        before, after = (size / 1e6 for size in (self.bytes_before, self.bytes_after))
        swapped = counted(len(self.swapped), "layer runs sparse", "layers run sparse")
        return (
            f"{swapped}, {len(self.left_dense)} stay dense; {before:.1f} MB of weights "
            f"take {after:.1f} MB; the output differs by {self.difference:.2g} of its norm; {self.kernel}"
            f"{'' if self.head == 'own' else f', the head in {self.head}'}"
            f"{'' if self.decoding else ', each next token in one call'}"
        )


def accelerate(
    model: nn.Module,
    *,
    pattern: str | Pattern = "2:4",
    batch: int = 1,
    only_where_faster: float | None = 1.0,
    probe: Tensor | Mapping[str, Any] | None = None,
    values: Values = "own",
    head: Head = "own",
    one_call: bool = True,
    listen: Callable[[int, int, str], None] | None = None,
) -> Acceleration:
    """Swap, in place, the linear layers of a model that are in a pattern and whose products are measured to be faster.

    For inference: the weights get no gradient any more. The model's ``state_dict`` stays that of the dense model, but
    that a -0.0 for which a group has no room, and on a GPU's sparse tensor cores any -0.0, comes back as +0.0.

    Args:
        model: in memory, on the CPU or a GPU.
        pattern: what its pruned layers have; on a GPU only 2:4.
        batch: rows of a product that speed is measured at, and that a GPU's algorithm is searched for: sequences
            decoded at once.
        only_where_faster: layers stay dense whose shape is not this many times as fast on this machine, two decimals
            counted; on a GPU with and without what launching costs, for the faster of packed products and sparse tensor
            cores. None swaps all of them, and measures nothing: on a GPU sparse tensor cores then multiply, and layers
            are packed that are quantised or whose shape these do not take.
        probe: keyword arguments of the model's call, or its ``input_ids``, to compare outputs on; None takes 16 tokens
            from all over the vocabulary.
        values: what the kept weights are held as. ``int8`` and ``int4`` round them, see
            `halve.runtime.quantised_matrix.quantise`, and on the CPU with few rows what they are multiplied with: at
            2:4. The model's ``state_dict`` is then that of the rounded weights.
        head: ``int8`` lets a dense output layer multiply a few rows with its weight in integers of 8 bits, which it
            then holds beside its own (`halve.runtime.heads.IntegerHead`): on the CPU alone. ``own`` leaves it alone.
        one_call: whether a model of Llama's kind computes each next token in one call, where it can be.
        listen: told after every layer how many are swapped, how many there are, and its name.

    Returns:
        Acceleration: what was swapped, what was not and why.

    Raises:
        InputError: no layer has the pattern, none of them is faster, an argument cannot be used, there is too little
            memory to measure in, or the model cannot be called with the probe; nothing was swapped.
        HalveError: a sparse product, or the model's output, was wrong; plain layers with the weights are put back.
    """
    pattern = Pattern.parse(pattern)
    bits = bits_of(values, pattern)
    check_head(head)
    check_count("batch", batch)
    if only_where_faster is not None:
        check_positive("only_where_faster", only_where_faster)
    _check_model(model)
    chosen, left = _candidates(model, pattern, values)
    if not chosen:
        raise InputError(
            f"no linear layer of this {type(model).__name__} can run sparse at {pattern} ({_most_common(left)}): prune "
            "it first, or give its pattern"
        )
    dense_head = head_to_quantise(model, chosen, head)
    asked = Probe.of(model, probe)
    before = _dense_output(asked, chosen, left)
    how = _How(pattern, batch, bits)
    speeds, slower = ({}, ()) if only_where_faster is None else _keep_faster(chosen, left, how, only_where_faster)
    products = {name: _product(_key(layer), how, speeds) for name, layer in chosen.items()}
    device = layer_matrix(next(iter(chosen.values()))).device
    sizes = {name: layer_matrix(layer).nbytes for name, layer in chosen.items()}
    allowed = _allowed(chosen) if bits is None else _QUANTISED_OUTPUT[bits]
    allowed = allowed if dense_head is None else max(allowed, _QUANTISED_OUTPUT[8])
    plain = {
        name: _Plain(bool(layer.weight.requires_grad), None if bits is None else layer)
        for name, layer in chosen.items()
    }
    swapped: dict[str, Sparse] = {}
    was_in_one_call = decode_by_modules(model)  # what is compiled keeps the dense weights
    try:
        for name, sparse in _swap(model, chosen, how, products):
            swapped[name] = sparse
            if listen is not None:
                listen(len(swapped), len(plain), name)
        if dense_head is not None:
            replace_module(model, dense_head, IntegerHead(dense_head))
        off = _check_output(asked, before, allowed, swapped, plain)
        decoding = decode_in_one_call(model) if one_call else "one call was not asked for"
    except BaseException:
        _put_back(model, swapped, plain)
        if dense_head is not None:
            replace_module(model, output_layer(model), dense_head)
        if was_in_one_call:
            decode_in_one_call(model)
        raise
    readers = [name for name in plain if name not in swapped]
    left |= dict.fromkeys(readers, "the model reads its weight, which would be expanded each time")
    bytes_before = sum(sizes[name] for name in swapped)
    bytes_after = sum(sparse.nbytes for sparse in swapped.values())
    kernel = speed.describe(device, bits, {products[name] for name in swapped})
    rows = tuple(speeds.values())
    return Acceleration(tuple(swapped), left, slower, rows, bytes_before, bytes_after, off, kernel, head, decoding)


@dataclass(frozen=True)
class _How:
    """The pattern of the layers, the rows of a product that counts, and the bits of integers, if there are any."""

    pattern: Pattern
    batch: int
    bits: Bits | None


def restore(model: nn.Module, name: str) -> None:
    """Put a plain layer, with the same bits, or the rounded weights where they are integers, where a sparse one is.

    Raises:
        InputError: there is no sparse layer of that name.
    """
    sparse = dict(model.named_modules()).get(name)
    if not isinstance(sparse, Sparse):
        raise InputError(f"{name} is no sparse layer of this model")
    replace_module(model, sparse, sparse.plain())


@dataclass(frozen=True)
class _Plain:
    """Whether the weight of a layer was trained, and the layer, where its sparse one has not the same weight."""

    trained: bool
    layer: nn.Module | None


def _put_back(model: nn.Module, names: Iterable[str], plain: Mapping[str, _Plain]) -> None:
    for name in names:
        layer = plain[name].layer
        if layer is not None:
            replace_module(model, model.get_submodule(name), layer)
        else:
            restore(model, name)
            model.get_parameter(f"{name}.weight").requires_grad_(plain[name].trained)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate takes a model in memory, not {model!r}: load it first, with halve.load")
    already = sum(isinstance(layer, Sparse) for layer in model.modules())
    if already:
        raise InputError(
            f"{counted(already, 'layer')} of this {type(model).__name__} are sparse already: load it anew from a "
            "plain checkpoint, or restore each by its name, with halve.runtime.accelerate.restore(model, name)"
        )


def _candidates(model: nn.Module, pattern: Pattern, values: Values) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that can run sparse, and why the others cannot."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    chosen: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        left |= {
            f"{name}.{leaf}".lstrip("."): EXPERTS_IN_ONE
            for leaf, parameter in module.named_parameters(recurse=False)
            if is_fused(module, parameter)
        }
        if not is_linear(module):
            continue
        if reason := _why_dense(module, pattern, values, shared=owners[id(module.weight)] > 1):
            left[name] = reason
        else:
            chosen[name] = module
    return chosen, left


def _why_dense(layer: nn.Module, pattern: Pattern, values: Values, *, shared: bool) -> str:
    """Return why a layer cannot run sparse, empty if it can."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - is_linear
    if not is_plain_linear(layer):
        return f"a {type(layer).__name__}, which may use its weight in its own way"
    if has_hooks(layer) or "forward" in vars(layer):
        return "hooks are on it, which another layer would not have"
    if shared:
        return "its weight is shared with another module"
    matrix = layer_matrix(layer)
    if not pattern.fits(matrix.shape[1]):
        return f"d_in = {matrix.shape[1]} is not divisible by {pattern.group}"
    try:
        speed.check_measurable(pattern, weight.dtype, weight.device, bits_of(values, pattern))
    except InputError as error:
        return str(error)
    if reason := speed.unfit(matrix.shape[0], matrix.shape[1], weight.dtype, weight.device):
        return reason
    if not is_finite(matrix):
        return "its weight holds NaN or infinity"
    if values == "bf16" and weight.dtype != torch.bfloat16:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not bfloat16"
    return "" if pattern.satisfied_by(matrix) else f"not at {pattern}"


def _most_common(reasons: Mapping[str, str]) -> str:
    return Counter(reasons.values()).most_common(1)[0][0] if reasons else "it has no linear layers"


_Key = tuple[torch.Size, torch.dtype, torch.device]
"""What the time of a product depends on."""


def _key(layer: nn.Module) -> _Key:
    matrix = layer_matrix(layer)
    return matrix.shape, matrix.dtype, matrix.device


def _dense_output(probe: Probe, chosen: dict[str, nn.Module], left: dict[str, str]) -> Tensor:
    """Return the model's output; layers that are not called go from ``chosen`` to ``left``.

    Raises:
        InputError: as `Probe.dense_output`; no layer is called, or the output is another each time.
    """
    name = type(probe.model).__name__
    with noting_calls(chosen) as called:
        output = probe.dense_output()
    # Whoever multiplies with the weights of a layer that is not called would expand them each time.
    for idle in [layer for layer in chosen if layer not in called]:
        del chosen[idle]
        left[idle] = "the model does not call it on the probe"
    if not chosen:
        raise InputError(f"{name} calls none of its pruned layers on the probe: give another")
    if not difference(output, probe.dense_output()) <= _allowed(chosen):
        raise InputError(f"{name} does not return the same twice on the probe: nothing can be compared with it")
    return output


def _allowed(layers: Mapping[str, nn.Module]) -> float:
    return max(_OUTPUT[layer_matrix(layer).dtype] for layer in layers.values())


def _keep_faster(
    chosen: dict[str, nn.Module], left: dict[str, str], how: _How, factor: float
) -> tuple[dict[_Key, Speed], tuple[str, ...]]:
    """Measure every shape, and move the layers that are not fast enough from ``chosen`` to ``left``, with the reason.

    Returns:
        tuple[dict[_Key, Speed], tuple[str, ...]]: what was measured, and the names of the layers moved.

    Raises:
        InputError: none is left.
    """
    speeds: dict[_Key, Speed] = {}
    for key in dict.fromkeys(_key(layer) for layer in chosen.values()):
        (d_out, d_in), dtype, device = key
        remedy = "free some, or give only_where_faster=None, which measures nothing"
        pattern, batch, bits = how.pattern, how.batch, how.bits
        speed.check_room(d_out, d_in, batch, pattern=pattern, dtype=dtype, device=device, bits=bits, remedy=remedy)
        measured = speed.measure(d_out, d_in, [batch], pattern=pattern, dtype=dtype, device=device, bits=bits)
        speeds[key] = measured[0]
    ratios = {key: round(row.lesser_ratio, 2) for key, row in speeds.items()}
    slower = tuple(name for name, layer in chosen.items() if ratios[_key(layer)] < factor)
    for name in slower:
        ratio = ratios[_key(chosen.pop(name))]
        left[name] = f"{ratio:.2f} times as fast as dense at batch {how.batch}, less than {factor:g}"
    if not chosen:
        best = max(ratios.values())
        wanted = "faster sparse" if factor == 1 else f"{factor:g} times as fast sparse"
        raise InputError(
            f"no layer is {wanted} at batch {how.batch} here, the best {best:.2f} times as fast: the model stays "
            "dense; see halve plan for other batches, or give halve.accelerate only_where_faster=None to save memory "
            "alone"
        )
    return speeds, slower


def _product(key: _Key, how: _How, speeds: Mapping[_Key, Speed]) -> Product:
    """Return how the product of a layer is computed: the faster way, where that was measured."""
    if key in speeds:
        return speeds[key].product
    (d_out, d_in), dtype, device = key
    return speed.products(d_out, d_in, how.batch, dtype, device, how.bits)[0]


def _swap(
    model: nn.Module, chosen: dict[str, nn.Module], how: _How, products: Mapping[str, Product]
) -> Iterator[tuple[str, Sparse]]:
    """Take layers out of ``chosen`` and replace them one by one.

    Each dense weight is let go before the next is packed, unless it is rounded.
    """
    while chosen:
        name = next(iter(chosen))
        layer = chosen.pop(name)
        with on_device(layer_matrix(layer).device):
            sparse = _sparse(layer, how, products[name])
            expected = reference_of(layer, sparse)
            for rows in sorted({1, 3, how.batch}):  # each may take another way through the kernels
                check_product(name, layer, sparse, expected, rows)
            del expected
        replace_module(model, layer, sparse)
        del layer
        yield name, sparse


def _sparse(layer: nn.Module, how: _How, product: Product) -> Sparse:
    if not _is_on_gpu(layer):
        return SparseLinear.of(layer, how.pattern, how.bits)
    return GpuLinear.of(layer, how.bits) if product == "packed" else SemiStructuredLinear.of(layer, how.batch)


def _is_on_gpu(layer: nn.Module) -> bool:
    return layer_matrix(layer).device.type == "cuda"


def _check_output(
    probe: Probe, before: Tensor, allowed: float, swapped: dict[str, Sparse], plain: Mapping[str, _Plain]
) -> float:
    """Hold the model's output to the dense one's; layers whose weights its code reads are put back, out of ``swapped``.

    Returns:
        float: the relative difference.

    Raises:
        InputError: no layer is left.
        HalveError: the model fails, or the output is off by more than ``allowed``.
    """
    with noting_reads() as read:
        output = probe.sparse_output()
    readers = [name for name, sparse in swapped.items() if sparse in read]
    if len(readers) == len(swapped):
        raise InputError(
            f"{type(probe.model).__name__} reads the weights of all its pruned layers itself, which would expand them "
            "each time: it stays dense"
        )
    _put_back(probe.model, readers, plain)
    for name in readers:
        del swapped[name]
    off = difference(before, probe.sparse_output() if readers else output)
    if not off <= allowed:
        raise HalveError(f"the sparse model's output differs from the dense one's by {off:.2g} of its norm")
    return off
