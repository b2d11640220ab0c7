"""What users write on the command line, turned into values."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halve.cli.terminal import warn_if_crowded
from halve.errors import InputError


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Run on as many threads as ``--threads`` says, None for as many as torch takes; warn of more than processors.

    Raises:
        InputError: no number of threads.
    """
    import torch

    from halve.checks import check_count

    before = torch.get_num_threads()
    if count is not None:
        check_count("threads", count)
        warn_if_crowded(count, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parse_number(text: str) -> float | str:
    """Parse an option that is a number or a word, which its group judges."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Parse ``NAME=VALUE``; a value that reads as JSON is what it reads as, and any other is text.

    Raises:
        InputError: a pair has no name or no value, or a name comes twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise InputError(
                f"--option {pair!r} is not understood: write NAME=VALUE, for example beta=1.02 or refit_steps=200"
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        key = name.replace("-", "_")
        if key in options:
            raise InputError(f"--option {name} is given twice: give it once")
        options[key] = value
    return options


def merge_options(options: dict[str, Any], **flags: Any) -> dict[str, Any]:
    """Add the options that have a flag of their own to those of ``--option``; a flag of None was not given.

    Raises:
        InputError: an option was given both ways.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if twice := next((name for name in given if name in options), None):
        raise InputError(f"{twice} is given twice: give it once, by -o or by --{twice.replace('_', '-')}")
    return options | given


def parse_options_by_method(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """Parse ``METHOD.NAME=VALUE`` into options by method.

    Raises:
        InputError: a pair is not of that form.
    """
    grouped: dict[str, list[str]] = {}
    for pair in pairs:
        method, dot, rest = pair.partition(".")
        if not dot or "=" in method:
            raise InputError(
                f"--option {pair!r} is not understood: write METHOD.NAME=VALUE, for example prox-gradient.beta=1.02"
            )
        grouped.setdefault(method, []).append(rest)
    return {method: parse_options(rests) for method, rests in grouped.items()}


def allowed_fallback(fallback: str | None, *, strict: bool) -> str | None:
    """Return the method for what the asked one fails on: the one given; None, to stop there, in strict runs."""
    return "magnitude" if fallback is None and not strict else fallback
