"""Which parameters of a model in memory are pruned: as saved masks or the record say, or as their zeros tell."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from halve.checkpoint.directory import RECORD
from halve.checkpoint.disk_layout import targets_on_loading
from halve.checkpoint.shards import TensorEntry, read_shard, read_tensor
from halve.errors import HalveError, InputError, UnsupportedModelError, counted, first_few
from halve.maths.pattern import Pattern
from halve.model.adapters import adapter_parameters
from halve.model.layers import Layout, holds_matrix, inputs_last, is_conv1d, is_convolution, is_fused, is_linear
from halve.model.masked import FixedMasks, PrunedParameter, pruned_parameters, unpack_mask, whole
from halve.model.stacks import find_stacks
from halve.recorded import Record, pattern_of, read_record

MASKS = "halve.masks"
"""Saved masks beside a checkpoint, a file of safetensors; under that ending it would be taken for weights."""
LEAST_ZEROS = 0.25
"""Where nothing is on record, a matrix counts as pruned that has at least this share of zeros."""
UNASKED = Pattern("2:4")
"""The pattern that is looked for where nothing is on record and nobody says."""


def find_pruned(model: nn.Module, pattern: str | Pattern | None = None, record: str | Path | None = None) -> FixedMasks:
    """Find the parameters of a model that are pruned, and fix their masks.

    Where the model was loaded from a directory, masks that a training saved there come first, then its ``halve.json``.
    Without them, and for a model with adapters, what counts are matrices in the model's blocks (all linear layers and
    convolutions of a model without a list of blocks) that satisfy the pattern and have at least a quarter of zeros, but
    are not zero altogether; never adapters, embeddings, norms or biases. Of a sharded model every process has to ask at
    once.

    Args:
        model: with its weights loaded, in no wrapper.
        pattern: that its matrices have; None takes that on record, or 2:4.
        record: a directory to look in, or its ``halve.json``; None looks where the model was loaded from.

    Raises:
        InputError: nothing is pruned; ``pattern`` is not that on record; the weights are not as recorded.
        CorruptFileError, UnreadableFileError: of ``halve.json`` or the saved masks.
    """
    wanted = None if pattern is None else Pattern.parse(pattern)
    directory = _directory(model, record)
    if directory is not None and (directory / MASKS).is_file():
        return read_masks(model, directory / MASKS)
    if directory is not None and (directory / RECORD).is_file():
        listed = read_record(directory, Record)
        recorded = pattern_of(listed, directory)
        if recorded is None or not listed.layouts:
            raise InputError(f"{directory / RECORD} lists nothing as pruned, so there is no mask to keep")
        if wanted not in {None, recorded}:
            raise InputError(f"{directory / RECORD} says that the matrices are {recorded}, not {wanted}")
        if not any(adapter_parameters(model)):
            return FixedMasks(_recorded(model, listed.layouts, recorded, directory / RECORD))
        wanted = recorded
    elif record is not None:
        raise InputError(f"{record} has no {RECORD} and no {MASKS}: give the directory of a pruned checkpoint")
    wanted = wanted or UNASKED
    found = list(_by_zeros(model, wanted))
    if not found:
        raise InputError(
            f"no matrix in the blocks of {type(model).__name__} is pruned to {wanted}, so there is no mask to keep: "
            "give the pattern that it has (pattern=), or the directory of the pruned checkpoint (record=)"
        )
    return FixedMasks(found)


def read_masks(model: nn.Module, path: Path) -> FixedMasks:
    """Read the masks that a training saved, for a model with weights of that training.

    Raises:
        InputError: they are not masks of this model, or a weight that they prune is not zero.
        CorruptFileError, UnreadableFileError: of the file.
    """
    packed = {entry.name: read_tensor(entry) for entry in read_shard(path).tensors}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if foreign := sorted(packed.keys() - parameters.keys()):
        raise InputError(f"{path} has a mask of {first_few(foreign)}, and {type(model).__name__} has no such parameter")
    masks = {name: unpack_mask(each, tuple(parameters[name].shape), name) for name, each in packed.items()}
    owned = pruned_parameters(model, {name: _layouts(model, name)[0] for name in masks})
    found = FixedMasks(owned, masks)
    if broken := found.broken():
        raise InputError(
            f"{path} prunes weights that are not zero in {first_few(sorted(broken))}: the masks are not those of this "
            "model; remove the file if they are of another training"
        )
    return found


def _directory(model: Any, record: str | Path | None) -> Path | None:
    if record is not None:
        path = Path(record).expanduser()
        return path.parent if path.name == RECORD else path
    name = getattr(getattr(model, "config", None), "name_or_path", None) or getattr(model, "name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None


def _recorded(
    model: nn.Module, tensors: Mapping[str, Layout], pattern: Pattern, path: Path
) -> Iterator[PrunedParameter]:
    """Yield the parameters that tensors on disk were loaded into."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = _targets(model, tensors.keys())
    layouts: dict[str, Layout] = {}
    for tensor in tensors:
        name = targets[tensor]
        if name in parameters and name not in layouts:
            fitting = _fitting(model, name, parameters[name], pattern)
            if fitting is None:
                raise InputError(
                    f"{name} is recorded as pruned to {pattern} in {path}, and is not: its weights were changed since, "
                    "so there is no mask to keep"
                )
            layouts[name] = fitting
    if not layouts:
        raise InputError(f"{path} lists {first_few(list(tensors))} as pruned, and the model has no such parameter")
    yield from pruned_parameters(model, layouts)


