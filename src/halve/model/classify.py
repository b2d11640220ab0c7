"""Which matrices of a model are prunable, and why the others are not.

Structure decides, never a list of names: a prunable matrix is the weight of a ``Linear``, ``Conv1D`` or ``Conv2d``, or
one expert's slice of a fused 3-D parameter, inside a stack of blocks. Every parameter of two or more dimensions ends
up either as a matrix or as an exclusion with a reason.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from halve.errors import InputError, UnsupportedModelError, first_few
from halve.maths.pattern import Pattern
from halve.model.layers import EXPERTS_IN_ONE, Layout, channels_of, is_conv1d, is_convolution, is_fused, is_linear
from halve.model.plan import Excluded, Matrix, Observed, Plan
from halve.model.stacks import Stack, default_stacks, find_stacks

ROUTER = "as many outputs as experts beside it: a router"
BYPASSED = "the model multiplies with it without calling its layer, so its inputs cannot be seen"
NOT_CALLED = "its layer did not run on the calibration data, so its inputs cannot be seen"
"""Why a linear layer stays dense whose inputs are not seen, or not all."""
UNSEEN = "the model was not seen multiplying with its slices, so its inputs cannot be seen"
"""Why fused experts stay dense that went through no product that Halve knows."""
SMALLEST = 8
"""A matrix with fewer inputs or outputs gains nothing, however it is run."""
LEAST_PRUNABLE = 0.5


def make_plan(
    model: nn.Module,
    pattern: Pattern,
    seen: Observed | None = None,
    skip: Sequence[str] = (),
    why_dense: Callable[[Matrix], str] | None = None,
    *,
    stacks: Sequence[Stack] | None = None,
    together: Collection[Sequence[str]] = (),
    least: float = LEAST_PRUNABLE,
) -> Plan:
    """Decide for every parameter with two or more dimensions whether it is pruned.

    Args:
        model: any module with a stack of blocks.
        pattern: the sparsity pattern that has to fit each matrix.
        seen: how the model uses its weights (`halve.model.observe.observe`): weights whose inputs cannot be seen stay
            dense, but for layers in lists of experts. None, where nothing was run, leaves fused experts dense, and
            takes it that the inputs of all others can be seen.
        skip: shell-style patterns; a parameter whose name matches one stays dense.
        why_dense: says of a matrix that could be pruned why it stays dense, an empty text if it does not; all experts
            of a fused parameter go by the first. None leaves nothing dense.
        stacks: what is pruned, in the order in which it runs; None is `halve.model.stacks.default_stacks`.
        together: names of parameters that are stored together, and pruned all or none.
        least: in every block at least this share of the matrix weights must have inputs that can be seen, 0 to 1.

    Raises:
        UnsupportedModelError: less than ``least`` of a block can be pruned, or a linear weight is not floating point.
        InputError: a pattern of ``skip`` matches no parameter, nothing is left to prune, or a part of what is stored
            in one tensor.
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
    shared = {name for group in together for name in group}
    others = [stack for stack in find_stacks(model) if stack.name not in {each.name for each in chosen}]
    classify = _Classifier(owners, names, uses, seen, shared, others)
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
    _check_whole(together, {matrix.parameter for matrix in matrices}, excluded)
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
    reasons: dict[int, str] = {}
    for matrix in matrices:
        seen[matrix.block] += matrix.d_out * matrix.d_in
    for entry in excluded:
        if entry.reason in {BYPASSED, NOT_CALLED, UNSEEN} and (block := _block_of(entry.name, blocks)) is not None:
            unseen[block] += torch.Size(entry.shape).numel()
            names[block].append(entry.name)
            reasons[block] = entry.reason.partition(", so ")[0]
    for block, lost in unseen.items():
        share = seen[block] / (seen[block] + lost)
        if share < least:
            raise UnsupportedModelError(
                f"only {share:.0%} of the matrix weights in {blocks[block]} of {model_name} could be pruned, since the "
                f"inputs of {first_few(names[block])} cannot be seen ({reasons[block]}). Accept a smaller share than "
                f"{least:.0%} with least_prunable (--least-prunable)"
            )


def _check_whole(together: Collection[Sequence[str]], pruned: Collection[str], excluded: Sequence[Excluded]) -> None:
    """Refuse to prune a part of a tensor."""
    reasons = {entry.name: entry.reason for entry in excluded}
    for group in together:
        dense = next((name for name in group if name in reasons), None)
        other = next((name for name in group if name in pruned), None)
        if dense is not None and other is not None:
            raise InputError(
                f"{dense} stays dense ({reasons[dense]}) and is stored together with {other}, which would be "
                "pruned: leave both dense (skip), or neither"
            )


def _block_of(name: str, blocks: Iterable[str]) -> int | None:
    return next((index for index, prefix in enumerate(blocks) if name.startswith(f"{prefix}.")), None)


def _unfit(matrix: Matrix, pattern: Pattern, why_dense: Callable[[Matrix], str] | None) -> str:
    """Return why a matrix that could be pruned is not, empty if it is."""
    channels = matrix.d_in // matrix.taps
    if not pattern.fits(channels):
        what = "d_in" if matrix.layout != "conv" else "the number of input channels that an output sees"
        return f"{what} = {channels} is not divisible by {pattern.group}"
    return "" if why_dense is None else why_dense(matrix)


