"""The ``halve`` command: which commands there are. Each is loaded when it is called, so that help comes at once."""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version as installed
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from halve.cli.options import with_parameters
from halve.errors import InputError
from halve.lookup import find_row

COMMANDS = {
    "prune": ("prune:prune", "Prune a model to N:M sparsity and write an ordinary Hugging Face checkpoint."),
    "resume": ("prune:resume", "Continue a run that was stopped, from its first unfinished block, to the same bytes."),
    "learn": ("learning:learn", "Learn N:M masks end to end, weights too where the method trains them."),
    "apply-masks": ("learning:apply_masks", "Put learned masks onto the dense model that they were learned for."),
    "finetune": (
        "learning:finetune",
        "Train what a pruned model has kept to say what the dense model says; pruned zeros stay zeros.",
    ),
    "check": ("check:check", "Re-read the bytes on disk: the pattern holds, nothing is missing or touched."),
    "merge": ("learning:merge_command", "Merge an adapter into a pruned checkpoint, its zeros kept."),
    "eval": ("eval:evaluate_command", "Measure perplexity, accuracy on tasks, or both, of one model or of several."),
    "compare": ("compare:compare", "Prune with several methods, calibrated on the same tokens, and print one table."),
    "report": ("report:report", "Write the report of a pruned checkpoint again, or a page that compares several."),
    "generate": ("generate:generate", "Generate text, pruned layers run sparse where that is faster."),
    "plan": ("plan:plan_command", "Measure, before pruning, where sparsity makes a model faster on this machine."),
    "pack": ("pack:pack", "Pack the pruned matrices of a checkpoint: one bit a weight, and the kept values."),
    "unpack": (
        "pack:unpack",
        "Restore the plain checkpoint that was packed, byte for byte, or with its rounded weights.",
    ),
    "export": ("pack:export", "Write a checkpoint as a GGUF file, for llama.cpp and what is built on it."),
    "methods": ("compare:methods", "List the methods."),
    "version": ("app:version", "Print the version."),
}
"""By name, where a command is (a module of this folder, and the function) and what it does."""

_VERBOSE = inspect.Parameter(
    "verbose",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--verbose", help="Also print what led to an error.")],
)


def _with_verbose(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flag ``--verbose``."""
    from halve.cli.errors import telling_details

    def run(*, verbose: bool, **arguments: Any) -> None:
        with telling_details(verbose):
            command(**arguments)

    parameters = [*inspect.signature(command).parameters.values(), _VERBOSE]
    named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    return with_parameters(run, named, command)


class _Commands(TyperGroup):
    """A group whose commands are imported when they are called, and not to be listed."""

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        from halve.cli.errors import reporting

        module, _, name = COMMANDS[cmd_name][0].partition(":")
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        with reporting():  # what is imported may miss something, and says so in one sentence
            command = _with_verbose(getattr(import_module(f"halve.cli.{module}"), name))
        single.command(name=cmd_name)(command)
        return typer.main.get_command(single)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            find_row(COMMANDS, args[0], "command")
        except InputError as error:
            raise typer.BadParameter(str(error), ctx) from error
        return super().resolve_command(ctx, args)

    def format_commands(self, _ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes cut the names of options where a terminal is narrow
    help="Prune trained neural networks to N:M sparsity, and see what it cost.",
    epilog="Exit codes: 0 complete; 1 failed or problems found; 2 refused, nothing done; 3 complete with fallbacks; "
    "4 stopped, and `halve resume DIR` continues; 130 interrupted, nothing kept.",
)


def version() -> None:
    """Print the version."""
    typer.echo(f"halve {installed('halve')}")


def _show_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that belong to no command."""


def main() -> None:
    """Run the command line."""
    app()
