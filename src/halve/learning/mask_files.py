"""Masks alone, in a file of one bit a weight: what a domain adds to dense weights that everybody has.

It is a safetensors file with one tensor of packed bits for each target, in the order in which the parameter lies, first
entry in the lowest bit; its metadata names the pattern, the shapes and the dense model. For 2:4 that is an eighth of a
byte a weight, 1/16 of a checkpoint in bfloat16. A file is untrusted input: it is held to its own shapes and pattern,
and to the parameters that it is to mask.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from msgspec import Meta, Struct
from torch import Tensor

from halve.checkpoint.durable import write_file, writing
from halve.checkpoint.shards import LARGEST, file_of, parse_object, read_shard, read_tensor
from halve.checkpoint.validated import shown, validated, wrong
from halve.errors import InputError, PatternError, first_few
from halve.maths.pattern import Pattern, apply_mask
from halve.model.masked import PrunedParameter

VERSION = 1
REORDERED = "reordered"
"""The fact about a model, there only where it holds, that its channels were reordered."""
ORDERED_LIKE = "ordered_like"
"""The fact, beside that one, which models are known to have their channels in the same order: sha256 of their files,
with spaces between."""
_KEY = "halve_masks"
_REMEDY = "fetch it again, or learn the masks again"


class _Described(Struct, frozen=True, forbid_unknown_fields=True):
    """What the metadata say, in JSON."""

    version: int
    pattern: str
    shapes: dict[str, list[Annotated[int, Meta(ge=1, lt=LARGEST)]]]
    model: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class MaskFile:
    """The content of a file of masks.

    Attributes:
        pattern: that all of them have.
        masks: bool, of the parameters' shapes and laid out as they are, by name.
        model: facts about the dense model, as the writer gave them (its name, a hash of its weights, …).
    """

    pattern: Pattern
    masks: Mapping[str, Tensor]
    model: Mapping[str, str]


def write_masks(path: Path, masks: Mapping[str, Tensor], pattern: Pattern, model: Mapping[str, str]) -> None:
    """Write masks so that the file is whole or absent.

    Args:
        path: the file, replaced if it exists.
        masks: bool, laid out as the parameters, by name.
        pattern: ``N:M``, which they have.
        model: facts about the dense model, for whoever applies them.

    Raises:
        HalveError: the volume is full or failed.
    """
    packed = {name: _pack(mask) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    described = json.dumps({"version": VERSION, "pattern": str(pattern), "shapes": shapes, "model": dict(model)})
    with writing(path.parent):
        write_file(path, file_of(packed, {_KEY: described}), "masks")


def masked_names(path: Path) -> tuple[Pattern, frozenset[str]]:
    """Return the pattern of a file of masks, and the names of the parameters that it has masks of.

    Raises:
        CorruptFileError, UnreadableFileError, InputError: as `read_masks`.
    """
    described = _description(path)
    return _pattern(described.pattern, path), frozenset(described.shapes)


def masks_of_model(path: Path) -> dict[str, str]:
    """Return the facts about the dense model that are in a file of masks.

    Raises:
        CorruptFileError, UnreadableFileError, InputError: as `read_masks`.
    """
    return _description(path).model


def read_masks(path: Path, targets: Iterable[PrunedParameter]) -> MaskFile:
    """Read the masks of a model's parameters, on the CPU.

    Args:
        path: the file.
        targets: all parameters that are to be masked.

    Raises:
        CorruptFileError: the file is malformed, or its masks are not of the pattern that it names.
        UnreadableFileError: it cannot be read.
        InputError: it has no masks, or those of other parameters.
        UnsupportedModelError: it is a safetensors file of dtypes that Halve does not know.
    """
    entries = {entry.name: entry for entry in read_shard(path).tensors}
    described = _description(path)
    pattern = _pattern(described.pattern, path)
    wanted = {target.name: target for target in targets}
    odd = sorted(wanted.keys() ^ described.shapes.keys())
    if odd:
        raise InputError(
            f"{path} has masks of another model: {shown(first_few(odd))} {'is' if len(odd) == 1 else 'are'} only in "
            "one of the two; give the model that the masks were learned for"
        )
    if entries.keys() != described.shapes.keys():
        raise wrong(path, "its tensors are not those that its metadata name", _REMEDY)
    masks = {}
    for name, target in wanted.items():
        shape, entry = tuple(described.shapes[name]), entries[name]
        if shape != tuple(target.tensor.shape):
            raise InputError(
                f"{path} has masks of another model: {name} has shape {shape} there and {tuple(target.tensor.shape)} "
                "here; give the model that the masks were learned for"
            )
        if entry.dtype != torch.uint8 or entry.shape != (-(-math.prod(shape) // 8),):
            raise wrong(path, f"tensor {name!r} is not one bit for each of {math.prod(shape)} weights", _REMEDY)
        masks[name] = _unpack(read_tensor(entry), shape)
        grouped = target.inputs_last(masks[name])
        if not pattern.fits(grouped.shape[-1]) or bool(
            torch.ne(pattern.groups(grouped).sum(-1), pattern.keep or 0).any()
        ):
            raise wrong(path, f"the mask of {name!r} does not keep {pattern.keep} of every {pattern.group}", _REMEDY)
    return MaskFile(pattern=pattern, masks=masks, model=described.model)


@torch.no_grad()
def put_masks(targets: Iterable[PrunedParameter], masks: Mapping[str, Tensor]) -> None:
    """Zero what the masks prune, in place: exactly +0.0; what is kept keeps its bits (but -0.0, which becomes +0.0)."""
    for target in targets:
        weight = target.tensor
        weight.copy_(apply_mask(weight, masks[target.name].to(weight.device)))


def _description(path: Path) -> _Described:
    metadata = parse_object(read_shard(path).header[8:], path).get("__metadata__", {})
    if _KEY not in metadata:
        raise InputError(f"{path} has no masks that Halve wrote: give the file that learning with masks alone left")
    described = validated(parse_object(metadata[_KEY].encode(), path), _Described, path, _REMEDY, at="metadata")
    if described.version != VERSION:
        raise InputError(
            f"{path} has version {described.version} of the format of masks, and this Halve reads {VERSION}: "
            "read it with the Halve that wrote it"
        )
    return described


def _pattern(text: str, path: Path) -> Pattern:
    try:
        pattern = Pattern(text)
    except PatternError as error:
        raise wrong(path, str(error), _REMEDY) from error
    if not pattern.structured:
        raise wrong(path, f"pattern {pattern} has no groups", _REMEDY)
    return pattern


def _pack(mask: Tensor) -> Tensor:
    """Return uint8, (ceil(entries / 8),): the first entry in the lowest bit, spare bits 0."""
    bits = mask.detach().to("cpu").contiguous().flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: math.prod(shape)].bool().reshape(shape)
