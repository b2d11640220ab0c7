"""The compiled part of the runtime, if it was built: what every other module asks."""

from functools import cache
from importlib.util import find_spec

__all__ = ["broken", "instruction_sets", "library", "quantised_instruction_sets"]

broken = ""
"""Why the compiled module, which is there, cannot be loaded; empty if it can be, or was not built."""

try:
    from halve.runtime import _native as library
except ImportError as error:
    library = None  # type: ignore[assignment]
    if find_spec("halve.runtime._native") is not None:
        broken = " ".join(str(error).split())


@cache
def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that this processor can run, best first; empty if nothing was compiled."""
    return library.instruction_sets() if library is not None else ()


@cache
def quantised_instruction_sets() -> tuple[str, ...]:
    """Return those that this processor can multiply quantised weights with, best first; empty if none was compiled."""
    return library.quantised_instruction_sets() if library is not None else ()
