"""Which tensors of a plain checkpoint are packed, and how: what ``halve.json`` lists, or what has the pattern."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from halve.checkpoint.directory import RECORD
from halve.checkpoint.disk_layout import DiskLayout, DiskTensor
from halve.checkpoint.load import Source, skeleton
from halve.checkpoint.shards import TensorEntry, read_tensor
from halve.checkpoint.validated import wrong
from halve.errors import InputError
from halve.maths.grid import Bits
from halve.maths.pattern import Pattern
from halve.model.layers import CONVOLUTION, Layout, is_conv1d, is_fused, is_linear
from halve.model.stacks import find_stacks
from halve.packed.manifest import PackedTensor
from halve.packed.read import PARTS, as_matrix, matrix_shape
from halve.recorded import REMEDY, Record, pattern_of
from halve.runtime.packed_matrix import DTYPES

BITS = {2: torch.int16, 4: torch.int32}
"""By the bytes of a number, what shows its bits."""
_DENSER = "it is not in the pattern"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to pack.

    Attributes:
        pattern: of all of it.
        layouts: the layouts to try, for each tensor by name.
        left: tensors that are left dense whatever they hold, and why.
        recorded: whether ``halve.json`` says that they are in the pattern, so that it is an error if one is not.
    """

    pattern: Pattern
    layouts: Mapping[str, tuple[Layout, ...]]
    left: Mapping[str, str]
    recorded: bool


def asked_for(
    source: Source, record: Record | None, entries: Mapping[str, TensorEntry], pattern: Pattern | None
) -> Asked:
    """Return what is to be packed of a checkpoint.

    Args:
        source: it.
        record: its ``halve.json``; None where it has none.
        entries: its tensors on disk, by name.
        pattern: that was given; None where none was.

    Raises:
        InputError: there is no pattern, or another one than on record; a tensor on record is missing.
        CorruptFileError: the record does not say what was pruned.
    """
    if record is not None:
        return _recorded(record, source.path, entries, pattern)
    if pattern is None:
        raise InputError(f"{source.name} has no {RECORD}: give the pattern of its matrices (--pattern 2:4)")
    return Asked(pattern=pattern, layouts=_linear_tensors(source, entries), left={}, recorded=False)


def _recorded(record: Record, directory: Path, entries: Mapping[str, TensorEntry], pattern: Pattern | None) -> Asked:
    """Return what ``halve.json`` lists."""
    path = directory / RECORD
    recorded = pattern_of(record, directory)
    if recorded is None:
        raise wrong(path, "it does not say what was pruned, and to what", REMEDY)
    if pattern is not None and pattern != recorded:
        raise InputError(f"{path} says that the matrices are {recorded}, not {pattern}: leave the pattern out")
    if missing := sorted({*record.layouts, *record.failed} - entries.keys()):
        raise InputError(f"{path} lists tensor {missing[0]!r} as pruned, and it is missing: prune the model again")
    left = {name: CONVOLUTION for name, layout in record.layouts.items() if layout == "conv"}
    layouts = {name: (layout,) for name, layout in record.layouts.items() if name not in left}
    return Asked(
        pattern=recorded, layouts=layouts, left=left | dict.fromkeys(record.failed, "pruning it failed"), recorded=True
    )


def _linear_tensors(source: Source, entries: Mapping[str, TensorEntry]) -> dict[str, tuple[Layout, ...]]:
    """Return the tensors on disk that hold weights of linear layers in the blocks, and the layouts they may have."""
    model = skeleton(source)
    disk = DiskLayout(model, [DiskTensor(entry.name, entry.dtype, entry.shape) for entry in entries.values()])
    found: dict[str, tuple[Layout, ...]] = {}
    inside = (pair for stack in find_stacks(model) for pair in stack.blocks.named_modules(prefix=stack.name))
    for path, module in inside:
        for leaf, parameter in module.named_parameters(recurse=False):
            plain = is_linear(module) and leaf == "weight"
            if not plain and not is_fused(module, parameter):
                continue
            location = disk.locate(f"{path}.{leaf}")
            swapped = is_conv1d(module) != location.transposed
            layouts: tuple[Layout, ...] = ("in_out",) if swapped else ("out_in",)
            found |= dict.fromkeys(location.tensors, layouts if plain else ("out_in", "in_out"))
    return found


def choose(
    asked: Asked, entries: Mapping[str, TensorEntry], bits: Bits | None
) -> tuple[dict[str, PackedTensor], dict[str, str]]:
    """Return how each tensor is packed that can be with all its bits, and why the others cannot.

    Args:
        asked: what is to be packed.
        entries: tensors on disk, by name.
        bits: of the integers that weights are rounded to; None leaves them as they are.

    Raises:
        InputError: a tensor on record is not in the pattern.
    """
    chosen, left = {}, dict(asked.left)
    for name, layouts in asked.layouts.items():
        entry = entries[name]
        if entry.dtype not in DTYPES:
            left[name] = f"{str(entry.dtype).removeprefix('torch.')} is not packed"
            continue
        reasons = {layout: _reason(entry, asked.pattern, layout, entries) for layout in layouts}
        packable = next((layout for layout, reason in reasons.items() if not reason), None)
        if packable is not None:
            shape = matrix_shape(entry.shape, packable)
            text, dtype = asked.pattern.text, entry.dtype
            chosen[name] = PackedTensor(pattern=text, shape=shape, dtype=dtype, layout=packable, bits=bits)
            continue
        left[name] = next((reason for reason in reasons.values() if reason != _DENSER), _DENSER)
        if asked.recorded and left[name] == _DENSER:
            raise InputError(
                f"tensor {name!r} is not in pattern {asked.pattern}, though {RECORD} lists it: the checkpoint was "
                "changed after pruning, prune it again"
            )
    return chosen, left


def _reason(entry: TensorEntry, pattern: Pattern, layout: Layout, entries: Mapping[str, TensorEntry]) -> str:
    """Say why a tensor cannot be packed; empty if it can."""
    d_out, d_in = matrix_shape(entry.shape, layout)
    if not d_out or not pattern.fits(d_in):
        return _DENSER
    if {entry.name + part for part in PARTS} & entries.keys():
        return "the checkpoint has a tensor of the name that a part of it would have"
    weight = as_matrix(read_tensor(entry), layout).contiguous()
    if pattern.satisfied_by(weight.view(BITS[entry.dtype.itemsize])):  # what has a bit set is what packing keeps
        return ""
    if pattern.satisfied_by(weight):
        return (
            "it has a -0.0 beyond the places of its group, which packing would not keep: make zeros +0.0, weight += 0.0"
        )
    return _DENSER