class _Classifier:
    """Says of a parameter which matrices it holds, or why it holds none."""

    def __init__(
        self,
        owners: Mapping[str, nn.Module],
        blocks: Sequence[str],
        uses: Mapping[int, int],
        seen: Observed | None,
        stored_with_others: Collection[str],
        others: Sequence[Stack],
    ) -> None:
        self._others = [(f"{stack.name}.", stack.tower) for stack in others]
        self._owners = owners
        self._blocks = blocks
        self._uses = uses
        self._seen = seen
        self._stored_with_others = stored_with_others
        self._counts: dict[str, set[int]] = {}
        self._routed_lists: dict[str, bool] = {}

    def __call__(self, name: str, parameter: Tensor) -> list[Matrix] | str:
        """Return the matrices that ``parameter`` holds, or the reason why it holds none."""
        block = _block_of(name, self._blocks)
        path, _, leaf = name.rpartition(".")
        owner = self._owners[path]
        if block is None:
            return self._outside(name, owner)
        if is_linear(owner) and leaf == "weight" and self._uses[id(parameter)] == 1:
            return self._linear(name, parameter, block)
        if self._uses[id(parameter)] > 1:
            return "shared with another module"
        if isinstance(owner, _ConvNd):
            return self._convolution(name, owner, parameter, block)
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
        small = _too_small(d_out, d_in)
        if small and name not in self._stored_with_others:
            return small
        routed = self._is_routed(path)
        if unseen := self._unseen(name, routed=routed):
            return unseen
        seen = self._seen
        return [
            Matrix(
                name=name,
                parameter=name,
                block=block,
                d_out=d_out,
                d_in=d_in,
                layout=layout,
                routed=routed,
                repeated=seen is not None and name in seen.repeated,
                sees_memory=seen is not None and name in seen.memory,
            )
        ]

    def _unseen(self, name: str, *, routed: bool) -> str:
        """Return why the inputs of a layer cannot be seen, empty if they can."""
        if self._seen is None:
            return ""
        if name in self._seen.bypassed:
            return BYPASSED
        return "" if routed or name in self._seen.called else NOT_CALLED

    def _convolution(self, name: str, owner: _ConvNd, parameter: Tensor, block: int) -> list[Matrix] | str:
        """Return the matrices of a convolution, one for each of its groups."""
        kind = type(owner).__name__
        if not is_convolution(owner):
            own_code = isinstance(owner, nn.Conv2d)
            return f"convolution with code of its own ({kind})" if own_code else f"not a convolution in 2D ({kind})"
        if not parameter.is_floating_point():
            raise UnsupportedModelError(f"{name} is {parameter.dtype}, not floating point: prune the model unquantised")
        channels, taps = channels_of(owner), owner.kernel_size[0] * owner.kernel_size[1]
        if channels == 1:
            return "every output sees one channel" + (": a depthwise convolution" if owner.groups > 1 else "")
        d_out, d_in = owner.out_channels // owner.groups, taps * channels
        if reason := _too_small(owner.out_channels, d_in) or self._unseen(name, routed=False):
            return reason
        repeated = self._seen is not None and name in self._seen.repeated
        same = Matrix(
            name=name,
            parameter=name,
            block=block,
            d_out=d_out,
            d_in=d_in,
            layout="conv",
            taps=taps,
            repeated=repeated,
        )
        if owner.groups == 1:
            return [same]
        return [replace(same, name=f"{name}[{group}]", expert=group) for group in range(owner.groups)]

    def _outside(self, name: str, owner: nn.Module) -> str:
        if isinstance(owner, nn.Embedding):
            return "embedding, outside the blocks"
        tower = next((tower for prefix, tower in self._others if name.startswith(prefix)), None)
        return "outside the blocks" if tower is None else f"in blocks of the {tower} part that are not pruned"

    def _fused(self, name: str, parameter: Tensor, block: int) -> list[Matrix] | str:
        if self._seen is None:
            return EXPERTS_IN_ONE
        layout = self._seen.layouts.get(name)
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
            if not isinstance(members, nn.ModuleList | nn.ModuleDict) or not outer.startswith(prefixes):
                continue
            if self._seen is None:
                return len({type(member) for member in members.children()}) == 1
            if outer not in self._routed_lists:
                self._routed_lists[outer] = _is_list_of_experts(outer, members, self._seen)
            if self._routed_lists[outer]:
                return True
        return False


def _too_small(d_out: int, d_in: int) -> str:
    return f"{d_out} x {d_in} is too small ever to gain" if min(d_out, d_in) < SMALLEST else ""


def _is_list_of_experts(name: str, members: nn.Module, seen: Observed) -> bool:
    tokens: defaultdict[str, set[int]] = defaultdict(set)
    for index, member in members.named_children():
        for inner, module in member.named_modules():
            if is_linear(module):
                weight = ".".join(part for part in (name, index, inner, "weight") if part)
                if weight not in seen.bypassed:
                    tokens[inner].add(seen.called.get(weight, 0))
    return any(len(counts) > 1 for counts in tokens.values())


def _experts_in(parent: nn.Module) -> set[int]:
    counts = {len(child) for child in parent.children() if isinstance(child, nn.ModuleList | nn.ModuleDict)}
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
