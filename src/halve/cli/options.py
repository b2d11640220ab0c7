"""Arguments and options that several commands share, with their help texts, and how a function is given more."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(help="A directory, a .gguf file, or a Hugging Face hub id.")]
PatternOption = Annotated[str, typer.Option(help="N:M keeps N of every M weights; S% zeroes S percent of a row.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
StrictOption = Annotated[
    bool, typer.Option("--strict/--no-strict", help="Stop where a method fails; else as with --fallback magnitude.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Of the CPU.", show_default="as torch chooses")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Read it first.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


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
