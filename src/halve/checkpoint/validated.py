"""Untrusted JSON brought to its types: whole, or refused in one sentence that names the file and the field.

What may stand in a file is a `msgspec.Struct` beside the code that reads it. msgspec is strict (no number is taken for
a text, no true for a number), says where it stopped, needs no other package, and is fast enough for headers of a
hundred thousand tensors. JSON itself is parsed by `halve.checkpoint.shards.parse_object`, which msgspec's own parser
could not replace: that takes a repeated key. Ranges, and rules across fields and files, stay with who reads the file.
"""

import re
from pathlib import Path
from typing import TypeVar

import msgspec

from halve.errors import CorruptFileError

Content = TypeVar("Content")

OURS = "is not as Halve writes it"
"""What is said of a file that Halve wrote, or seems to have written."""
_MOST_SAID = 200
_PLACE = re.compile(r"(?P<what>.*) - at `(?P<of>key` in `)?\$(?P<place>.*)`", re.DOTALL)


def validated(
    content: object, kind: type[Content], path: Path, remedy: str, *, at: str = "", fault: str = OURS
) -> Content:
    """Return parsed JSON as an instance of ``kind``.

    Args:
        content: what was parsed.
        kind: what it has to be: a `msgspec.Struct`, or any other type that msgspec knows.
        path: the file, for the message.
        remedy: what the user can do, the end of the message.
        at: where in the file ``content`` stands; empty for all of it.
        fault: what the message says of the file.

    Raises:
        CorruptFileError: a field is missing, not known, or of another type.
    """
    try:
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, UnicodeError) as error:  # half of a surrogate pair is no UTF-8
        raise wrong(path, _said(str(error), at), remedy, fault=fault) from error


def wrong(path: Path, what: str, remedy: str, *, fault: str = OURS) -> CorruptFileError:
    """Return the error about a file that holds something else than what belongs into it."""
    return CorruptFileError(f"{path} {fault}: {shown(what)}; {remedy}")


def shown(text: str) -> str:
    """Return a stranger's text as it may stand in a message: one line of printable characters, not too long."""
    line = "".join(character if character.isprintable() else "?" for character in text)
    return line if len(line) <= _MOST_SAID else f"{line[: _MOST_SAID - 3]}..."


def _said(error: str, at: str) -> str:
    """Turn "Expected `int`, got `str` - at `$.shape[0]`" into "`shape[0]`: expected `int`, got `str`"."""
    found = _PLACE.fullmatch(error)
    what, place, of = (error, "", "") if found is None else (found["what"], found["place"], found["of"] or "")
    where = (at + place).lstrip(".")
    label = ("a key of " if of else "") + f"`{where}`: " if where else ""
    return label + what[:1].lower() + what[1:]
