"""Checks of numbers that users give, in one wording: each names the number, what it may be and what it was."""

import math
from typing import TypeGuard

from halve.errors import InputError


def check_positive(name: str, value: object, *, above: float = 0.0) -> None:
    """Refuse ``value`` unless it is a finite number above ``above``; ``name`` is what the user knows it by.

    Raises:
        InputError: it is not.
    """
    if not is_number(value) or not above < value < math.inf:
        raise InputError(f"{name} must be a finite number above {above:g}, got {value!r}")


def check_not_negative(name: str, value: object) -> None:
    """Refuse ``value`` unless it is a finite number of at least 0.

    Raises:
        InputError: it is not.
    """
    if not is_number(value) or not 0.0 <= value < math.inf:
        raise InputError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Refuse ``value`` unless it is a whole number of at least ``least``.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is an int or a float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
