"""Swap the pruned linear layers of a model for sparse ones, where they are faster, and check that nothing else changed.

On the CPU they become `SparseLinear`, on a GPU `SemiStructuredLinear`. Every swapped layer's product is held to the
dense one before the dense weight is let go, and the model's output to what it was; if either fails, everything is put
back.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halve.device import evaluation_mode, model_device
from halve.errors import HalveError, InputError
from halve.generation import text_config
from halve.layers import EXPERTS_IN_ONE, is_fused, is_linear, layer_matrix
from halve.pattern import Pattern
from halve.runtime import speed
from halve.runtime.linear import SparseLinear
from halve.runtime.semi_structured import SemiStructuredLinear
from halve.runtime.speed import Speed

_PROBE_TOKENS = 16
_PRODUCT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Relative error of one product that rounding explains, by dtype."""
_OUTPUT = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.2}
"""Relative difference of a whole model's output that rounding explains: it grows from layer to layer."""

Sparse = SparseLinear | SemiStructuredLinear


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did to a model.

    Attributes:
        swapped: names of the layers that are sparse now.
        left_dense: names of the other layers, and why each is dense.
        speeds: what was measured, one a shape; empty if nothing was to be.
        bytes_before: of the weights of the swapped layers.
        bytes_after: of the same, packed.
        difference: relative difference of the model's output on the probe, ``|after - before| / |before|``.
        kernel: what multiplies now.
    """

    swapped: tuple[str, ...]
    left_dense: Mapping[str, str] = field(repr=False)
    speeds: tuple[Speed, ...] = field(repr=False)
    bytes_before: int
    bytes_after: int
    difference: float
    kernel: str


def accelerate(
    model: nn.Module,
    *,
    pattern: str | Pattern = "2:4",
    batch: int = 1,
    only_where_faster: float = 1.0,
    probe: Tensor | Mapping[str, Any] | None = None,
) -> Acceleration:
    """Swap, in place, the linear layers of a model that are in a pattern and whose products are measured to be faster.

    For inference: the weights get no gradient any more. The model's ``state_dict`` stays that of the dense model.

    Args:
        model: in memory, on the CPU or a GPU.
        pattern: what its pruned layers have; on a GPU only 2:4.
        batch: rows of a product that speed is measured at, and that a GPU's algorithm is searched for: sequences
            decoded at once.
        only_where_faster: layers stay dense whose shape is not this many times as fast on this machine; 0 swaps all of
            them, and measures nothing.
        probe: keyword arguments of the model's call, or its ``input_ids``, to compare outputs on; None takes 16 tokens.

    Returns:
        Acceleration: what was swapped, what was not and why.

    Raises:
        InputError: no layer has the pattern, none of them is faster, an argument cannot be used, or the model cannot
            be called with the probe; the model is as it was.
        HalveError: a sparse product, or the model's output, was wrong; the model is as it was.
    """
    pattern = Pattern.parse(pattern)
    if batch < 1 or not 0 <= only_where_faster < float("inf"):
        raise InputError(f"batch is {batch} and only_where_faster {only_where_faster}: give at least 1, and at least 0")
    chosen, left = _candidates(model, pattern)
    if not chosen:
        raise InputError(
            f"no linear layer of this {type(model).__name__} can run sparse at {pattern}: {_most_common(left)}; "
            "prune it first, or give its pattern"
        )
    speeds = _keep_faster(chosen, left, pattern, batch, only_where_faster) if only_where_faster > 0 else ()
    before = _output(model, probe)
    kernel = speed.describe(layer_matrix(next(iter(chosen.values()))).device)
    bytes_before = sum(layer_matrix(layer).nbytes for layer in chosen.values())
    swapped: dict[str, Sparse] = {}
    try:
        swapped.update(_swap(model, chosen, pattern, batch))
        difference = _difference(before, _output(model, probe))
        _check_output(difference, before.dtype)
    except BaseException:
        for name in swapped:
            restore(model, name)
        raise
    bytes_after = sum(sparse.nbytes for sparse in swapped.values())
    return Acceleration(tuple(swapped), left, speeds, bytes_before, bytes_after, difference, kernel)


def restore(model: nn.Module, name: str) -> None:
    """Put a plain layer, with the same bits, where a sparse one is.

    Raises:
        InputError: there is no sparse layer of that name.
    """
    sparse = dict(model.named_modules()).get(name)
    if not isinstance(sparse, Sparse):
        raise InputError(f"{name} is no sparse layer of this model")
    _replace(model, sparse, sparse.plain())


def _candidates(model: nn.Module, pattern: Pattern) -> tuple[dict[str, nn.Module], dict[str, str]]:
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
        if reason := _why_dense(module, pattern, shared=owners[id(module.weight)] > 1):
            left[name] = reason
        else:
            chosen[name] = module
    return chosen, left


def _why_dense(layer: nn.Module, pattern: Pattern, *, shared: bool) -> str:
    """Return why a layer cannot run sparse, empty if it can."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - is_linear
    if type(layer) not in {nn.Linear, Conv1D}:
        return f"a {type(layer).__name__}, which may use its weight in its own way"
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):  # noqa: SLF001 - no public way
        return "hooks are on it, which another layer would not have"
    if shared:
        return "its weight is shared with another module"
    matrix = layer_matrix(layer)
    if not pattern.fits(matrix.shape[1]):
        return f"d_in = {matrix.shape[1]} is not divisible by {pattern.group}"
    try:
        speed.check_measurable(pattern, weight.dtype, weight.device)
    except InputError as error:
        return str(error)
    return "" if pattern.satisfied_by(matrix) else f"not at {pattern}"


