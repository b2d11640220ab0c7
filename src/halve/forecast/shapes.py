"""The shapes that decide what a run takes: blocks, their matrices, and which of these see the same inputs."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from halve.checkpoint.precision import bytes_in
from halve.model.layers import channels_of, is_convolution, is_fused, is_linear, layer_matrix
from halve.model.stacks import default_stacks
from halve.run.bundles import likely_input
from halve.text.generation import text_config


@dataclass(frozen=True)
class Bundle:
    """Matrices with the same inputs.

    Attributes:
        rows: outputs of each.
        d_in: inputs.
        share: of all tokens that reach them: less than 1 for experts.
        experts: how many times the bundle is there, each with inputs of its own.
    """

    rows: tuple[int, ...]
    d_in: int
    share: float = 1.0
    experts: int = 1


@dataclass(frozen=True)
class BlockShape:
    """One block.

    Attributes:
        bundles: its matrices that are pruned.
        others: weights of its matrices that are not.
        count: numbers in all of its parameters.
        size: bytes of these as they are loaded.
    """

    bundles: tuple[Bundle, ...]
    others: int
    count: int
    size: int

    @property
    def products(self) -> float:
        """Multiplications that one token takes in the matrices."""
        pruned = sum(each.share * each.experts * sum(each.rows) * each.d_in for each in self.bundles)
        return pruned + self.others


@dataclass(frozen=True)
class Shapes:
    """A model.

    Attributes:
        blocks: in the order in which they are pruned.
        outside: bytes of all weights outside of these blocks, as they are loaded.
        width: numbers in the hidden state of a token.
    """

    blocks: tuple[BlockShape, ...]
    outside: int
    width: int

    @property
    def inside(self) -> int:
        """Bytes of the weights of all blocks."""
        return sum(block.size for block in self.blocks)

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return self.inside + self.outside

    @classmethod
    def of(
        cls, model: nn.Module, *, dtype: torch.dtype | None = None, skip: Sequence[str] = (), tower: str | None = None
    ) -> "Shapes":
        """Look at a model, whose weights may be on the meta device.

        Args:
            model: the model.
            dtype: in which floating-point weights are going to be loaded; None is their own.
            skip: shell-style patterns of parameters that stay dense.
            tower: as for `halve.model.stacks.default_stacks`.

        Raises:
            UnsupportedModelError, InputError: as `default_stacks`.
        """
        config = text_config(model)
        members = {name: block for stack in default_stacks(model, tower) for name, block in stack.members.items()}
        inside = {id(parameter) for block in members.values() for parameter in block.parameters()}
        outside = sum(bytes_in(p, dtype) for p in model.parameters() if id(p) not in inside)
        active = getattr(config, "num_experts_per_tok", None)
        active = active if isinstance(active, int) and active > 0 else 1
        width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        width = width if isinstance(width, int) else 0
        blocks = tuple(_block(name, block, skip, dtype, active, width) for name, block in members.items())
        first = next((each.d_in for block in blocks for each in block.bundles), 1)
        return cls(blocks, outside, width or first)


def _block(
    name: str, block: nn.Module, skip: Sequence[str], dtype: torch.dtype | None, active: int, width: int
) -> BlockShape:
    bundles: list[Bundle] = []
    others = 0
    for path, module in block.named_modules():
        full = f"{name}.{path}".rstrip(".")
        kept, dense = _linear(full, module, skip)
        listed = _experts_in_a_list(block, path)
        share = min(1.0, active / listed) if listed else 1.0
        others += int(share * dense)
        bundles += [replace(each, share=share) for each in kept]
        for leaf, parameter in module.named_parameters(recurse=False):
            if not is_fused(module, parameter):
                continue
            experts, d_out, d_in = _expert(leaf, parameter.shape, width)
            share = min(1.0, active / experts)
            if any(fnmatchcase(f"{full}.{leaf}", each) for each in skip):
                others += int(share * parameter.numel())
            else:
                bundles.append(Bundle((d_out,), d_in, share, experts))
    return BlockShape(
        tuple(bundles),
        others,
        sum(parameter.numel() for parameter in block.parameters()),
        sum(bytes_in(parameter, dtype) for parameter in block.parameters()),
    )


def _experts_in_a_list(block: nn.Module, path: str) -> int:
    """Return how many experts there are beside the one that a module is or is in, 0 if it is none."""
    names = path.split(".")
    for end in range(len(names)):
        if names[end] == "experts" and end + 1 < len(names):
            experts = block.get_submodule(".".join(names[: end + 1]))
            return len(experts) if isinstance(experts, nn.ModuleList) else 0
    return 0


def _expert(leaf: str, shape: torch.Size, width: int) -> tuple[int, int, int]:
    """Return how many experts a fused parameter holds, and (d_out, d_in) of each, whichever way they lie there."""
    experts, d_out, d_in = shape
    inwards = "down" not in leaf  # the last layer of an expert reads what its others have made
    if width in (d_out, d_in) and d_out != d_in and (d_in == width) != inwards:
        d_out, d_in = d_in, d_out
    return experts, d_out, d_in


def _linear(name: str, module: nn.Module, skip: Sequence[str]) -> tuple[list[Bundle], int]:
    """Return the bundles among a module's own linear layers and convolutions, and the weights that stay dense.

    Nothing is run, so that names and widths have to tell which layers read the same (`likely_input`).
    """
    together: dict[Hashable, Bundle] = {}
    dense = 0
    for leaf, child in module.named_children():
        if not is_convolution(child):
            continue
        if channels_of(child) == 1 or any(fnmatchcase(f"{name}.{leaf}.weight", each) for each in skip):
            dense += child.weight.numel()
        else:
            rows, d_in = child.out_channels // child.groups, child.weight[0].numel()
            together |= {(child, group): Bundle((rows,), d_in) for group in range(child.groups)}
    for leaf, (d_out, d_in) in _matrices(module):
        if any(fnmatchcase(f"{name}.{leaf}.weight", each) for each in skip):
            dense += d_out * d_in
        else:
            key = likely_input(f"{name}.{leaf}.weight", d_in)
            together[key] = Bundle((*together.get(key, Bundle((), d_in)).rows, d_out), d_in)
    return list(together.values()), dense


def _matrices(module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    for leaf, child in module.named_children():
        if is_linear(child):
            yield leaf, layer_matrix(child).shape
