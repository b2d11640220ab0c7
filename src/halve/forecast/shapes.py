"""The shapes that decide what a run takes: blocks, their matrices, and which of these see the same inputs."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from halve.checkpoint.precision import bytes_in
from halve.images.processor import sees_pictures
from halve.model.layers import channels_of, is_convolution, is_fused, is_linear, layer_matrix
from halve.model.stacks import default_stacks
from halve.run.batch_norms import batch_norms
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
        positions: that they multiply for each one of the first hidden state: less than 1 where pictures have been made
            smaller before.
        convolves: whether the inputs are the patches of a convolution.
    """

    rows: tuple[int, ...]
    d_in: int
    share: float = 1.0
    experts: int = 1
    positions: float = 1.0
    convolves: bool = False

    @property
    def seen(self) -> float:
        """Inputs that they multiply for each token, all experts together."""
        return self.share * self.experts * self.positions


@dataclass(frozen=True)
class BlockShape:
    """One block.

    Attributes:
        bundles: its matrices that are pruned.
        others: weights of its matrices that are not, each as often as a token meets it.
        count: numbers in all of its parameters.
        size: bytes of these as they are loaded.
        parameters: that hold the matrices that are pruned.
        norms: channels of its batch norms.
    """

    bundles: tuple[Bundle, ...]
    others: int
    count: int
    size: int
    parameters: int = 0
    norms: tuple[int, ...] = ()

    @property
    def products(self) -> float:
        """Multiplications that one token takes in the matrices."""
        return sum(each.seen * sum(each.rows) * each.d_in for each in self.bundles) + self.others

    @property
    def positions(self) -> float:
        """Most positions of it for each one of the first hidden state."""
        return max((each.positions for each in self.bundles), default=1.0)


@dataclass(frozen=True)
class Shapes:
    """A model.

    Attributes:
        blocks: in the order in which they are pruned.
        outside: bytes of all weights outside of these blocks, as they are loaded.
        width: numbers in the hidden state of a token.
        heads: of attention; 0 where there is none.
        head_dim: numbers in each.
        classes: logits of a position.
        count: numbers in all parameters.
        shares: whether later blocks take over what earlier ones have left, such as keys and values.
    """

    blocks: tuple[BlockShape, ...]
    outside: int
    width: int
    heads: int = 1
    head_dim: int = 0
    classes: int = 0
    count: int = 0
    shares: bool = False

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
        cls,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        skip: Sequence[str] = (),
        tower: str | None = None,
        positions: Mapping[str, float] | None = None,
    ) -> "Shapes":
        """Look at a model, whose weights may be on the meta device.

        Args:
            model: the model.
            dtype: in which floating-point weights are going to be loaded; None is their own.
            skip: shell-style patterns of parameters that stay dense.
            tower: as for `halve.model.stacks.default_stacks`.
            positions: that a layer multiplies for each one of the first hidden state, by its name; None is 1 for all.

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
        seen = positions or {}
        blocks = tuple(_block(name, block, skip, dtype, active, width, seen) for name, block in members.items())
        first = next((each.d_in for block in blocks for each in block.bundles), 1)
        heads = _whole(config, "num_attention_heads", "num_heads") or int(not sees_pictures(model))
        return cls(
            blocks,
            outside,
            width or first,
            heads=heads,
            head_dim=_whole(config, "head_dim") or (width or first) // max(1, heads),
            classes=_classes(model),
            count=sum(parameter.numel() for parameter in model.parameters()),
            shares=_whole(config, "num_kv_shared_layers") > 0,
        )


def _whole(config: Any, *names: str) -> int:
    """Return the first of some settings that is a number; 0 where none is."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), 0)


def _classes(model: nn.Module) -> int:
    """Return the number of logits of a position: rows of the output layer, or the classes of a classifier."""
    outputs: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(outputs, nn.Module) and is_linear(outputs):
        return int(layer_matrix(outputs).shape[0])
    return _whole(getattr(model, "config", None), "num_labels")


def _block(
    name: str,
    block: nn.Module,
    skip: Sequence[str],
    dtype: torch.dtype | None,
    active: int,
    width: int,
    positions: Mapping[str, float],
) -> BlockShape:
    bundles: list[Bundle] = []
    others, parameters = 0, 0
    for path, module in block.named_modules():
        full = f"{name}.{path}".rstrip(".")
        kept, dense, count = _linear(full, module, skip, positions)
        parameters += count
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
                parameters += 1
    return BlockShape(
        tuple(bundles),
        others,
        sum(parameter.numel() for parameter in block.parameters()),
        sum(bytes_in(parameter, dtype) for parameter in block.parameters()),
        parameters,
        tuple(int(norm.num_features) for norm in batch_norms(block).values()),  # type: ignore[arg-type]
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


def _linear(
    name: str, module: nn.Module, skip: Sequence[str], positions: Mapping[str, float]
) -> tuple[list[Bundle], int, int]:
    """Return the bundles among a module's own linear layers and convolutions, weights that stay dense, and parameters.

    The weights that stay dense count as often as they are multiplied for a position of the first hidden state.

    Nothing is run, so that names and widths have to tell which layers read the same (`likely_input`).
    """
    together: dict[Hashable, Bundle] = {}
    dense, parameters = 0.0, 0
    for leaf, child in module.named_children():
        seen = positions.get(f"{name}.{leaf}", 1.0)
        if not is_convolution(child):
            continue
        if channels_of(child) == 1 or any(fnmatchcase(f"{name}.{leaf}.weight", each) for each in skip):
            dense += seen * child.weight.numel()
        else:
            rows, d_in = child.out_channels // child.groups, child.weight[0].numel()
            alike = Bundle((rows,), d_in, positions=seen, convolves=True)
            together |= {(child, group): alike for group in range(child.groups)}
            parameters += 1
    for leaf, (d_out, d_in) in _matrices(module):
        if any(fnmatchcase(f"{name}.{leaf}.weight", each) for each in skip):
            dense += positions.get(f"{name}.{leaf}", 1.0) * d_out * d_in
        else:
            parameters += 1
            key = likely_input(f"{name}.{leaf}.weight", d_in)
            rows_so_far = together[key].rows if key in together else ()
            seen = positions.get(f"{name}.{leaf}", 1.0)
            together[key] = Bundle((*rows_so_far, d_out), d_in, positions=seen)
    return list(together.values()), int(dense), parameters


def _matrices(module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    for leaf, child in module.named_children():
        if is_linear(child):
            yield leaf, layer_matrix(child).shape
