"""Options as fields of frozen dataclasses: declared once, they are keywords in Python and flags on the command line.

A group is a dataclass. Each of its fields is an option, known by one flat name: that of the field, with the prefix of
the group where it has one. A field that holds another group is expanded. So the whole of what a command can be told is
one tree of dataclasses; `options_of` lists its leaves, with the help that stands in the classes' docstrings, and `fill`
builds the tree from flat names.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from halve.errors import InputError

Group = TypeVar("Group")
_NAME, _SHARED, _PREFIX, _INTERNAL = "option_name", "option_shared", "option_prefix", "option_internal"
TRANSIENT = "option_transient"
"""Metadata of a field that says how something was asked for, and is no part of what is put on record."""


def option(default: Any = MISSING, *, name: str = "", shared: bool = False, transient: bool = False) -> Any:
    """Declare an option that is not known by its field's name, or that several groups share.

    Args:
        default: its value where nobody says; without one the option is required.
        name: what it is known by, whatever the group's prefix; empty keeps the field's name and the prefix.
        shared: whether other groups have it too, so that it is given once for all of them, without any prefix.
        transient: whether it only says how another field was asked for, and is not put on record.
    """
    return field(default=default, metadata={_NAME: name, _SHARED: shared, TRANSIENT: transient})


def group(default: Any = MISSING, *, factory: Any = MISSING, prefix: str = "") -> Any:
    """Declare a field that holds a group of options, whose names begin with ``prefix``."""
    return field(default=default, default_factory=factory, metadata={_PREFIX: prefix})


def internal(default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """Declare a field that is no option: nobody gives it by a flat name."""
    return field(default=default, default_factory=factory, metadata={_INTERNAL: True})


class OptionError(InputError):
    """Options do not go together; the message can name them as keywords or as flags.

    Args:
        template: the sentence, with a place in braces for each name.
        names: flat names.
    """

    def __init__(self, template: str, *names: str) -> None:
        super().__init__(template.format(*names))
        self._template = template
        self._names = names

    def with_flags(self) -> str:
        """Return the message as the command line has it."""
        return self._template.format(*[f"--{name.replace('_', '-')}" for name in self._names])


@dataclass(frozen=True)
class Option:
    """A leaf of a tree of groups.

    Attributes:
        name: the flat name, a keyword in Python; the flag has dashes instead of underscores.
        kind: its type.
        default: its value where nobody says, `dataclasses.MISSING` if it is required.
        help: what it is, from the docstring of its group, a sentence.
        shared: whether several groups have it.
        optional_group: whether it belongs to a group that may be left out altogether.
    """

    name: str
    kind: Any
    default: Any
    help: str
    shared: bool
    optional_group: bool


def options_of(root: type[Any]) -> tuple[Option, ...]:
    """Return every option of a tree of groups, those that are shared once."""
    found: dict[str, Option] = {}
    for entry in _walk(root, "", optional=False):
        first = found.setdefault(entry.name, entry)
        if first is not entry and not (first.shared and entry.shared):
            raise TypeError(f"two groups of {root.__name__} have an option {entry.name}")
    return tuple(found.values())


def fill(root: type[Group], given: Mapping[str, Any]) -> Group:
    """Build a tree of groups.

    Args:
        root: its class.
        given: values by flat name, and ready groups by the names of the fields that hold them; None is the same as
            not given.

    Raises:
        InputError: a name is unknown, an option is given twice, a group's required option is not given though others
            of it are, or a value is refused by its group.
    """
    given = {name: value for name, value in given.items() if value is not None}
    known = known_names(root)
    if unknown := next((name for name in given if name not in known), None):
        raise InputError(f"there is no option {unknown!r}: choose one of {', '.join(sorted(known))}")
    received: set[str] = set()
    filled = _fill(root, "", given, received)
    for each in options_of(root):
        if each.shared and each.name in given and each.name not in received:
            raise OptionError("{} is given twice, by itself and in a group: give it once", each.name)
    return filled


def known_names(root: type[Any]) -> Collection[str]:
    """Return every name that `fill` takes: of options, and of the fields that hold groups."""
    return {option.name for option in options_of(root)} | set(_group_fields(root))


def members_of(kind: Any) -> tuple[Any, ...]:
    """Return the types of which a value of a declared type may be: the members of a union, or that type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def docstring_of_fields(cls: type[Any]) -> dict[str, str]:
    """Return what the ``Attributes:`` of a class's docstring say of each field, as plain text, inherited ones too."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        found |= _described(each.__doc__ or "")
    return found


def _described(docstring: str) -> dict[str, str]:
    _, _, attributes = docstring.partition("Attributes:\n")
    found: dict[str, list[str]] = {}
    current = ""
    for line in attributes.splitlines():
        if re.match(r"    \w+:$", line):  # the next section
            break
        if entry := re.match(r"        (\w+): (.*)", line):
            current = entry[1]
            found[current] = [entry[2]]
        elif line.startswith(" " * 12) and current:
            found[current].append(line.strip())
    return {name: _plain(" ".join(lines)) for name, lines in found.items()}


def _plain(text: str) -> str:
    text = text[:1].upper() + text[1:]  # a value in quotes stays as it is written
    text = re.sub(r" \(`[\w.]+`\)", "", text)  # a reference for who reads the code
    text = re.sub(r"`halve\.[\w.]*?(\w+)`", r"\1", text)  # the name alone of what is referred to
    return text.replace("``", "").replace("`", "")


def _walk(cls: type[Any], prefix: str, *, optional: bool) -> Iterator[Option]:
    hints, helps = get_type_hints(cls), docstring_of_fields(cls)
    for each in fields(cls):
        if _INTERNAL in each.metadata or not each.init:
            continue
        if inner := _group_of(hints[each.name], each):
            yield from _walk(inner, each.metadata[_PREFIX], optional=optional or _may_be_none(hints[each.name]))
        else:
            yield Option(
                name=_flat_name(each, prefix),
                kind=hints[each.name],
                default=each.default if each.default_factory is MISSING else each.default_factory(),
                help=helps.get(each.name, ""),
                shared=each.metadata.get(_SHARED, False),
                optional_group=optional,
            )


def _fill(cls: type[Group], prefix: str, given: Mapping[str, Any], received: set[str]) -> Group:
    """Build a group, and note the names of the options that it takes."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for each in fields(cls):  # type: ignore[arg-type]
        inner = _group_of(hints[each.name], each)
        if inner is None:
            name = _flat_name(each, prefix)
            if name in given and _INTERNAL not in each.metadata:
                values[each.name] = given[name]
                received.add(name)
            continue
        own = [entry.name for entry in _walk(inner, each.metadata[_PREFIX], optional=False) if not entry.shared]
        asked = [name for name in own if name in given and (name != each.name or not isinstance(given[name], inner))]
        ready = given.get(each.name)
        if each.name in given and each.name not in own and not isinstance(ready, inner):
            raise InputError(f"{each.name} must be a halve.{inner.__name__}, got {type(ready).__name__}")
        if isinstance(ready, inner):
            if asked:
                raise OptionError("{} is given twice, by itself and in {}: give it once", asked[0], each.name)
            values[each.name] = ready
        elif asked or not _may_be_none(hints[each.name]):
            absent = _required_but_absent(inner, each.metadata[_PREFIX], given)
            if absent and asked:
                raise OptionError("{} goes with {}, which is not given: give it, or neither", asked[0], absent)
            values[each.name] = _fill(inner, each.metadata[_PREFIX], given, received)
    return cls(**values)


def _required_but_absent(cls: type[Any], prefix: str, given: Mapping[str, Any]) -> str | None:
    own = (entry for entry in _walk(cls, prefix, optional=False) if not entry.optional_group)
    return next((entry.name for entry in own if entry.default is MISSING and entry.name not in given), None)


def _group_fields(cls: type[Any]) -> Iterator[str]:
    hints = get_type_hints(cls)
    for each in fields(cls):
        if inner := _group_of(hints[each.name], each):
            yield each.name
            yield from _group_fields(inner)


def _flat_name(each: "dataclasses.Field[Any]", prefix: str) -> str:
    if each.metadata.get(_SHARED):
        return str(each.metadata[_NAME] or each.name)
    return str(each.metadata.get(_NAME) or prefix + each.name)


def _group_of(hint: Any, each: "dataclasses.Field[Any]") -> type[Any] | None:
    """Return the class of the group that a field holds, None for an option."""
    if _PREFIX not in each.metadata:
        return None
    return next(member for member in members_of(hint) if isinstance(member, type) and is_dataclass(member))


def _may_be_none(hint: Any) -> bool:
    return type(None) in members_of(hint)
