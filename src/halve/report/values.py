"""Values of a record as a page takes them: numbers in range, and everything else as text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halve.recorded import MOST

_DEEPEST = 100


def finite_value(value: float) -> float:
    """Return a number that Halve could have put on record.

    Raises:
        ValueError: it is not finite, or too large.
    """
    if not abs(value) < MOST:
        raise ValueError(f"{value} is no loss, error or count")
    return value


def finite_or_none(value: float | None) -> float | None:
    """Return such a number, or None for None.

    Raises:
        ValueError: as `finite_value`.
    """
    return None if value is None else finite_value(value)


def perplexity_value(value: float | None, nll: float | None) -> float | None:
    """Return a perplexity; it is infinite where only its logarithm is on record."""
    return math.inf if value is None and nll is not None else value


def check_nesting(value: Any) -> None:
    """Refuse JSON that is nested so deeply that to show it, or to write it again, could end in a crash.

    Raises:
        ValueError: it is.
    """
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return
    raise ValueError(f"a value is nested more than {_DEEPEST} deep")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return any JSON as texts, by name.

    Raises:
        ValueError: as `check_nesting`.
    """
    check_nesting(values)
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value)) or "—"
    return "—" if value in (None, "") else str(value)
