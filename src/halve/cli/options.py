"""Arguments and flags of commands: those that several share, and those made of groups of options.

What a command can be told is declared once, as fields of dataclasses. The help of a flag is what the group's docstring
says of the field, and a flag that is not given leaves the field at its own default. So a new field is a new flag,
without a line here.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Union, get_origin

import typer

from halve.cli.values import parse_number
from halve.option_groups import Option, members_of, options_of

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


GIVEN = "given"
"""The parameter of a command that receives what was given, by flat name."""


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


def taking(*roots: type[Any], without: Collection[str] = ()) -> Callable[[Any], Any]:
    """Give a command a flag for every option of some groups.

    Args:
        *roots: classes of groups.
        without: flat names of options that the command does not have.

    Returns:
        Callable[[Any], Any]: a decorator; the command's parameter ``given`` receives the values by flat name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        listed = [each for root in roots for each in options_of(root) if each.name not in without]
        options = list({each.name: each for each in reversed(listed)}.values())[::-1]  # those that are shared once
        own = [each for each in inspect.signature(command).parameters.values() if each.name != GIVEN]
        flags = [
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(each))
            for each in options
        ]

        def run(**arguments: Any) -> None:
            values = {each.name: _value(each, arguments.pop(each.name)) for each in options}
            command(**arguments, given={name: value for name, value in values.items() if value is not None})

        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own] + flags
        return with_parameters(run, parameters, command)

    return decorate


def _annotation(each: Option) -> Any:
    kind = _flag_type(each.kind)
    words = [each.help if each.help.endswith((".", "…")) else f"{each.help}."]
    if kind == list[str]:
        words.append("Repeatable.")
    if each.default not in (None, MISSING, ()) and kind is not bool:
        words.append(f"[default: {each.default}]")
    flag = f"--{each.name.replace('_', '-')}"
    shown = typer.Option(flag, help=" ".join(words), metavar="TEXT" if kind == list[str] else None)
    return Annotated[Union[kind, None], shown]  # noqa: UP007 - `kind` is a value here


def _flag_type(kind: Any) -> Any:
    """Return the type in which the command line reads an option: a plain one, or text that `_value` understands."""
    members = [member for member in members_of(kind) if member is not type(None)]
    if len(members) == 1 and members[0] in (bool, int, float):
        return members[0]
    if any(get_origin(member) in (tuple, Sequence) for member in members) and str not in members:
        return list[str]
    return Path if members == [Path] else str


def _value(each: Option, given: Any) -> Any:
    """Return what a flag says, as its option takes it; an empty list was not given."""
    members = members_of(each.kind)
    if given == []:
        return None
    return parse_number(given) if isinstance(given, str) and float in members and str in members else given
