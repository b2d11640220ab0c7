"""Statistics of every matrix's inputs while a block runs: hooks on the layers, a watch on fused experts.

Matrices that receive the very same tensor (query, key and value; gate and up) share one set of statistics.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import CalibrationError, UnsupportedModelError
from halve.maths.gram import GramAccumulator, Statistics
from halve.model.blocks import replaced_forward
from halve.model.calls import Call, leaves
from halve.model.layers import Layout, geometry_of, is_convolution, is_plain_linear, patches_in_parts
from halve.model.observe import ProductWatch
from halve.model.plan import Matrix


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
        return derived or any(_in_same_place(x, state) for state in self.states)


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
        layers = [matrix for matrix in matrices if matrix.expert is None or matrix.layout == "conv"]
        self._layers: defaultdict[str, list[Matrix]] = defaultdict(list)  # several of a grouped convolution
        for matrix in layers:
            self._layers[self._local(matrix.parameter)].append(matrix)
        fused = [matrix for matrix in matrices if matrix not in layers]
        self._experts = {(self._local(matrix.parameter), matrix.expert): matrix for matrix in fused}
        self._leader: dict[str, str] = {}
        self._accumulators: dict[str, GramAccumulator] = {}
        self._inputs: list[tuple[Seen, object, str]] = []
        self._valid: Tensor | None = None
        self._memory: Memory | None = None
        self._once = None if any(matrix.layout == "conv" for matrix in layers) else once
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
            for local, matrices in self._layers.items():
                module = self._block.get_submodule(local.rpartition(".")[0])
                stack.enter_context(module.register_forward_pre_hook(self._hook(module, matrices), with_kwargs=True))
                if self._once is not None and is_plain_linear(module):
                    stack.enter_context(replaced_forward(module, self._sparing(matrices[0], module.forward)))
            if self._experts:
                fused = {name: self._block.get_parameter(name) for name, _ in self._experts}
                stack.enter_context(ProductWatch(fused, self._see_expert))
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
        plain = [matrix for matrices in self._layers.values() for matrix in matrices]
        others = [matrix.name for matrix in plain if self._calls[matrix.name] != 1]
        if self._spared and others:
            raise CalibrationError(
                f"{others[0]} was called {self._calls[others[0]]} times in one batch and once in another of the same "
                "shape: Halve cannot tell which statistics it needs; leave it dense with skip"
            )
        if not (others or self._experts or any(matrix.routed for matrix in plain)):
            self._once.add(self._shape)
        return self._spared

    def _sparing(self, matrix: Matrix, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spare(*args: Any, **kwargs: Any) -> Tensor:
            last = self._once is not None and self._shape in self._once and len(self._calls) == len(self._layers)
            if not last or self._in_dense:
                return forward(*args, **kwargs)
            self._spared = True
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            return x.new_zeros(*x.shape[:-1], matrix.d_out)

        return spare

    def _hook(
        self, module: nn.Module, matrices: Sequence[Matrix]
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before_forward(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(module, matrices, args[0] if args else next(iter(kwargs.values())))
            self._calls.update(matrix.name for matrix in matrices)

        return before_forward

    def _see(self, module: nn.Module, matrices: Sequence[Matrix], x: Tensor) -> None:
        """Take the input of a layer: of its matrix, or of all the groups of a grouped convolution."""
        if x.numel() == 0:  # an expert called without tokens
            return
        first = matrices[0]
        geometry = geometry_of(module) if is_convolution(module) else None
        twins = (name for other, how, name in self._inputs if how == geometry and other.is_still(x))
        twin = None if first.repeated or len(matrices) > 1 else next(twins, None)
        for matrix in matrices:
            leader = self._leader.setdefault(matrix.name, twin or matrix.name)
            if leader != (twin or matrix.name):
                raise CalibrationError(
                    f"{matrix.name} shared its input with {leader} in one batch and not in another: "
                    "Halve cannot tell which statistics it needs"
                )
        if twin is not None:
            return
        if not first.repeated and len(matrices) == 1:
            self._inputs.append((Seen(x), geometry, first.name))
        if self._in_dense:
            kept = x if is_convolution(module) else self._counted(x, first)
            self._dense[first.name].append(kept.clone())  # the block may write into it before it is paired
            return
        others = self._dense[first.name]
        dense = others.pop(0) if others else None
        if is_convolution(module):
            self._add_patches(module, matrices, x, dense)
        else:
            self._accumulator(first).add(self._counted(x, first), dense)

    def _add_patches(self, layer: nn.Conv2d, matrices: Sequence[Matrix], x: Tensor, dense: Tensor | None) -> None:
        """Add what the groups of a convolution are multiplied with, by parts: patches overlap."""
        if self._valid is not None:
            raise CalibrationError(
                f"the calibration data is padded, and the patches of a convolution ({matrices[0].name}) mix padding "
                "with data: pack the data without padding"
            )
        others = None if dense is None else patches_in_parts(dense, layer)
        for part in patches_in_parts(x, layer):
            paired = None if others is None else next(others)
            for group, matrix in enumerate(matrices):
                self._accumulator(matrix).add(part[group], None if paired is None else paired[group])

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
        plain = (matrix for matrices in self._layers.values() for matrix in matrices)
        return self.take().finish((*plain, *self._experts.values()))


class Seen:
    """A tensor as it was when a layer was given it: what was written into it since does not count as the same.

    Args:
        tensor: it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = tensor._version  # noqa: SLF001 - the only way to see an in-place write

    def is_still(self, other: Tensor) -> bool:
        """Whether another tensor has the same values by construction: same memory, same view, not written since."""
        return _in_same_place(self._tensor, other) and other._version == self._version  # noqa: SLF001 - see above


def _in_same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    )
