"""Which matrices of a model are prunable, as (d_out, d_in) views, and why the others are not.

Structure decides, never a list of names: a prunable matrix is the weight of a ``Linear`` or ``Conv1D``, or one
expert's slice of a fused 3-D parameter, inside the stack of blocks. Every parameter of two or more dimensions ends
up either as a matrix or as an exclusion with a reason.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from halve.errors import InputError, UnsupportedModelError
from halve.maths.pattern import Pattern

Layout = Literal["out_in", "in_out"]
"""How a matrix lies in its parameter: (d_out, d_in) as in ``Linear``, or transposed as in GPT-2's ``Conv1D``."""


def matrix_view(parameter: Tensor, expert: int | None, layout: Layout) -> Tensor:
    """Return a matrix as a (d_out, d_in) view of the parameter that holds it, writable in place.

    Args:
        parameter: of two dimensions, or of three if it holds the matrices of several experts.
        expert: which of them, None for a parameter of two dimensions.
        layout: how it lies there.
    """
    stored = parameter if expert is None else parameter[expert]
    return stored if layout == "out_in" else stored.T


EXPERTS_IN_ONE = "experts in one parameter, which the model's own code multiplies"
"""Why fused experts cannot run sparse."""
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
        stack: name of the module that holds the blocks.
        blocks: name of each block, in order.
        matrices: all prunable matrices, in order of blocks.
        excluded: every other parameter with two or more dimensions.
    """

    stack: str
    blocks: tuple[str, ...]
    matrices: tuple[Matrix, ...]
    excluded: tuple[Excluded, ...]

    def of_block(self, block: int) -> tuple[Matrix, ...]:
        """Return the matrices of one block."""
        return tuple(matrix for matrix in self.matrices if matrix.block == block)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``: a linear layer whose weight is stored as (d_in, d_out)."""
    from halve.transformers_internals import Conv1D

    return isinstance(module, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` multiplies its input by one weight matrix and adds a bias."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a ``Linear`` or ``Conv1D`` itself, not a class derived from one with code of its own."""
    return type(module) is nn.Linear or (is_conv1d(module) and type(module).__mro__[1] is nn.Module)


def layer_matrix(layer: nn.Module) -> Tensor:
    """Return the weight of a ``Linear`` or ``Conv1D`` as a (d_out, d_in) view."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - of these two it always is
    return matrix_view(weight, None, "in_out" if is_conv1d(layer) else "out_in")


def plain_layer(matrix: Tensor, bias: nn.Parameter | None, layout: Layout) -> nn.Module:
    """Return the ``Linear`` or ``Conv1D`` that multiplies by ``matrix`` (d_out, d_in); no weight gets a gradient."""
    from halve.transformers_internals import Conv1D

    d_out, d_in = matrix.shape
    with torch.device("meta"):
        made = nn.Linear(d_in, d_out) if layout == "out_in" else Conv1D(d_out, d_in)
    made.weight = nn.Parameter(matrix_view(matrix, None, layout).contiguous(), requires_grad=False)
    made.register_parameter("bias", bias)
    return made


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """Find the list of blocks by structure: the outermost module list that holds most of the linear weights.

    Returns:
        tuple[str, nn.ModuleList | nn.Sequential]: the list's name in ``model`` and the list.

    Raises:
        UnsupportedModelError: an encoder-decoder model, or no list of blocks with linear layers.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model: Halve prunes models with one stack of blocks"
        )
    best: tuple[int, str, nn.ModuleList | nn.Sequential] | None = None
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(name.startswith(outer) for outer in inside):
            continue
        weights = [block_weight_count(block) for block in module]
        if len(weights) == 0 or min(weights) == 0 or any(is_linear(block) for block in module):
            continue
        inside.append(f"{name}." if name else "")
        if best is None or sum(weights) > best[0]:
            best = (sum(weights), name, module)
    if best is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks with linear layers (a ModuleList or Sequential), "
            "so Halve cannot run it block by block"
        )
    return best[1], best[2]


def block_weight_count(block: nn.Module) -> int:
    """Count the weights of the linear layers and fused experts below ``block``."""
    return sum(
        parameter.numel()
        for module in block.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if (is_linear(module) and leaf == "weight") or is_fused(module, parameter)
    )


def is_fused(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether ``parameter`` of ``owner`` looks like the matrices of several experts, stacked along dimension 0."""
    return parameter.ndim == 3 and not isinstance(owner, _ConvNd)


def make_plan(
    model: nn.Module,
    pattern: Pattern,
    fused_layouts: dict[str, Layout] | None,
    skip: Sequence[str] = (),
    why_dense: Callable[[Matrix], str] | None = None,
) -> Plan:
    """Decide for every parameter with two or more dimensions whether it is pruned.

    Args:
        model: any module with a stack of blocks (`find_stack`).
        pattern: the sparsity pattern that has to fit each matrix.
        fused_layouts: for each fused 3-D parameter (full name) how the model multiplies with it, as observed by
            `halve.model.collect.observe`; a fused parameter without an entry is refused. None leaves all of them dense.
        skip: shell-style patterns; a parameter whose name matches one stays dense.
        why_dense: says of a matrix that could be pruned why it stays dense, an empty text if it does not; all experts
            of a fused parameter go by the first. None leaves nothing dense.

    Raises:
        UnsupportedModelError: a fused parameter was not seen in use, or a linear weight is not floating point.
        InputError: a pattern of ``skip`` matches no parameter, or nothing is left to prune.
    """
    stack, blocks = find_stack(model)
    owners = dict(model.named_modules(remove_duplicate=False))
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = tuple(f"{stack}.{key}".lstrip(".") for key, _ in blocks.named_children())
    unmatched = [glob for glob in skip if not any(fnmatchcase(name, glob) for name, _ in model.named_parameters())]
    if unmatched:
        raise InputError(f"skip pattern {unmatched[0]!r} matches no parameter of the model: check it against the plan")

    matrices: list[Matrix] = []
    excluded: list[Excluded] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        found: list[Matrix] | str = "skipped on request"
        if not any(fnmatchcase(name, glob) for glob in skip):
            found = _classify(name, parameter, owners, names, uses[id(parameter)], fused_layouts)
        if not isinstance(found, str):
            found = _unfit(found[0], pattern, why_dense) or found
        if isinstance(found, str):
            excluded.append(Excluded(name, tuple(parameter.shape), found))
        else:
            matrices.extend(found)
    if not matrices:
        reasons = ", ".join(sorted({entry.reason for entry in excluded}))
        raise InputError(f"nothing to prune: every matrix of the model is excluded ({reasons})")
    matrices.sort(key=lambda matrix: matrix.block)  # stable: the model's order within a block
    return Plan(stack, names, tuple(matrices), tuple(excluded))


def _unfit(matrix: Matrix, pattern: Pattern, why_dense: Callable[[Matrix], str] | None) -> str:
    """Return why a matrix that could be pruned is not, empty if it is."""
    if not pattern.fits(matrix.d_in):
        return f"d_in = {matrix.d_in} is not divisible by {pattern.group}"
    return "" if why_dense is None else why_dense(matrix)


def _classify(
    name: str,
    parameter: Tensor,
    owners: dict[str, nn.Module],
    blocks: Iterable[str],
    uses: int,
    fused_layouts: dict[str, Layout] | None,
) -> list[Matrix] | str:
    """Return the matrices that ``parameter`` holds, or the reason why it holds none."""
    block = next((i for i, prefix in enumerate(blocks) if name.startswith(f"{prefix}.")), None)
    path, _, leaf = name.rpartition(".")
    owner = owners[path]
    if block is None:
        return "embedding, outside the blocks" if isinstance(owner, nn.Embedding) else "outside the blocks"
    if uses > 1:
        return "shared with another module"
    if isinstance(owner, _ConvNd):
        return "convolution"
    if is_fused(owner, parameter):
        return EXPERTS_IN_ONE if fused_layouts is None else _fused_matrices(name, parameter, block, fused_layouts)
    if not is_linear(owner) or leaf != "weight":
        return f"not the weight of a linear layer ({type(owner).__name__}.{leaf})"
    if not parameter.is_floating_point():
        raise UnsupportedModelError(f"{name} is {parameter.dtype}, not floating point: prune the model unquantised")
    layout: Layout = "in_out" if is_conv1d(owner) else "out_in"
    d_out, d_in = parameter.shape if layout == "out_in" else parameter.T.shape
    if d_out == 1:
        return "one output: a gate"
    if d_out in _expert_counts(owners[path.rpartition(".")[0]]):
        return "as many outputs as experts beside it: a router"
    return [
        Matrix(
            name=name,
            parameter=name,
            block=block,
            d_out=d_out,
            d_in=d_in,
            layout=layout,
            routed=_in_nested_list(path, owners, blocks),
        )
    ]


def _expert_counts(parent: nn.Module) -> set[int]:
    """Numbers of experts that ``parent`` holds: lengths of its module lists, and of its children's fused parameters."""
    counts = {len(child) for child in parent.children() if isinstance(child, nn.ModuleList)}
    for child in (parent, *parent.children()):
        fused = (p for _, p in child.named_parameters(recurse=False) if is_fused(child, p))
        counts.update(parameter.shape[0] for parameter in fused)
    return counts


def _in_nested_list(path: str, owners: dict[str, nn.Module], blocks: Iterable[str]) -> bool:
    """Whether a module list lies between the block and the module at ``path``: a list of experts."""
    parts = path.split(".")
    parents = (".".join(parts[:i]) for i in range(1, len(parts)))
    prefixes = tuple(f"{block}." for block in blocks)
    return any(isinstance(owners[parent], nn.ModuleList) and parent.startswith(prefixes) for parent in parents)


def _fused_matrices(name: str, parameter: Tensor, block: int, layouts: dict[str, Layout]) -> list[Matrix]:
    layout = layouts.get(name)
    if layout is None:
        raise UnsupportedModelError(
            f"{name} has shape {tuple(parameter.shape)} and the model was not seen multiplying with its slices, "
            "so Halve does not know which dimension is the input: leave it dense with skip"
        )
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
