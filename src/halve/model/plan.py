"""Which matrices of a model are prunable, as (d_out, d_in) views, and why the others are not.

Structure decides, never a list of names: a prunable matrix is the weight of a ``Linear`` or ``Conv1D``, or one
expert's slice of a fused 3-D parameter, inside a stack of blocks. Every parameter of two or more dimensions ends
up either as a matrix or as an exclusion with a reason.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from halve.errors import InputError, UnsupportedModelError, first_few
from halve.maths.pattern import Pattern
from halve.model.layers import EXPERTS_IN_ONE, Layout, is_conv1d, is_fused, is_linear, matrix_view
from halve.model.stacks import Stack, default_stacks

ROUTER = "as many outputs as experts beside it: a router"
BYPASSED = "its layer is not called where the model multiplies with it, so its inputs cannot be seen"
"""Why a linear layer stays dense that was not called, or not always."""
UNSEEN = "the model was not seen multiplying with its slices, so its inputs cannot be seen"
"""Why fused experts stay dense that went through no product that Halve knows."""
SMALLEST = 8
"""A matrix with fewer inputs or outputs gains nothing, however it is run."""
LEAST_PRUNABLE = 0.5
_WEIGHT = re.compile(r"\.weight(?=\[\d+\]$|$)")
_IN_BLOCK = re.compile(r"(?:.*?\.)??(\d{1,6})\.(.+?)(?:\[\d+\])?")
_EXPERT = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One prunable matrix of a model.

    Attributes:
        name: unique within the model: the parameter's name, and ``[e]`` for expert e of a fused parameter.
        parameter: full name of the parameter that holds it.
        block: index of its block.
        d_out: number of outputs.
        d_in: number of inputs; groups of a pattern run along it.
        layout: how it lies in the parameter.
        expert: index along the first dimension of a fused parameter, None for a plain matrix.
        routed: whether only some tokens reach it (a fused expert, or a matrix of a nested list of experts).
    """

    name: str
    parameter: str
    block: int
    d_out: int
    d_in: int
    layout: Layout = "out_in"
    expert: int | None = None
    routed: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """Return this matrix as a (d_out, d_in) view of ``parameter``, writable in place."""
        return matrix_view(parameter, self.expert, self.layout)


