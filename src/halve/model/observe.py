"""How a model multiplies with its weights, watched on short samples: by their layers, or past them.

Hooks see the layers; a watch on PyTorch's functions sees the slices of fused experts, and weights whose layer does not
run.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halve.model.calls import leaves
from halve.model.layers import Layout, holds_matrix, is_fused, positions_of
from halve.model.plan import Observed

_LINEAR = {torch.nn.functional.linear}
_MATMUL = {torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm}

_ONLY_LOOKING = {
    "__get__",
    "size",
    "dim",
    "numel",
    "stride",
    "is_floating_point",
    "data_ptr",
    "element_size",
    "__len__",
}
"""Names of functions that compute nothing from the values of a tensor."""

Key = tuple[int, torch.Size]
"""Address and shape of a weight as the model multiplies with it."""


class ProductWatch(TorchFunctionMode):
    """Report every product with a registered slice of a fused parameter, as ``seen(name, expert, input, layout)``.

    ``expert`` is None when all experts are multiplied at once, (E, tokens, d_in) by (E, d_in, d_out).
    """

    def __init__(self, fused: Mapping[str, Tensor], seen: Callable[[str, int | None, Tensor, Layout], None]) -> None:
        super().__init__()
        self._seen = seen
        self._slices: dict[Key, tuple[str, int | None]] = {}
        for name, parameter in fused.items():
            for part, expert in ((parameter, None), *((part, e) for e, part in enumerate(parameter))):
                self._slices[part.data_ptr(), part.shape] = (name, expert)
                self._slices[part.data_ptr(), part.mT.shape] = (name, expert)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _LINEAR or func in _MATMUL:
            operands = [*args, *(kwargs or {}).values()]
            if len(operands) >= 2 and isinstance(operands[1], Tensor):
                self._look(operands[0], operands[1], transposed=func in _LINEAR)
        return func(*args, **(kwargs or {}))

    def _look(self, x: Tensor, weight: Tensor, *, transposed: bool) -> None:
        address = _address(weight)
        found = None if address is None else self._slices.get((address, weight.shape))
        if found is None:
            return
        # x @ W uses W as (d_in, d_out) unless W itself is a transposed view of how it is stored.
        stored_transposed = weight.ndim >= 2 and not weight.is_contiguous() and weight.mT.is_contiguous()
        layout: Layout = "out_in" if transposed != stored_transposed else "in_out"
        self._seen(*found, x, layout)


def _address(tensor: Tensor) -> int | None:
    """Return where a tensor's values lie; None where it has none, as while functions are mapped."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


class _BypassWatch(TorchFunctionMode):
    """Report every use of a weight whose layer is not running."""

    def __init__(
        self, weights: Mapping[int | None, str], running: Collection[str], seen: Callable[[str], None]
    ) -> None:
        super().__init__()
        self._weights = weights
        self._running = running
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") not in _ONLY_LOOKING:
            for _, operand in leaves((tuple(args), dict(kwargs or {}))):
                name = self._weights.get(_address(operand)) if isinstance(operand, Tensor) else None
                if name is not None and name not in self._running:
                    self._seen(name)
        return func(*args, **(kwargs or {}))


def observe(model: nn.Module, blocks: Sequence[nn.Module], runs: Sequence[Callable[[], None]]) -> Observed:
    """Find out how the model multiplies with the weights inside its blocks.

    Args:
        model: the model.
        blocks: its blocks.
        runs: each runs a short batch through the model, experts multiplied slice by slice
            (`halve.model.blocks.eager_experts`).
    """
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    fused: dict[str, Tensor] = {}
    layouts: dict[str, Layout] = {}
    called: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    repeated: set[str] = set()
    lengths: defaultdict[str, set[int]] = defaultdict(set)
    bypassed: set[str] = set()
    running: list[str] = []
    weights: dict[int | None, str] = {}

    def note_product(name: str, _expert: int | None, _x: Tensor, layout: Layout) -> None:
        layouts[name] = layout

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(name)
        x = args[0] if args else next(iter(kwargs.values()))
        calls[name] += 1
        called[name] += positions_of(module, x)
        if x.ndim > 1:
            lengths[name].add(x.shape[-2])

    with ExitStack() as stack:
        for path, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) in inside and is_fused(module, parameter):
                    fused[f"{path}.{leaf}"] = parameter
            if holds_matrix(module) and id(module.weight) in inside:
                name = f"{path}.weight"
                weights[module.weight.data_ptr()] = name
                stack.enter_context(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
                stack.enter_context(
                    module.register_forward_hook(lambda *_, name=name: running.remove(name), always_call=True)
                )
        stack.enter_context(_BypassWatch(weights, running, bypassed.add))
        if fused:
            stack.enter_context(ProductWatch(fused, note_product))
        for run in runs:
            calls.clear()
            run()
            repeated |= {name for name, count in calls.items() if count > 1}
    seen = {name: tokens for name, tokens in called.items() if name not in bypassed}
    return Observed(
        layouts=layouts,
        called=seen,
        repeated=frozenset(repeated),
        bypassed=frozenset(bypassed),
        lengths={name: frozenset(sizes) for name, sizes in lengths.items()},
    )
