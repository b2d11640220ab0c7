"""The stacks of blocks in a model, found by structure, and which of them are pruned."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from halve.errors import InputError, UnsupportedModelError
from halve.model.layers import block_weight_count, is_convolution, is_linear

ALL = "all"
"""Asks for every tower that runs."""
ENCODER, DECODER, TEXT = "encoder", "decoder", "text"
_VISION = frozenset({"vision", "vit", "visual", "image"})
"""What models call the tower that sees images."""


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after the other.

    Attributes:
        name: of the list in the model.
        tower: the part of the model that it belongs to: ``encoder`` and ``decoder`` of an encoder-decoder, or what the
            config calls its parts (``text``, ``vision``, ``audio``, …); ``text`` where there are no parts.
        blocks: the blocks, in order.
        group: what is pruned together: the list of lists or the module that stages of a vision model stand in, else
            itself.
    """

    name: str
    tower: str
    blocks: nn.ModuleList | nn.Sequential
    group: str

    @property
    def members(self) -> dict[str, nn.Module]:
        """The blocks by their full names, in order."""
        return {f"{self.name}.{key}".lstrip("."): block for key, block in self.blocks.named_children()}

    @property
    def weights(self) -> int:
        """Number of weights in linear layers, fused experts and convolutions."""
        return sum(block_weight_count(block) for block in self.blocks)


def find_stacks(model: nn.Module) -> list[Stack]:
    """Find every outermost list of blocks with linear layers or convolutions, in the order of the model's modules.

    A list counts when at least half of its members have such layers below them and none is a linear layer itself:
    hybrids have blocks without. Of a list of lists, which never runs as a whole, every member is a stack. Lists of
    blocks of convolutions that stand side by side in one module (``layer1`` to ``layer4`` of torchvision's ResNets) are
    one group, as the stages of a vision model are that stand in one list.

    Raises:
        UnsupportedModelError: there is none.
    """
    found: list[Stack] = []
    groups: list[str] = []
    towers = _Towers(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer.name}.") or not outer.name for outer in found):
            continue
        weights = [0 if is_convolution(block) else block_weight_count(block) for block in module]
        if all(isinstance(member, nn.ModuleList) for member in module):
            groups.append(name)
            continue
        if 2 * sum(weight > 0 for weight in weights) < len(weights) or any(is_linear(block) for block in module):
            continue
        group = next((outer for outer in groups if name.startswith(f"{outer}.")), name)
        found.append(Stack(name, towers.of(name), module, group))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks with linear layers or convolutions (a ModuleList or "
            "Sequential), so Halve cannot run it block by block"
        )
    return _with_stages_together(found)


def _with_stages_together(stacks: Sequence[Stack]) -> list[Stack]:
    """Put lists of blocks of convolutions that stand side by side into one group."""
    parents = {
        stack.name: (stack.tower, stack.name.rpartition(".")[0])
        for stack in stacks
        if stack.group == stack.name and all(any(map(is_convolution, block.modules())) for block in stack.blocks)
    }
    count = Counter(parents.values())
    return [
        replace(stack, group=parents[stack.name][1]) if count[parents.get(stack.name, ("", ""))] > 1 else stack
        for stack in stacks
    ]


def default_stacks(model: nn.Module, tower: str | None = None) -> list[Stack]:
    """Choose the stacks to prune by structure alone, as if the input were text: the largest group of each chosen tower.

    Args:
        model: any module.
        tower: ``text``, ``vision``, …, or ``all``; None is the text tower of a model with several, both stacks of an
            encoder-decoder.

    Raises:
        UnsupportedModelError: there is no stack.
        InputError: there is no such tower.
    """
    return choose_stacks(find_stacks(model), type(model).__name__, tower)


def choose_stacks(
    stacks: Sequence[Stack], model_name: str, tower: str | None = None, ran: Collection[str] | None = None
) -> list[Stack]:
    """Choose the stacks to prune, in the order in which they were given.

    Args:
        stacks: all that there are, in the order in which they run where that is known.
        model_name: for messages.
        tower: as for `default_stacks`.
        ran: names of the stacks whose blocks ran on the calibration data; None where nothing was run.

    Raises:
        InputError: there is no such tower, or nothing of it ran.
    """
    running = [stack for stack in stacks if ran is None or stack.name in ran]
    if not running:
        raise InputError(
            f"no blocks of {model_name} ran on the calibration data ({_listed(stacks)}): give the inputs that they need"
        )
    weights: Counter[str] = Counter()
    for stack in running:
        weights[stack.group] += stack.weights
    largest: dict[str, str] = {}
    for stack in running:
        if stack.tower not in largest or weights[stack.group] > weights[largest[stack.tower]]:
            largest[stack.tower] = stack.group
    if tower == ALL:
        wanted = set(largest)
    elif tower is not None:
        wanted = {name for name in largest if name == tower or {name, tower} <= _VISION}
    elif ENCODER in largest or DECODER in largest:
        wanted = {ENCODER, DECODER}
    else:
        wanted = {TEXT} if TEXT in largest else {max(largest, key=lambda name: weights[largest[name]])}
    chosen = [stack for stack in running if stack.tower in wanted and largest[stack.tower] == stack.group]
    if chosen:
        return chosen
    if any(stack.tower == tower or {stack.tower, tower} <= _VISION for stack in stacks):
        raise InputError(
            f"the {tower} tower of {model_name} did not run on the calibration data: give the inputs that it needs "
            f"(batches with pixel_values, …), or another tower ({_listed(running)})"
        )
    raise InputError(f"{model_name} has no tower {tower!r}: choose among {_listed(stacks)}, or {ALL}")


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """Return the name and the blocks of the one stack that is pruned unasked.

    Raises:
        UnsupportedModelError: there is none, or an encoder-decoder model has two.
    """
    stacks = default_stacks(model)
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has several stacks of blocks, as encoder-decoders have: what a whole model takes "
            "can be measured of models with one only"
        )
    return stacks[0].name, stacks[0].blocks


def _listed(stacks: Sequence[Stack]) -> str:
    return ", ".join(dict.fromkeys(stack.tower for stack in stacks))


class _Towers:
    """Which part of a model a module belongs to, by the modules and configs above it."""

    def __init__(self, model: Any) -> None:
        self._modules = dict(model.named_modules())
        config = getattr(model, "config", None)
        self._configs = {
            name.removesuffix("_config"): part
            for name, part in (vars(config) if hasattr(config, "model_type") else {}).items()
            if hasattr(part, "model_type")
        }
        self._both: dict[int, str] = {}
        if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
            parts = ((DECODER, model.get_decoder()), (ENCODER, model.get_encoder()))
            self._both = {id(part): name for name, part in parts if part is not None and part is not model}

    def of(self, name: str) -> str:
        """Return the tower of the module of a name."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            module = self._modules[".".join(parts[:length])]
            if id(module) in self._both:
                return self._both[id(module)]
            config = getattr(module, "config", None)
            alike = [tower for tower, part in self._configs.items() if config is part]  # copies are of the same class
            alike += [tower for tower, part in self._configs.items() if type(config) is type(part)]
            if alike:
                return alike[0]
        return TEXT