@dataclass(frozen=True)
class Excluded:
    """A parameter of two or more dimensions that stays dense.

    Attributes:
        name: full name of the parameter.
        shape: its shape.
        reason: why, as half a sentence.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """What will be pruned, block by block, and what will not.

    Attributes:
        blocks: name of each block, in the order in which they run.
        stacks: number of blocks in each stack, in the same order.
        matrices: all prunable matrices, in order of blocks.
        excluded: every other parameter with two or more dimensions.
    """

    blocks: tuple[str, ...]
    stacks: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    excluded: tuple[Excluded, ...]

    def of_block(self, block: int) -> tuple[Matrix, ...]:
        """Return the matrices of one block."""
        return tuple(matrix for matrix in self.matrices if matrix.block == block)

    @property
    def weights(self) -> int:
        """Number of weights in all matrices that will be pruned."""
        return sum(matrix.d_out * matrix.d_in for matrix in self.matrices)

    @property
    def dense_weights(self) -> int:
        """Number of weights in all parameters of two or more dimensions that stay dense."""
        return sum(torch.Size(entry.shape).numel() for entry in self.excluded)


def make_plan(
    model: nn.Module,
    pattern: Pattern,
    fused_layouts: Mapping[str, Layout] | None,
    skip: Sequence[str] = (),
    why_dense: Callable[[Matrix], str] | None = None,
    *,
    stacks: Sequence[Stack] | None = None,
    called: Mapping[str, int] | None = None,
    least: float = LEAST_PRUNABLE,
) -> Plan:
    """Decide for every parameter with two or more dimensions whether it is pruned.

    Args:
        model: any module with a stack of blocks.
        pattern: the sparsity pattern that has to fit each matrix.
        fused_layouts: for each fused 3-D parameter (full name) how the model multiplies with it, as observed by
            `halve.model.collect.observe`; a fused parameter without an entry stays dense, as its use was not seen.
            None leaves all of them dense.
        skip: shell-style patterns; a parameter whose name matches one stays dense.
        why_dense: says of a matrix that could be pruned why it stays dense, an empty text if it does not; all experts
            of a fused parameter go by the first. None leaves nothing dense.
        stacks: what is pruned, in the order in which it runs; None is `halve.model.stacks.default_stacks`.
        called: the weights whose inputs can be seen, by full name, with the tokens that each was multiplied with, by
            the same observation: others stay dense, but for those in lists of experts. None takes it that all can be.
        least: in every block at least this share of the matrix weights must have inputs that can be seen, 0 to 1.

    Raises:
        UnsupportedModelError: less than ``least`` of a block can be pruned, or a linear weight is not floating point.
        InputError: a pattern of ``skip`` matches no parameter, or nothing is left to prune.
    """
    chosen = default_stacks(model) if stacks is None else stacks
    owners = dict(model.named_modules(remove_duplicate=False))
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = tuple(name for stack in chosen for name in stack.members)
    unmatched = [glob for glob in skip if not any(fnmatchcase(name, glob) for name, _ in model.named_parameters())]
    if unmatched:
        raise InputError(f"skip pattern {unmatched[0]!r} matches no parameter of the model: check it against the plan")

    matrices: list[Matrix] = []
    excluded: list[Excluded] = []
    classify = _Classifier(owners, names, uses, fused_layouts, called)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        found: list[Matrix] | str = "skipped on request"
        if not any(fnmatchcase(name, glob) for glob in skip):
            found = classify(name, parameter)
        if not isinstance(found, str):
            found = _unfit(found[0], pattern, why_dense) or found
        if isinstance(found, str):
            excluded.append(Excluded(name, tuple(parameter.shape), found))
        else:
            matrices.extend(found)
    _check_share(type(model).__name__, names, matrices, excluded, least)
    if not matrices:
        reasons = ", ".join(sorted({entry.reason for entry in excluded}))
        raise InputError(f"nothing to prune: every matrix of the model is excluded ({reasons})")
    matrices.sort(key=lambda matrix: matrix.block)  # stable: the model's order within a block
    return Plan(names, tuple(len(stack.members) for stack in chosen), tuple(matrices), tuple(excluded))


def _check_share(
    model_name: str, blocks: Sequence[str], matrices: Sequence[Matrix], excluded: Sequence[Excluded], least: float
) -> None:
    """Refuse a model of which too little can be pruned, because the inputs of its weights cannot be seen."""
    seen, unseen = Counter[int](), Counter[int]()
    names: defaultdict[int, list[str]] = defaultdict(list)
    for matrix in matrices:
        seen[matrix.block] += matrix.d_out * matrix.d_in
    for entry in excluded:
        if entry.reason in {BYPASSED, UNSEEN} and (block := _block_of(entry.name, blocks)) is not None:
            unseen[block] += torch.Size(entry.shape).numel()
            names[block].append(entry.name)
    for block, lost in unseen.items():
        share = seen[block] / (seen[block] + lost)
        if share < least:
            raise UnsupportedModelError(
                f"only {share:.0%} of the matrix weights in {blocks[block]} of {model_name} could be pruned: the model "
                f"uses {first_few(names[block])} in a way in which their inputs cannot be seen. Accept a smaller share "
                f"than {least:.0%} with least_prunable (--least-prunable)"
            )


def _block_of(name: str, blocks: Iterable[str]) -> int | None:
    return next((index for index, prefix in enumerate(blocks) if name.startswith(f"{prefix}.")), None)


def _unfit(matrix: Matrix, pattern: Pattern, why_dense: Callable[[Matrix], str] | None) -> str:
    """Return why a matrix that could be pruned is not, empty if it is."""
    if not pattern.fits(matrix.d_in):
        return f"d_in = {matrix.d_in} is not divisible by {pattern.group}"
    return "" if why_dense is None else why_dense(matrix)


class _Classifier:
    """Says of a parameter which matrices it holds, or why it holds none."""

    def __init__(
        self,
        owners: Mapping[str, nn.Module],
        blocks: Sequence[str],
        uses: Mapping[int, int],
        fused_layouts: Mapping[str, Layout] | None,
        called: Mapping[str, int] | None,
    ) -> None:
        self._owners = owners
        self._blocks = blocks
        self._uses = uses
        self._fused_layouts = fused_layouts
        self._called = called
        self._counts: dict[str, set[int]] = {}
        self._routed_lists: dict[str, bool] = {}

    def __call__(self, name: str, parameter: Tensor) -> list[Matrix] | str:
        """Return the matrices that ``parameter`` holds, or the reason why it holds none."""
        block = _block_of(name, self._blocks)
        path, _, leaf = name.rpartition(".")
        owner = self._owners[path]
        if block is None:
            return "embedding, outside the blocks" if isinstance(owner, nn.Embedding) else "outside the blocks"
        if is_linear(owner) and leaf == "weight" and self._uses[id(parameter)] == 1:
            return self._linear(name, parameter, block)
        if self._uses[id(parameter)] > 1:
            return "shared with another module"
        if isinstance(owner, _ConvNd):
            return "convolution"
        if is_fused(owner, parameter):
            return _too_small(*parameter.shape[1:]) or self._fused(name, parameter, block)
        return f"not the weight of a linear layer ({type(owner).__name__}.{leaf})"

    def _linear(self, name: str, parameter: Tensor, block: int) -> list[Matrix] | str:
        path = name.rpartition(".")[0]
        if not parameter.is_floating_point():
            raise UnsupportedModelError(f"{name} is {parameter.dtype}, not floating point: prune the model unquantised")
        layout: Layout = "in_out" if is_conv1d(self._owners[path]) else "out_in"
        d_out, d_in = parameter.shape if layout == "out_in" else parameter.T.shape
        if d_out == 1:
            return "one output: a gate"
        if d_out in self._expert_counts(path, self._blocks[block]):
            return ROUTER
        if small := _too_small(d_out, d_in):
            return small
        routed = self._is_routed(path)
        if not routed and self._called is not None and name not in self._called:
            return BYPASSED
        return [Matrix(name=name, parameter=name, block=block, d_out=d_out, d_in=d_in, layout=layout, routed=routed)]

    def _fused(self, name: str, parameter: Tensor, block: int) -> list[Matrix] | str:
        if self._fused_layouts is None:
            return EXPERTS_IN_ONE
        layout = self._fused_layouts.get(name)
        return UNSEEN if layout is None else _fused_matrices(name, parameter, block, layout)

    def _expert_counts(self, path: str, block: str) -> set[int]:
        """Numbers of experts that the modules above one hold, up to its block.

        They are the lengths of their module lists, and of the fused parameters of theirs and of their children.
        """
        counts: set[int] = set()
        parent = path.rpartition(".")[0]
        while parent == block or parent.startswith(f"{block}."):
            if parent not in self._counts:
                self._counts[parent] = _experts_in(self._owners[parent])
            counts |= self._counts[parent]
            parent = parent.rpartition(".")[0]
        return counts

    def _is_routed(self, path: str) -> bool:
        """Whether only some tokens reach the layer at ``path``: a list of experts lies between it and its block.

        Where it is known what was called, that is a list of which not all members were called with as many tokens:
        blocks may have lists of other things.
        """
        parts = path.split(".")
        prefixes = tuple(f"{block}." for block in self._blocks)
        for length in range(1, len(parts)):
            outer = ".".join(parts[:length])
            members = self._owners[outer]
            if not isinstance(members, nn.ModuleList) or not outer.startswith(prefixes):
                continue
            if self._called is None:
                return len({type(member) for member in members}) == 1
            if outer not in self._routed_lists:
                self._routed_lists[outer] = _is_list_of_experts(outer, members, self._called)
            if self._routed_lists[outer]:
                return True
        return False


def _too_small(d_out: int, d_in: int) -> str:
    return f"{d_out} x {d_in} is too small ever to gain" if min(d_out, d_in) < SMALLEST else ""


def _is_list_of_experts(name: str, members: nn.ModuleList, called: Mapping[str, int]) -> bool:
    tokens: defaultdict[str, set[int]] = defaultdict(set)
    for index, member in members.named_children():
        for inner, module in member.named_modules():
            if is_linear(module):
                weight = ".".join(part for part in (name, index, inner, "weight") if part)
                tokens[inner].add(called.get(weight, 0))
    return any(len(counts) > 1 for counts in tokens.values())


def _experts_in(parent: nn.Module) -> set[int]:
    counts = {len(child) for child in parent.children() if isinstance(child, nn.ModuleList)}
    for child in (parent, *parent.children()):
        fused = (p for _, p in child.named_parameters(recurse=False) if is_fused(child, p))
        counts.update(parameter.shape[0] for parameter in fused)
    return counts


def _fused_matrices(name: str, parameter: Tensor, block: int, layout: Layout) -> list[Matrix]:
    experts, rows, columns = parameter.shape
    d_out, d_in = (rows, columns) if layout == "out_in" else (columns, rows)
    return [
        Matrix(
            name=f"{name}[{e}]",
            parameter=name,
            block=block,
            d_out=d_out,
            d_in=d_in,
            layout=layout,
            expert=e,
            routed=True,
        )
        for e in range(experts)
    ]


def set_matrix(parameter: nn.Parameter, matrix: Matrix, weight: Tensor) -> None:
    """Write ``weight`` (d_out, d_in) into its place in ``parameter``, in the parameter's dtype."""
    with torch.no_grad():
        matrix.view(parameter.data).copy_(weight)


def place_of(name: str) -> tuple[int | None, str]:
    """Return the index of a matrix's block, None if its name has none, and its kind: the name within the block.

    Args:
        name: of a `Matrix`; the kind leaves out the number of an expert.
    """
    place = _IN_BLOCK.fullmatch(_WEIGHT.sub("", name))
    return (None, name) if place is None else (int(place[1]), _EXPERT.sub("", place[2]))
