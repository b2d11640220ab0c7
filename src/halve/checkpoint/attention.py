"""Which implementation of attention a model is run with here, which is not always the one that its config names."""

from collections.abc import Mapping
from typing import Any

from halve.errors import InputError

KINDS = ("eager", "sdpa")
"""Those that run on every device."""
_FIELDS = ("attn_implementation", "_attn_implementation")


def check_attention(asked: str | None) -> None:
    """Refuse an implementation of attention that does not run everywhere.

    Raises:
        InputError: it is not one of `KINDS`.
    """
    if asked is not None and asked not in KINDS:
        raise InputError(
            f"attention {asked!r} is not one that runs on every device: choose among {', '.join(KINDS)}, which only "
            "Halve's own passes use"
        )


def named_attention(config: Mapping[str, Any]) -> str | None:
    """Return the first implementation that needs a GPU and that a config names, at any depth; None if there is none."""
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            for name in _FIELDS:
                found = value.get(name)
                parts = found.values() if isinstance(found, Mapping) else (found,)
                for part in parts:
                    if isinstance(part, str) and "flash" in part:
                        return part
            pending += value.values()
    return None


def choices(asked: str | None, config: Mapping[str, Any]) -> tuple[tuple[str | None, ...], str]:
    """Return the implementations to try, the first that the model has being used, and what is to be said of it.

    Args:
        asked: by the user; None leaves it to the config.
        config: of the model.

    Returns:
        tuple[tuple[str | None, ...], str]: None among them leaves it to transformers; the sentence is empty where the
            config is followed.
    """
    named = named_attention(config)
    if asked is not None:
        return (asked,), ""
    if named is None:
        return (None,), ""
    note = f"the config names {named}, which needs a GPU and a package of its own: it is kept, and Halve runs without"
    return ("sdpa", "eager"), note
