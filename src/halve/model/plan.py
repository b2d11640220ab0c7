"""What is pruned of a model, as (d_out, d_in) views, and what is not, and why."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halve.model.layers import Layout, matrix_view, write_matrix

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
        d_in: number of inputs; groups of a pattern run along it, of a convolution each within the channels of one tap.
        layout: how it lies in the parameter.
        expert: index along the first dimension of a fused parameter, or the group of a grouped convolution; None for a
            parameter that is one matrix.
        taps: number of taps of a convolution's kernel: so many runs of channels make up ``d_in``.
        routed: whether only some tokens reach it (a fused expert, or a matrix of a nested list of experts).
        repeated: whether its block calls it several times in one pass, so that its inputs are no other matrix's.
        sees_memory: whether its inputs are the encoder's positions, in a decoder.
    """

    name: str
    parameter: str
    block: int
    d_out: int
    d_in: int
    layout: Layout = "out_in"
    expert: int | None = None
    taps: int = 1
    routed: bool = False
    repeated: bool = False
    sees_memory: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """Return this matrix (d_out, d_in) as it is in ``parameter``: see `halve.model.layers.matrix_view`."""
        return matrix_view(parameter, self.expert, self.layout, self.d_out)


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


@dataclass(frozen=True, kw_only=True)
class Observed:
    """How a model used its weights in forward passes of short samples.

    Attributes:
        layouts: full name of each fused 3-D parameter seen in a product, and how it was multiplied.
        called: full names of the weights of linear layers that were called, and never multiplied with otherwise, each
            with the tokens that it was multiplied with.
        repeated: those of them that were called more than once in a pass.
        bypassed: weights of linear layers that were multiplied with without calling the layer.
        lengths: sizes of the last but one dimension of each weight's inputs.
        memory: weights in a decoder that see the encoder's positions.
    """

    layouts: Mapping[str, Layout]
    called: Mapping[str, int]
    repeated: frozenset[str] = frozenset()
    bypassed: frozenset[str] = frozenset()
    lengths: Mapping[str, frozenset[int]] = field(default_factory=dict)
    memory: frozenset[str] = frozenset()


def set_matrix(parameter: nn.Parameter, matrix: Matrix, weight: Tensor) -> None:
    """Write ``weight`` (d_out, d_in) into its place in ``parameter``, in the parameter's dtype."""
    with torch.no_grad():
        write_matrix(parameter.data, matrix.expert, matrix.layout, weight)


def place_of(name: str) -> tuple[int | None, str]:
    """Return the index of a matrix's block, None if its name has none, and its kind: the name within the block.

    Args:
        name: of a `Matrix`; the kind leaves out the number of an expert.
    """
    place = _IN_BLOCK.fullmatch(_WEIGHT.sub("", name))
    return (None, name) if place is None else (int(place[1]), _EXPERT.sub("", place[2]))


def part_of(name: str) -> str:
    """Return the part of a model that the stack of a matrix stands in, such as ``decoder``; empty if it stands alone.

    It is the last name but one before the index of the block: of ``model.decoder.layers.0.fc1.weight``.
    """
    before = name.split(".")
    index = next((place for place, part in enumerate(before) if part.isdecimal()), 0)
    return before[index - 2] if index >= 2 else ""


def places_of(names: Collection[str]) -> dict[str, tuple[int | None, str]]:
    """Return `place_of` of every name; where the matrices stand in several parts, a kind begins with its part."""
    several = len({part_of(name) for name in names}) > 1
    found = {}
    for name in names:
        block, kind = place_of(name)
        part = part_of(name) if several else ""
        found[name] = (block, f"{part}: {kind}" if part else kind)
    return found
