"""Groups of options as plain JSON values and back: the one way in which what was asked for is written down.

The record of a call, the fingerprint of a run and ``halve.json`` all use it, so that a new option is in all three.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import torch

from halve.device import parse_dtype
from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.option_groups import TRANSIENT, members_of

Kind = TypeVar("Kind")


def to_plain(value: Any) -> Any:
    """Return a value as JSON has it: groups as objects, patterns, paths and dtypes as their names, tuples as lists.

    Values that JSON has no word for are left as they are, for whoever writes them to refuse.
    """
    if isinstance(value, Pattern):
        return value.text
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Path | torch.device):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        kept = [each.name for each in fields(value) if not each.metadata.get(TRANSIENT)]
        return {name: to_plain(getattr(value, name)) for name in kept}
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(inner) for inner in value]
    return value


def from_plain(kind: type[Kind], value: Mapping[str, Any]) -> Kind:
    """Return the group of a class that `to_plain` has written down; fields that are absent keep their defaults.

    Raises:
        InputError: there is no field of a name, or the group refuses a value.
    """
    hints = get_type_hints(kind)
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    if strange := sorted(value.keys() - known):
        raise InputError(f"{kind.__name__} has no field {strange[0]!r}: it was written by another version of Halve")
    return kind(**{name: _read(hints[name], inner) for name, inner in value.items()})


def _read(kind: Any, value: Any) -> Any:
    """Return a value of the type that a field is declared with; of a union, of the member that it fits."""
    members = members_of(kind)
    if members != (kind,):
        return next((_read(member, value) for member in members if _fits(member, value)), value)
    if not _fits(kind, value):
        return value
    if kind is Pattern or kind is Path:
        return kind(value)
    if kind is torch.dtype:
        return parse_dtype(value)
    if is_dataclass(kind) and isinstance(kind, type):
        return from_plain(kind, value)
    if get_origin(kind) is tuple:
        return tuple(value)
    return value


def _fits(kind: Any, value: Any) -> bool:
    if kind is Pattern or kind is torch.dtype or kind is Path:
        return isinstance(value, str)
    if is_dataclass(kind):
        return isinstance(value, Mapping)
    if get_origin(kind) in (tuple, Sequence):
        return isinstance(value, list)
    return isinstance(kind, type) and isinstance(value, kind)