def _most_common(reasons: Mapping[str, str]) -> str:
    return Counter(reasons.values()).most_common(1)[0][0] if reasons else "it has no linear layers"


_Key = tuple[torch.Size, torch.dtype, torch.device]
"""What the time of a product depends on."""


def _key(layer: nn.Module) -> _Key:
    matrix = layer_matrix(layer)
    return matrix.shape, matrix.dtype, matrix.device


def _keep_faster(
    chosen: dict[str, nn.Module], left: dict[str, str], pattern: Pattern, batch: int, factor: float
) -> tuple[Speed, ...]:
    """Measure every shape, and move the layers that are not fast enough from ``chosen`` to ``left``, with the reason.

    Raises:
        InputError: none is left.
    """
    speeds: dict[_Key, Speed] = {}
    for key in dict.fromkeys(_key(layer) for layer in chosen.values()):
        (d_out, d_in), dtype, device = key
        speeds[key] = speed.measure(d_out, d_in, [batch], pattern=pattern, dtype=dtype, device=device)[0]
    for name, layer in list(chosen.items()):
        ratio = speeds[_key(layer)].ratio
        if ratio < factor:
            left[name] = f"{ratio:.2f} times as fast as dense at batch {batch}, less than {factor:g}"
            del chosen[name]
    if not chosen:
        best = max(row.ratio for row in speeds.values())
        raise InputError(
            f"no layer is {factor:g} times as fast at batch {batch} here, the best {best:.2f} times: the model stays "
            "dense; see halve plan for other batches, or give only_where_faster=0 to save memory alone"
        )
    return tuple(speeds.values())


def _swap(model: nn.Module, chosen: dict[str, nn.Module], pattern: Pattern, batch: int) -> Iterator[tuple[str, Sparse]]:
    """Take layers out of ``chosen`` and replace them one by one; each dense weight goes before the next is packed."""
    while chosen:
        name = next(iter(chosen))
        layer = chosen.pop(name)
        sparse = _sparse(layer, pattern, batch)
        _check_product(name, layer, sparse)
        _replace(model, layer, sparse)
        del layer
        yield name, sparse


def _sparse(layer: nn.Module, pattern: Pattern, batch: int) -> Sparse:
    if _is_on_gpu(layer):
        return SemiStructuredLinear.of(layer, batch)
    return SparseLinear.of(layer, pattern)


def _is_on_gpu(layer: nn.Module) -> bool:
    return layer_matrix(layer).device.type == "cuda"


def _check_product(name: str, layer: nn.Module, sparse: Sparse) -> None:
    matrix = layer_matrix(layer)
    x = torch.randn(2, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    with torch.no_grad():
        error = _difference(layer(x), sparse(x))
    if not error <= _PRODUCT[matrix.dtype]:
        raise HalveError(f"the sparse product of {name} is off by {error:.2g} of its norm: nothing was swapped")


def _check_output(difference: float, dtype: torch.dtype) -> None:
    if not difference <= _OUTPUT[dtype]:
        raise HalveError(f"the sparse model's output differs from the dense one's by {difference:.2g} of its norm")


def _difference(expected: Tensor, got: Tensor) -> float:
    """Return ``|got - expected| / |expected|``."""
    return float((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


def _output(model: nn.Module, probe: Tensor | Mapping[str, Any] | None) -> Tensor:
    """Call the model and return its logits, or whatever tensor it returns first."""
    if probe is None:
        vocabulary = getattr(text_config(model), "vocab_size", None)
        if vocabulary is None:
            raise InputError(f"{type(model).__name__} says of no vocabulary: give a probe, the arguments of its call")
        probe = (torch.arange(_PROBE_TOKENS, device=model_device(model)) % vocabulary).unsqueeze(0)
    try:
        with evaluation_mode(model):
            output = model(**probe) if isinstance(probe, Mapping) else model(probe)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise InputError(f"{type(model).__name__} cannot be called with the probe ({error}): give another") from error
    found = getattr(output, "logits", None)
    if found is None:
        found = output if isinstance(output, Tensor) else output[0]
    return found


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module wherever another is."""
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # noqa: SLF001 - named_children names one of several alike
            if child is old:
                setattr(parent, name, new)