def _targets(model: nn.Module, tensors: Collection[str]) -> dict[str, str]:
    from transformers import PreTrainedModel

    return (
        targets_on_loading(model, tensors) if isinstance(model, PreTrainedModel) else {name: name for name in tensors}
    )


@dataclass(frozen=True)
class _Candidate:
    name: str
    parameter: nn.Parameter


def _by_zeros(model: nn.Module, pattern: Pattern) -> Iterator[PrunedParameter]:
    """Yield the matrices that are pruned by the look of them, each once however often it is used."""
    least = min(LEAST_ZEROS, pattern.sparsity)
    layouts: dict[str, Layout] = {}
    for each in _matrices(model):
        weight = whole(each.parameter.detach())
        zeros = int((weight == 0).sum())
        if not least * weight.numel() <= zeros < weight.numel():
            continue
        fitting = _fitting(model, each.name, weight, pattern)
        if fitting is not None:
            layouts[each.name] = fitting
    yield from pruned_parameters(model, layouts)


def _matrices(model: nn.Module) -> Iterator[_Candidate]:
    """Yield what may be pruned: weights of layers and fused experts, those in the blocks if there are any."""
    try:
        inside = tuple(f"{stack.name}.".lstrip(".") for stack in find_stacks(model))
    except UnsupportedModelError:
        inside = ("",)
    left = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    adapters = {name for name in adapter_parameters(model) if ".modules_to_save." not in name}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}".lstrip(".")
            matrix = (holds_matrix(module) and leaf == "weight") or is_fused(module, parameter)
            if not matrix or not name.startswith(inside) or name in adapters or id(parameter) in left:
                continue
            if parameter.is_meta:
                raise InputError(f"{name} is on the meta device and has no zeros yet: load the weights first")
            if parameter.is_floating_point() and parameter.numel():
                left.add(id(parameter))
                yield _Candidate(name, parameter)


def _layouts(model: nn.Module, name: str) -> tuple[Layout, ...]:
    """Return how the matrices of a parameter may lie in it; of fused experts nobody says."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if is_conv1d(owner):
        return ("in_out",)
    if is_convolution(owner):
        return ("conv",)
    return ("out_in",) if is_linear(owner) else ("out_in", "in_out")


def _fitting(model: nn.Module, name: str, weight: Tensor, pattern: Pattern) -> Layout | None:
    """Return the layout in which a weight, sharded or not, has the pattern; None if in none."""
    found = whole(weight.detach())
    if found.ndim < 2:
        return None
    for layout in _layouts(model, name):
        rows = inputs_last(found, layout)
        if pattern.fits(rows.shape[-1]) and pattern.satisfied_by(rows):
            return layout
    return None


def check_written(model: nn.Module, packed: Mapping[str, Tensor], directory: Path) -> None:
    """Look in the bytes of a checkpoint whether every pruned weight is zero there.

    Where a parameter was written as several tensors, such as those of experts, their zeros are counted.

    Args:
        model: of which it is; only its names and shapes are used.
        packed: the masks, as `FixedMasks.state_dict` gives them.
        directory: with the checkpoint; nothing is looked at where it has no weights in files of safetensors.

    Raises:
        HalveError: one is not zero.
        CorruptFileError, UnreadableFileError: of a file.
    """
    entries = {e.name: e for path in sorted(directory.glob("model*.safetensors")) for e in read_shard(path).tensors}
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
    written: defaultdict[str, list[TensorEntry]] = defaultdict(list)
    for name, target in _targets(model, entries.keys()).items():
        if target in packed:
            written[target].append(entries[name])
    for name, found in written.items():
        pruned = ~unpack_mask(packed[name], shapes[name], name)
        tensors = [read_tensor(entry) for entry in found]
        if len(tensors) == 1 and tensors[0].shape == pruned.shape:
            # a checkpoint may have a matrix the other way round, which its shape does not tell if it is square
            ways = (tensors[0], tensors[0].mT) if tensors[0].mT.shape == pruned.shape else (tensors[0],)
            wrong = min(int((each[pruned] != 0).sum()) for each in ways)
        else:
            wrong = int(pruned.sum()) - sum(int((each == 0).sum()) for each in tensors)
        if wrong > 0:
            raise HalveError(
                f"{found[0].path} has {counted(wrong, 'pruned weight')} that should be zero in {found[0].name}: it was "
                "not written from the weights that were trained; save it again"
            )
