"""Judge what became of a pruned model's weights: the masks, what had to stay dense, and what was read from disk.

Masks of the method wanda are computed once more from the inputs that matrices get in full forward passes
(`sweep_oracle.py`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sweep_oracle import Findings, Reference, forward

MASK_TOLERANCE = 5e-3
"""Share of groups that may be chosen otherwise, twice as many in one matrix; what float32 cannot tell apart does not
count at all."""
_TIE = 1e-3


class _Products(TorchFunctionMode):
    """Sum up the squares of what is multiplied with given parameters, or with the slices of three-dimensional ones.

    Args:
        matrices: the parameters by name.
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._at = {parameter.untyped_storage().data_ptr(): (name, parameter) for name, parameter in matrices.items()}
        self.squares: dict[tuple[str, int | None], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "conv2d":
            self._convolve(*args, **(kwargs or {}))
        if name in {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "__rmatmul__"}:
            operands = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            for position, weight in enumerate(operands):
                found = self._at.get(weight.untyped_storage().data_ptr())
                if found is not None and position > 0 and weight.ndim >= 2:
                    self._note(*found, operands[position - 1], weight)
        return func(*args, **(kwargs or {}))

    def _convolve(
        self, x: Tensor, weight: Tensor, _bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> None:
        """Note what a convolution multiplies with: for every tap the channels, as ``unfold`` gives them."""
        found = self._at.get(weight.untyped_storage().data_ptr())
        if found is None:
            return
        if padding in {"same", "valid"}:
            whole = [apart * (size - 1) for apart, size in zip(dilation, weight.shape[2:], strict=True)]
            whole = whole if padding == "same" else [0, 0]
            x = nn.functional.pad(x, [side for size in whole[::-1] for side in (size // 2, size - size // 2)])
            padding = 0
        for group, part in enumerate(x.double().chunk(groups, 1)):
            columns = nn.functional.unfold(part, weight.shape[2:], dilation, padding, stride)
            taps = columns.reshape(len(x), part.shape[1], -1, columns.shape[-1]).transpose(1, 2).flatten(1, 2)
            self._add(found[0], group if groups > 1 else None, taps.mT)

    def _note(self, name: str, parameter: Tensor, x: Tensor, weight: Tensor) -> None:
        if parameter.ndim == 2:
            self._add(name, None, x)
        elif weight.ndim == 2:
            self._add(name, weight.storage_offset() // parameter[0].numel(), x)
        else:
            for expert in range(parameter.shape[0]):
                self._add(name, expert, x[expert])

    def _add(self, name: str, expert: int | None, x: Tensor) -> None:
        total = x.detach().double().reshape(-1, x.shape[-1]).square().sum(0)
        key = (name, expert)
        self.squares[key] = self.squares[key] + total if key in self.squares else total


@dataclass(frozen=True)
class Matrix:
    """A pruned matrix, as the public report of a run names it.

    Attributes:
        parameter: name of the parameter that holds it.
        expert: its index there, None for a parameter of two dimensions.
        transposed: whether it is stored as (d_in, d_out).
        groups: into how many matrices a convolution's parameter, of four dimensions, is cut.
    """

    parameter: str
    expert: int | None
    transposed: bool
    groups: int = 1

    def of(self, parameter: Tensor) -> Tensor:
        """Return it as (d_out, d_in), d_in of a convolution tap by tap."""
        if parameter.ndim == 4:
            stored = parameter.detach().chunk(self.groups)[self.expert or 0]
            return torch.stack(
                [stored[:, :, i, j] for i in range(stored.shape[2]) for j in range(stored.shape[3])], 1
            ).flatten(1)
        stored = parameter.detach() if self.expert is None else parameter.detach()[self.expert]
        return stored.T if self.transposed else stored

    @classmethod
    def reported(cls, matrix: Any, model: nn.Module) -> "Matrix":
        """Return what a run's report says of a matrix."""
        groups = model.get_parameter(matrix.parameter).shape[0] // matrix.shape[0] if matrix.layout == "conv" else 1
        return cls(matrix.parameter, matrix.expert, matrix.layout == "in_out", groups)


def judge_masks(matrices: Sequence[Matrix], reference: Reference, blocks: Iterable[str]) -> Findings:
    """Choose once more what wanda keeps of 2:4 groups, |w| · ‖x‖ from full forward passes, and compare.

    Args:
        matrices: what was pruned.
        reference: the models.
        blocks: names of the blocks.
    """
    findings = Findings()
    groups = differing = unseen = 0
    worst = (0.0, "")
    for block in blocks:
        inside = [matrix for matrix in matrices if matrix.parameter.startswith(f"{block}.")]
        if not inside:
            continue
        squares = _input_squares(reference, block, {matrix.parameter for matrix in inside})
        for matrix in inside:
            total = squares.get((matrix.parameter, matrix.expert))
            before = matrix.of(reference.dense.get_parameter(matrix.parameter)).double()
            after = matrix.of(reference.pruned.get_parameter(matrix.parameter)).double()
            if bool(((after != 0) & (after != before)).any()):
                findings.wrong.append(f"{matrix.parameter}: a weight that was kept has changed")
            if total is None or total.shape[0] != before.shape[1]:
                unseen += matrix.expert is None
                continue
            count, wrong = _compare_groups(before, after, total.sqrt())
            groups, differing = groups + count, differing + wrong
            worst = max(worst, (wrong / max(count, 1), f"{matrix.parameter}"))
    if groups and (differing / groups > MASK_TOLERANCE or worst[0] > 2 * MASK_TOLERANCE):
        findings.wrong.append(
            f"{100 * differing / groups:.2g} % of wanda's groups differ, most in {worst[1]} ({100 * worst[0]:.2g} %)"
        )
    findings.facts.update(groups=groups, groups_differ=differing, matrices_unseen=unseen)
    return findings


def _input_squares(reference: Reference, block: str, names: set[str]) -> dict[tuple[str, int | None], Tensor]:
    with reference.with_dense(block) as model:
        products = _Products({name: model.get_parameter(name).data for name in names})
        with eager_experts(model):
            for batch in reference.batches:
                with products:
                    forward(model, batch)
    return products.squares


@contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Have transformers multiply experts one by one, so that each one's inputs can be seen."""
    if not hasattr(model, "get_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    if all(value is None for value in before.values()):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _compare_groups(before: Tensor, after: Tensor, norms: Tensor) -> tuple[int, int]:
    """Return the number of groups of four, and of those whose kept pair is not the one with the largest scores."""
    scores = (before.abs() * norms).reshape(before.shape[0], -1, 4)
    kept = (after != 0).reshape(after.shape[0], -1, 4)
    ranked = scores.sort(dim=-1, descending=True).values
    threshold = ranked[..., 1:2]
    tie = (ranked[..., 1] - ranked[..., 2]) <= _TIE * ranked[..., 1]
    expected = scores >= threshold
    wrong = (kept != expected).any(-1) & ~tie
    return wrong.numel(), int(wrong.sum())


def judge_routers(matrices: Sequence[Matrix], pruned: nn.Module, experts: int) -> Findings:
    """A matrix with as many outputs as there are experts chooses among them, and must have stayed dense."""
    findings = Findings()
    for matrix in matrices:
        if matrix.of(pruned.get_parameter(matrix.parameter)).shape[0] == experts:
            findings.wrong.append(f"{matrix.parameter} chooses among experts, and was pruned")
    return findings


def judge_untouched(dense: nn.Module, found: nn.Module, pruned: nn.Module, changed: Iterable[str]) -> Findings:
    """Hold a model that was read from disk to the one in memory, bit for bit.

    Args:
        dense: the model before pruning.
        found: the one that plain transformers has read.
        pruned: the one that was pruned in memory, with the same method.
        changed: the parameters that pruning may have changed.
    """
    findings = Findings()
    allowed = set(changed)
    expected = {**dense.state_dict(), **{k: v for k, v in pruned.state_dict().items() if k in allowed}}
    got = found.state_dict()
    findings.wrong += [f"{name} is not in what was read" for name in expected.keys() - got.keys()][:1]
    for name, tensor in expected.items():
        other = got.get(name)
        if other is not None and not same_bits(tensor, other):
            what = "differs from the model pruned in memory" if name in allowed else "was not pruned, and has changed"
            findings.wrong.append(f"{name} {what}")
            break
    return findings


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = (a.detach().contiguous().reshape(-1), b.detach().contiguous().reshape(-1))
    return torch.equal(*(each.view(torch.uint8) if each.numel() else each for each in flat))
