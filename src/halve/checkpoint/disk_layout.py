"""From a loaded model's parameters back to the tensors of its checkpoint.

Transformers renames tensors while loading, adds or drops a prefix, and fuses or splits them: the experts of a Mixtral
are separate matrices on disk and one 3-D parameter in memory. A checkpoint must be written in the layout in which it
was found, so the rules of ``transformers.core_model_loading`` are followed backwards here, and checked forwards.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halve.errors import InputError, UnsupportedModelError
from halve.transformers_internals import conversions_when_loaded, left_out_when_saved, note_conversions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Location:
    """Where one parameter lies on disk.

    Attributes:
        tensors: the names of the tensors it is made from.
        transposed: whether the last two dimensions are swapped on disk, compared with the parameter.
    """

    tensors: tuple[str, ...]
    transposed: bool


@dataclass(frozen=True)
class DiskTensor:
    """Name, dtype and shape of a tensor as it is, or will be, on disk."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Group:
    """Parameters (state-dict names) and disk tensors that are converted into each other in one go."""

    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    reverted: tuple[str, ...] = ()
    """What transformers calls ``tensors``; empty when nothing is converted."""
    flipped: frozenset[str] = frozenset()
    """Tensors that the loader transposes only if their shape asks for it, which transformers does not undo."""
    transposed: bool = False


