"""Looking things up in the tables of methods and refits, with errors that help."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from halve.errors import InputError

Row = TypeVar("Row")


def find_row(table: Mapping[str, Row], name: str, kind: str) -> Row:
    """Return the row of ``table`` called ``name``; ``kind`` says in messages what its rows are.

    Raises:
        InputError: there is none; the message suggests what may have been meant.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    close = get_close_matches(str(name), table, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"unknown {kind} {name!r}: {hint}choose one of {', '.join(table)}")


def build_options(dataclass: type[Any], owner: str, options: Mapping[str, Any], prefix: str = "") -> Any:
    """Return ``dataclass(**options)``; ``owner`` and the ``prefix`` users write before names serve the message.

    Raises:
        InputError: there is no option of a given name, or a value is out of range.
    """
    allowed = [field.name for field in fields(dataclass)]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        known = f"its options are {', '.join(prefix + name for name in allowed)}" if allowed else "it takes none"
        raise InputError(f"{owner} has no option {prefix + unknown[0]!r}: {known}")
    return dataclass(**options)
