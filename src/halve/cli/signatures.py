"""Functions that typer sees with other parameters than they are written with."""

import inspect
from collections.abc import Callable, Sequence


def with_parameters(
    function: Callable[..., None], parameters: Sequence[inspect.Parameter], like: Callable[..., None]
) -> Callable[..., None]:
    """Make a function look as if it had these keyword parameters, with their annotations.

    Args:
        function: takes any keywords.
        parameters: what it is shown to take.
        like: another function, whose name and docstring it gets.
    """
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in parameters}
    function.__doc__, function.__name__ = like.__doc__, like.__name__
    return function