class DiskLayout:
    """The two-way map between the state dict of ``model`` and tensors on disk.

    Args:
        model: a model of transformers; its tensors are read when asked for, not now.
        on_disk: the tensors of the checkpoint it came from; None for a model whose checkpoint is still to be written,
            which is then laid out as ``save_pretrained`` would (tied weights once, original names).

    Raises:
        UnsupportedModelError: a parameter cannot be traced back to its tensors.
    """

    def __init__(self, model: "PreTrainedModel", on_disk: Collection[DiskTensor] | None = None) -> None:
        self._model = model
        self._rules = _Rules(model)
        self._aliases = _aliases(model)
        self.tensors: dict[str, DiskTensor] = {}
        """Every tensor on disk by name, those included that the model does not use."""
        groups = self._plan() if on_disk is None else self._match({tensor.name: tensor for tensor in on_disk})
        self._groups = tuple(groups)
        self._group_of = {name: group for group in self._groups for name in group.parameters}

    def locate(self, parameter: str, expert: int | None = None) -> Location:
        """Return where a parameter lies on disk, tied parameters together.

        Args:
            parameter: its name in the model's ``state_dict()``.
            expert: index along the first dimension of a fused parameter (expert, ..., ...): only the tensors of that
                expert, if it has tensors of its own on disk.

        Raises:
            InputError: the model has no such parameter.
            UnsupportedModelError: the checkpoint has no tensor for it.
        """
        groups = self._groups_of(parameter)
        names = tuple(name for group in groups for name in group.tensors)
        shape = self._model.get_parameter_or_buffer(parameter).shape
        if expert is not None and all(len(self.tensors[name].shape) == len(shape) - 1 for name in names):
            names = names[expert :: shape[0]]  # all experts of the first matrix, then all of the second
        return Location(names, any(group.transposed for group in groups))

    def convert(self, parameters: Collection[str], only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (disk name, tensor) for every disk tensor that these parameters are part of.

        Args:
            parameters: names of parameters of the model.
            only: the disk names wanted; None wants them all.

        Yields:
            The tensor has the shape and dtype it has on disk. Nothing is yielded twice.

        Raises:
            InputError: the model has no such parameter.
            UnsupportedModelError: loading the converted tensors would not give the parameter back.
        """
        wanted = self.tensors.keys() if only is None else set(only)
        seen: set[_Group] = set()
        for parameter in parameters:
            for group in self._groups_of(parameter):
                if group not in seen and not wanted.isdisjoint(group.tensors):
                    seen.add(group)
                    for name, tensor in self._convert(group).items():
                        if name in wanted:
                            yield name, tensor.to(self.tensors[name].dtype)

    def everything(self) -> Iterator[tuple[str, ...]]:
        """Yield, group by group, the state-dict names that ``convert`` turns into tensors together."""
        for group in self._groups:
            yield group.parameters

    @property
    def computed(self) -> list[tuple[str, ...]]:
        """The disk names, group by group, of tensors that loading makes parameters of otherwise than by renaming."""
        return [group.tensors for group in self._groups if group.reverted]

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that loading makes of one group of tensors on disk (`computed`), by name."""
        return self._rules.load(dict(tensors))

    def note_rules(self, model: "PreTrainedModel") -> None:
        """Let a model that was given what `load` returned know the rules, as if it had loaded its tensors itself."""
        note_conversions(model, self._rules.used_for(self.tensors))

    @property
    def together(self) -> list[tuple[str, ...]]:
        """The state-dict names, group by group, of parameters that are converted to tensors on disk in one go."""
        return [group.parameters for group in self._groups if len(group.parameters) > 1]

    def _groups_of(self, parameter: str) -> list[_Group]:
        if parameter not in self._aliases:
            raise InputError(f"the model has no parameter {parameter!r}: use a name from its state_dict()")
        found = dict.fromkeys(self._group_of[name] for name in self._aliases[parameter] if name in self._group_of)
        if not found:
            raise UnsupportedModelError(f"parameter {parameter!r} has no tensor in the checkpoint")
        return list(found)

    def _convert(self, group: _Group) -> dict[str, Tensor]:
        state = {name: self._model.get_parameter_or_buffer(name).detach() for name in group.parameters}
        if not group.reverted:
            return {group.tensors[0]: next(iter(state.values()))}
        reverted = self._rules.revert(state)
        tensors = {
            name: reverted[old].transpose(-1, -2) if name in group.flipped else reverted[old]
            for name, old in zip(group.tensors, group.reverted, strict=True)
        }
        loaded = self._rules.load(tensors)
        for name, value in state.items():
            if name not in loaded or not torch.equal(loaded[name], value):
                raise UnsupportedModelError(
                    f"parameter {name!r} does not come back from the tensors it would be written to, such as "
                    f"{group.tensors[0]!r}"
                )
        return tensors

    def _plan(self) -> list[_Group]:
        """Lay out a checkpoint that does not exist yet."""
        from halve.transformers_internals import remove_tied_weights_from_state_dict

        ignored = left_out_when_saved(self._model)
        state = {name: value for name, value in self._model.state_dict().items() if name not in ignored}
        groups = []
        for names in self._rules.together(remove_tied_weights_from_state_dict(state, self._model)):
            meta = self._rules.revert({name: state[name].to("meta") for name in names})
            converted = self._rules.is_converted(names[0])
            tensors = tuple(self._rules.in_loading_order(meta) if converted else meta)
            for name in tensors:
                self.tensors[name] = DiskTensor(name, meta[name].dtype, tuple(meta[name].shape))
            reverted = tensors if converted else ()
            groups.append(_Group(names, tensors, reverted, transposed=self._rules.transposes(names[0])))
        return groups

    def _match(self, on_disk: dict[str, DiskTensor]) -> list[_Group]:
        """Find the tensors of every parameter among those on disk."""
        self.tensors = on_disk
        state = self._model.state_dict()
        renamed: dict[str, str] = {}
        converted: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for name, (target, pattern) in self._rules.forward(on_disk).items():
            if target not in state:
                continue  # the model does not use it, so it will be copied
            if pattern is not None:
                converted[target, pattern].append(name)
            elif renamed.setdefault(target, name) != name:
                raise UnsupportedModelError(f"parameter {target!r} is on disk twice: {renamed[target]!r}, {name!r}")
        return [_Group((target,), (name,)) for target, name in renamed.items()] + self._match_converted(converted)

    def _match_converted(self, converted: Mapping[tuple[str, str], list[str]]) -> list[_Group]:
        """Pair the tensors on disk, by (state-dict name, pattern), with those transformers would write."""
        fused = {target for target, _ in converted}
        state = self._model.state_dict()
        parameters: dict[str, tuple[str, ...]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for names in self._rules.together(state):
            if self._rules.is_converted(names[0]) and not fused.isdisjoint(names):
                for old, tensor in self._rules.revert({name: state[name].to("meta") for name in names}).items():
                    parameters[old], shapes[old] = names, tuple(tensor.shape)
        # Transformers may name a tensor otherwise than the file does (a prefix more or less), yet both names load into
        # the same place, one after the other in natural order.
        ours: defaultdict[tuple[str, str | None], list[str]] = defaultdict(list)
        for old, key in self._rules.forward(parameters).items():
            ours[key].append(old)
        pairs: defaultdict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
        for (target, pattern), found in converted.items():
            olds = ours[target, pattern]
            if len(found) != len(olds):
                raise UnsupportedModelError(
                    f"parameter {target!r} was loaded from {len(found)} tensors ({found[0]!r} ...), and transformers "
                    f"would write it to {len(olds)}"
                )
            for name, old in zip(found, olds, strict=True):
                pairs[parameters[old]].append((name, old))
        return [self._pair(names, found, shapes) for names, found in pairs.items()]

    def _pair(
        self, parameters: tuple[str, ...], pairs: list[tuple[str, str]], shapes: Mapping[str, tuple[int, ...]]
    ) -> _Group:
        flipped = set()
        for name, old in pairs:
            shape, ours = self.tensors[name].shape, shapes[old]
            if shape == (*ours[:-2], *ours[:-3:-1]) and shape != ours:
                flipped.add(name)
            elif shape != ours:
                raise UnsupportedModelError(
                    f"tensor {name!r} has shape {shape} on disk, and transformers would write it with shape {ours}"
                )
        return _Group(
            parameters,
            tuple(name for name, _ in pairs),
            tuple(old for _, old in pairs),
            frozenset(flipped),
            transposed=bool(flipped) != self._rules.transposes(parameters[0]),
        )


def targets_on_loading(model: "PreTrainedModel", names: Collection[str]) -> dict[str, str]:
    """Return the name in the model's ``state_dict()`` that loading gives each name on disk, whether it has one or not.

    Args:
        model: may lie on the meta device.
        names: of tensors on disk.
    """
    return {name: target for name, (target, _) in _Rules(model).forward(names).items()}


class _Rules:
    """The renaming and conversion rules of one model, both ways."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from halve.transformers_internals import WeightConverter

        self._model = model
        used = conversions_when_loaded(model)
        conversions = self._load_rules() if used is None else used
        self._reverse = [
            rule.reverse_transform() for rule in reversed(conversions) if isinstance(rule, WeightConverter)
        ]

    def _load_rules(self) -> list[Any]:
        from halve.transformers_internals import get_model_conversion_mapping

        return list(get_model_conversion_mapping(self._model))

    def used_for(self, names: Collection[str]) -> list[Any]:
        """Return the rules that loading would use for these names on disk."""
        rules = self._load_rules()
        self.forward(names, rules)
        return [rule for rule in rules if rule.was_used()]

    def forward(self, names: Collection[str], rules: Sequence[Any] | None = None) -> dict[str, tuple[str, str | None]]:
        """Map disk names, in natural order, to (state-dict name, pattern of the converter or None), as loading does."""
        from halve.transformers_internals import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        rules = self._load_rules() if rules is None else rules
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix, state = self._model.base_model_prefix, self._model.state_dict()
        found = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            found[name] = (target, pattern)
        return found

    def in_loading_order(self, names: Collection[str]) -> list[str]:
        """Sort the disk names of one group by the list that loading collects them in, naturally within each."""
        found = self.forward(names)
        keys = list(dict.fromkeys(found.values()))
        return sorted(found, key=lambda name: keys.index(found[name]))

    def revert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn parameters into disk tensors, under the names transformers gives them."""
        from halve.transformers_internals import revert_weight_conversion

        return dict(revert_weight_conversion(self._model, state))

    def load(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn the disk tensors of one group into parameters, as loading does."""
        from halve.transformers_internals import WeightConverter

        of_pattern = {
            pattern: rule
            for rule in self._load_rules()
            if isinstance(rule, WeightConverter)
            for pattern in rule.source_patterns
        }
        collected: dict[str, Any] = {}
        for name, (target, pattern) in self.forward(tensors).items():
            if pattern is None:
                continue
            if target not in collected:
                collected[target] = deepcopy(of_pattern[pattern])
            collected[target].add_tensor(target, name, pattern, tensors[name])
        loaded = {}
        for target, converter in collected.items():
            for name, value in converter.convert(target, model=self._model, config=self._model.config).items():
                loaded[name] = value[0] if isinstance(value, list) else value
        return loaded

    def together(self, names: Collection[str]) -> list[tuple[str, ...]]:
        """Partition state-dict names into those that are turned into disk tensors in one go."""
        from halve.transformers_internals import dot_natural_key

        groups: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(names, key=dot_natural_key):
            groups[self._converter(name)[0]].append(name)
        return [tuple(group) for group in groups.values()]

    def is_converted(self, name: str) -> bool:
        """Whether this parameter is converted, rather than only renamed."""
        return self._converter(name)[1] is not None

    def transposes(self, name: str) -> bool:
        """Whether writing this parameter swaps its last two dimensions."""
        from halve.transformers_internals import Transpose

        converter = self._converter(name)[1]
        operations = [] if converter is None else converter.operations
        return sum(isinstance(op, Transpose) and not op.check_dims for op in operations) % 2 == 1

    def _converter(self, name: str) -> tuple[str, Any]:
        for rule in self._reverse:
            target, pattern = rule.rename_source_key(name)
            if pattern is not None:
                return target, rule
        return name, None


def _aliases(model: "PreTrainedModel") -> dict[str, tuple[str, ...]]:
    """Every state-dict name, with all the names (itself included) of the same tied tensor."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    for name in model.state_dict():
        owners[id(model.get_parameter_or_buffer(name))].append(name)
    return {name: tuple(names) for names in owners.values() for name in names}
