"""Statistics of every matrix's inputs while a block runs: hooks on linear layers, a watch on fused experts.

Matrices that receive the very same tensor (query, key and value; gate and up) share one set of statistics.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halve.errors import CalibrationError, UnsupportedModelError
from halve.maths.gram import GramAccumulator, Statistics
from halve.model.blocks import replaced_forward
from halve.model.calls import Call, leaves
from halve.model.layers import Layout, is_fused, is_linear, is_plain_linear, layer_matrix
from halve.model.plan import Matrix, Observed

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


class _ProductWatch(TorchFunctionMode):
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
        called[name] += x.numel() // layer_matrix(module).shape[1]
        if x.ndim > 1:
            lengths[name].add(x.shape[-2])

    with ExitStack() as stack:
        for path, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) in inside and is_fused(module, parameter):
                    fused[f"{path}.{leaf}"] = parameter
            if is_linear(module) and id(module.weight) in inside:
                name = f"{path}.weight"
                weights[layer_matrix(module).data_ptr()] = name
                stack.enter_context(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
                stack.enter_context(
                    module.register_forward_hook(lambda *_, name=name: running.remove(name), always_call=True)
                )
        stack.enter_context(_BypassWatch(weights, running, bypassed.add))
        if fused:
            stack.enter_context(_ProductWatch(fused, note_product))
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


@dataclass(frozen=True)
class Memory:
    """What a decoder's block sees of the encoder.

    Attributes:
        states: tensors among its arguments that hold the encoder's hidden states, (batch, positions, d_model).
        valid: (batch, positions) bool of the positions that count, None when all do.
        own: (batch, sequence) of the decoder's own hidden state.
    """

    states: tuple[Tensor, ...]
    valid: Tensor | None
    own: torch.Size

    @classmethod
    def of(cls, call: Call, valid: Tensor | None, hidden: Tensor) -> "Memory":
        """Find the encoder's states among a decoder block's arguments: the floating-point ones of three dimensions."""
        found = (leaf for _, leaf in leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor))
        states = tuple(leaf for leaf in found if leaf.is_floating_point() and leaf.ndim == 3)
        return cls(states, valid, hidden.shape[:-1])

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` is the encoder's states, or what the block has made of them."""
        shape = x.shape[:-1]
        derived = shape != self.own and shape in {state.shape[:-1] for state in self.states}
        return derived or any(_identical(x, state) for state in self.states)


@dataclass
class Sums:
    """What was summed of the inputs of a block's matrices, over a part of the calibration set.

    Attributes:
        leaders: for every matrix that received inputs, by name, the matrix under whose name they were summed.
        accumulators: the sums, by those names.
    """

    leaders: dict[str, str]
    accumulators: dict[str, GramAccumulator]

    def absorb(self, other: "Sums") -> None:
        """Add what was summed over the next part of the calibration set, which is used up by that.

        Raises:
            CalibrationError: two matrices shared their inputs in one part and not in the other.
        """
        merge_leaders(self.leaders, other.leaders)
        while other.accumulators:  # each is let go as it is added: both may be gigabytes
            name, accumulator = other.accumulators.popitem()
            if name in self.accumulators:
                self.accumulators[name].absorb(accumulator)
            else:
                self.accumulators[name] = accumulator

    def finish(self, matrices: Sequence[Matrix]) -> dict[str, Statistics | None]:
        """Return each matrix's statistics by name, once; matrices that share an input share the object.

        None stands for a routed matrix (an expert) that no token reached.

        Raises:
            UnsupportedModelError: a matrix that every token passes was never seen multiplying.
            CalibrationError: no usable statistics.
        """
        check_called(matrices, self.leaders)
        finished: dict[str, Statistics] = {}
        while self.accumulators:  # each is let go when its statistics are there
            name = next(iter(self.accumulators))
            finished[name] = self.accumulators.pop(name).finish(last=True)
        led = {matrix.name: self.leaders.get(matrix.name) for matrix in matrices}
        return {name: None if leader is None else finished[leader] for name, leader in led.items()}


