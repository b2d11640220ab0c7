"""Statistics of every matrix's inputs while a block runs: hooks on linear layers, a watch on fused experts.

Matrices that receive the very same tensor (query, key and value; gate and up) share one set of statistics.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halve.errors import CalibrationError, UnsupportedModelError
from halve.maths.gram import GramAccumulator, Statistics
from halve.model.layers import Layout, Matrix, is_fused, is_linear

_LINEAR = {torch.nn.functional.linear}
_MATMUL = {torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm}

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
        found = self._slices.get((weight.data_ptr(), weight.shape))
        if found is None:
            return
        # x @ W uses W as (d_in, d_out) unless W itself is a transposed view of how it is stored.
        stored_transposed = weight.ndim >= 2 and not weight.is_contiguous() and weight.mT.is_contiguous()
        layout: Layout = "out_in" if transposed != stored_transposed else "in_out"
        self._seen(*found, x, layout)


@dataclass(frozen=True)
class Observed:
    """How a model used its weights in one forward pass.

    Attributes:
        layouts: full name of each fused 3-D parameter seen in a product, and how it was multiplied.
        called: full names of the weights of linear layers that were called.
    """

    layouts: dict[str, Layout]
    called: frozenset[str]


def observe(model: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], None]) -> Observed:
    """Find out how the model multiplies with the weights inside its blocks.

    Args:
        model: the model.
        blocks: its blocks.
        run: runs a short batch through the model, experts multiplied slice by slice
            (`halve.model.blocks.eager_experts`).
    """
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    fused: dict[str, Tensor] = {}
    layouts: dict[str, Layout] = {}
    called: set[str] = set()

    def note_product(name: str, _expert: int | None, _x: Tensor, layout: Layout) -> None:
        layouts[name] = layout

    with ExitStack() as stack:
        for path, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) in inside and is_fused(module, parameter):
                    fused[f"{path}.{leaf}"] = parameter
            if is_linear(module) and id(module.weight) in inside:
                stack.enter_context(
                    module.register_forward_pre_hook(lambda _module, _args, name=path: called.add(f"{name}.weight"))
                )
        if fused:
            stack.enter_context(_ProductWatch(fused, note_product))
        run()
    return Observed(layouts, frozenset(called))


class Collector:
    """Accumulate the statistics of a block's matrices over a calibration set.

    Args:
        block: the block, as it will be run.
        prefix: the block's full name in the model; the matrices' names start with it.
        matrices: the block's matrices.
        device: where the Gram matrices are accumulated.
        halves: whether to keep statistics of each half of the tokens apart.
    """

    def __init__(
        self, block: nn.Module, prefix: str, matrices: Sequence[Matrix], device: torch.device, *, halves: bool = False
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
        self._dense: dict[str, Tensor] = {}
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
            if self._experts:
                fused = {name: self._block.get_parameter(name) for name, _ in self._experts}
                stack.enter_context(_ProductWatch(fused, self._see_expert))
            yield
        self._inputs.clear()
        self._dense.clear()

    def start_batch(self, valid: Tensor | None, *, dense: bool = False) -> None:
        """Begin a batch.

        Args:
            valid: marks its (batch, sequence) positions that count; None when all do.
            dense: whether the block is about to be run on the dense model's hidden states: the inputs are then only
                kept, and paired with those of the next batch, the same tokens in the pruned model.
        """
        if dense or not self._in_dense:  # what the last dense batch left has been paired
            self._dense.clear()
        self._in_dense = dense
        self._inputs.clear()
        self._valid = valid

    def _hook(self, matrix: Matrix) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before_forward(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(matrix, args[0] if args else next(iter(kwargs.values())))

        return before_forward

    def _see(self, matrix: Matrix, x: Tensor) -> None:
        if x.numel() == 0:  # an expert called without tokens
            return
        twin = next((name for other, name in self._inputs if _identical(other, x)), None)
        leader = self._leader.setdefault(matrix.name, twin or matrix.name)
        if leader != (twin or matrix.name):
            raise CalibrationError(
                f"{matrix.name} shared its input with {leader} in one batch and not in another: "
                "Halve cannot tell which statistics it needs"
            )
        if twin is None:
            self._inputs.append((x, matrix.name))
            counted = self._counted(x, matrix)
            if self._in_dense:
                self._dense[matrix.name] = counted
            else:
                self._accumulator(matrix).add(counted, self._dense.get(matrix.name))

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
        if self._valid is None:
            return x
        if x.shape[:-1] != self._valid.shape:
            raise CalibrationError(
                f"the calibration data is padded, and {matrix.name} receives its input in shape {tuple(x.shape)}, "
                "where padding cannot be told from data: pack the data without padding"
            )
        return x[self._valid.to(x.device)]

    def finish(self) -> dict[str, Statistics | None]:
        """Return each matrix's statistics by name; matrices that share an input share the object.

        None stands for a routed matrix (an expert) that no token reached.

        Raises:
            UnsupportedModelError: a matrix that every token passes was never seen multiplying.
            CalibrationError: no usable statistics.
        """
        finished = {name: accumulator.finish() for name, accumulator in self._accumulators.items()}
        statistics: dict[str, Statistics | None] = {}
        for matrix in (*self._plain.values(), *self._experts.values()):
            leader = self._leader.get(matrix.name)
            if leader is None and not matrix.routed:
                raise UnsupportedModelError(
                    f"{matrix.name} was never called during calibration: the model uses its weight without calling "
                    "the layer, so its inputs cannot be seen; leave it dense with skip"
                )
            statistics[matrix.name] = None if leader is None else finished[leader]
        return statistics


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two live tensors are the same values by construction: same memory, same view, not written since."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a._version == b._version  # noqa: SLF001 - the only way to see an in-place write
    )
