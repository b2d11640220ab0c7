"""The compiled part of the runtime, if it was built: what every other module asks."""

from functools import cache

__all__ = ["instruction_sets", "library"]

try:
    from halve.runtime import _native as library
except ImportError:
    library = None  # type: ignore[assignment]


@cache
def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that this processor can run, best first; empty if nothing was compiled."""
    return library.instruction_sets() if library is not None else ()