def merge_leaders(leaders: dict[str, str], more: Mapping[str, str]) -> None:
    """Add what is known from a part of the calibration set of who shares inputs with whom (`Sums.leaders`).

    Raises:
        CalibrationError: two matrices shared their inputs in one part and not in the other.
    """
    for name, leader in more.items():
        if leaders.setdefault(name, leader) != leader:
            raise CalibrationError(
                f"{name} shared its input with {leaders[name]} in one part of the calibration data and with {leader} "
                "in another: Halve cannot tell which statistics it needs"
            )


def check_called(matrices: Sequence[Matrix], leaders: Collection[str]) -> None:
    """Refuse a block of which a matrix that every token passes received none.

    Args:
        matrices: of the block.
        leaders: names of those that received some.

    Raises:
        UnsupportedModelError: the matrix was never seen multiplying.
    """
    for matrix in matrices:
        if matrix.name not in leaders and not matrix.routed:
            raise UnsupportedModelError(
                f"{matrix.name} was never called during calibration: the model uses its weight without calling "
                "the layer, so its inputs cannot be seen; leave it dense with skip"
            )


class Collector:
    """Accumulate the statistics of a block's matrices over a calibration set.

    Args:
        block: the block, as it will be run.
        prefix: the block's full name in the model; the matrices' names start with it.
        matrices: the block's matrices.
        device: where the Gram matrices are accumulated.
        halves: whether to keep statistics of each half of the tokens apart.
        once: shapes of hidden states for which the block is known to call each of its matrices once; those for which it
            turns out to are added. In further batches of such a shape the last matrix is not multiplied with, and what
            the block returns is not to be used. None multiplies with all of them.
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        matrices: Sequence[Matrix],
        device: torch.device,
        *,
        halves: bool = False,
        once: set[torch.Size] | None = None,
    ) -> None:
        self._block = block
        self._prefix = f"{prefix}."
        self._device = device
        self._halves = halves
        self._plain = {self._local(m.parameter): m for m in matrices if m.expert is None}
        self._experts = {(self._local(m.parameter), m.expert): m for m in matrices if m.expert is not None}
        self._leader: dict[str, str] = {}
        self._accumulators: dict[str, GramAccumulator] = {}
        self._inputs: list[tuple[Tensor, str]] = []
        self._valid: Tensor | None = None
        self._memory: Memory | None = None
        self._once = once
        self._shape: torch.Size | None = None
        self._calls: Counter[str] = Counter()
        self._spared = False
        self._dense: defaultdict[str, list[Tensor]] = defaultdict(list)  # one a call of the matrix
        self._in_dense = False

    def _local(self, parameter: str) -> str:
        return parameter.removeprefix(self._prefix)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the block while this context is open; call `start_batch` before each batch."""
        with ExitStack() as stack:
            for local, matrix in self._plain.items():
                module = self._block.get_submodule(local.rpartition(".")[0])
                stack.enter_context(module.register_forward_pre_hook(self._hook(matrix), with_kwargs=True))
                if self._once is not None and is_plain_linear(module):
                    stack.enter_context(replaced_forward(module, self._sparing(matrix, module.forward)))
            if self._experts:
                fused = {name: self._block.get_parameter(name) for name, _ in self._experts}
                stack.enter_context(_ProductWatch(fused, self._see_expert))
            yield
        self._inputs.clear()
        self._dense.clear()

    def start_batch(
        self,
        valid: Tensor | None,
        memory: "Memory | None" = None,
        *,
        dense: bool = False,
        shape: torch.Size | None = None,
    ) -> None:
        """Begin a batch.

        Args:
            valid: marks its (batch, sequence) positions that count; None when all do.
            memory: what a decoder's cross-attention sees besides, whose positions count by themselves.
            dense: whether the block is about to be run on the dense model's hidden states: the inputs are then only
                kept, and paired with those of the next batch, the same tokens in the pruned model.
            shape: of the hidden state that the block is about to be given; None lets all matrices be multiplied with.
        """
        if dense or not self._in_dense:  # what the last dense batch left has been paired
            self._dense.clear()
        self._in_dense = dense
        self._inputs.clear()
        self._calls.clear()
        self._spared = False
        self._shape = shape
        self._valid = valid
        self._memory = memory

    def end_batch(self) -> bool:
        """Learn from a batch that the block has been run on, and return whether the last matrix was left out.

        Raises:
            CalibrationError: it was, and some matrix was called again, on what was left out.
        """
        if self._once is None or self._shape is None or self._in_dense:
            return False
        others = [matrix.name for matrix in self._plain.values() if self._calls[matrix.name] != 1]
        if self._spared and others:
            raise CalibrationError(
                f"{others[0]} was called {self._calls[others[0]]} times in one batch and once in another of the same "
                "shape: Halve cannot tell which statistics it needs; leave it dense with skip"
            )
        if not (others or self._experts or any(matrix.routed for matrix in self._plain.values())):
            self._once.add(self._shape)
        return self._spared

    def _sparing(self, matrix: Matrix, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spare(*args: Any, **kwargs: Any) -> Tensor:
            last = self._once is not None and self._shape in self._once and len(self._calls) == len(self._plain)
            if not last or self._in_dense:
                return forward(*args, **kwargs)
            self._spared = True
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            return x.new_zeros(*x.shape[:-1], matrix.d_out)

        return spare

    def _hook(self, matrix: Matrix) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before_forward(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(matrix, args[0] if args else next(iter(kwargs.values())))
            self._calls[matrix.name] += 1

        return before_forward

    def _see(self, matrix: Matrix, x: Tensor) -> None:
        if x.numel() == 0:  # an expert called without tokens
            return
        twin = next((name for other, name in self._inputs if not matrix.repeated and _identical(other, x)), None)
        leader = self._leader.setdefault(matrix.name, twin or matrix.name)
        if leader != (twin or matrix.name):
            raise CalibrationError(
                f"{matrix.name} shared its input with {leader} in one batch and not in another: "
                "Halve cannot tell which statistics it needs"
            )
        if twin is None:
            if not matrix.repeated:
                self._inputs.append((x, matrix.name))
            counted = self._counted(x, matrix)
            if self._in_dense:
                self._dense[matrix.name].append(counted)
            else:
                others = self._dense[matrix.name]
                self._accumulator(matrix).add(counted, others.pop(0) if others else None)

    def _see_expert(self, name: str, expert: int | None, x: Tensor, _layout: Layout) -> None:
        if self._valid is not None:
            raise CalibrationError(
                f"the calibration data is padded, and experts ({name}) receive tokens without their positions: "
                "pack the data without padding"
            )
        if x.numel() == 0:
            return
        for index in range(x.shape[0]) if expert is None else (expert,):
            matrix = self._experts[name, index]
            self._leader[matrix.name] = matrix.name
            self._accumulator(matrix).add(x[index] if expert is None else x)

    def _accumulator(self, matrix: Matrix) -> GramAccumulator:
        if matrix.name not in self._accumulators:
            self._accumulators[matrix.name] = GramAccumulator(
                matrix.d_in, device=self._device, name=matrix.name, halves=self._halves
            )
        return self._accumulators[matrix.name]

    def _counted(self, x: Tensor, matrix: Matrix) -> Tensor:
        valid = self._valid
        if self._memory is not None and (matrix.sees_memory or self._memory.holds(x)):
            valid = self._memory.valid
        if valid is None:
            return x
        if x.shape[:-1] != valid.shape:
            raise CalibrationError(
                f"the calibration data is padded, and {matrix.name} receives its input in shape {tuple(x.shape)}, "
                "where padding cannot be told from data: pack the data without padding"
            )
        return x[valid.to(x.device)]

    def take(self) -> Sums:
        """Return what was summed, once; nothing is kept."""
        taken = Sums(self._leader, self._accumulators)
        self._leader, self._accumulators = {}, {}
        return taken

    def finish(self) -> dict[str, Statistics | None]:
        """Return each matrix's statistics by name, once, as `Sums.finish`."""
        return self.take().finish((*self._plain.values(), *self._experts.values()))


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two live tensors are the same values by construction: same memory, same view, not written since."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a._version == b._version  # noqa: SLF001 - the only way to see an in-place write
    )
