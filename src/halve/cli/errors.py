"""How a command ends: Halve's errors as one sentence, and the exit code."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

import typer

from halve.cli.terminal import err, say
from halve.errors import (
    AlreadyCompleteError,
    CorruptFileError,
    HalveError,
    InputError,
    UnreadableFileError,
    UnsupportedModelError,
)
from halve.option_groups import OptionError

EXIT_FAILED = 1
"""A check found problems, or a run stopped because a matrix or the data failed."""
EXIT_REFUSED = 2
"""Bad arguments, an unsupported model, or a damaged or unreadable file of a model or a run; nothing was done."""
EXIT_FALLBACKS = 3
"""The run is complete, but some matrices were pruned by another method than asked; they are listed."""
EXIT_STOPPED = 4
"""The run was stopped; what is finished is kept, and ``halve resume`` continues it."""

EXIT_INTERRUPTED = 130
"""The user, or a signal, stopped it before there was anything to keep."""


_TELLING: ContextVar[bool] = ContextVar("telling", default=False)


@contextmanager
def telling_details(wanted: bool) -> Iterator[None]:
    """Print, inside, not only an error's sentence but also what led to it, where ``wanted``."""
    before = _TELLING.set(wanted)
    try:
        yield
    finally:
        _TELLING.reset(before)


@contextmanager
def reporting(out: Path | None = None) -> Iterator[None]:
    """Turn Halve's errors, Ctrl-C and SIGTERM into one sentence and an exit code.

    Args:
        out: the output directory of a run that can be resumed.
    """
    from transformers.utils import logging

    from halve.checkpoint.directory import is_unfinished

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours is the only one
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except AlreadyCompleteError as error:
        say(err, str(error))
        fell_back = out is not None and _has_fallbacks(out)
        raise typer.Exit(EXIT_FALLBACKS if fell_back else 0) from error
    except HalveError as error:
        message = error.with_flags() if isinstance(error, OptionError) else str(error)
        say(err, message, label="error", style="red")
        if error.details and _TELLING.get():
            say(err, error.details)
        if error.unfinished is not None:
            _say_how_to_resume(error.unfinished)
            raise typer.Exit(EXIT_STOPPED) from error
        refused = isinstance(error, InputError | UnsupportedModelError | CorruptFileError | UnreadableFileError)
        raise typer.Exit(EXIT_REFUSED if refused else EXIT_FAILED) from error
    except BrokenPipeError:  # whoever reads has read enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - flushed as Python ends
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        if out is not None and is_unfinished(out):
            say(err, "interrupted")
            _say_how_to_resume(out)
            raise typer.Exit(EXIT_STOPPED) from None
        say(err, "interrupted" if out is None else "interrupted: nothing was finished, and nothing is kept")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _has_fallbacks(out: Path) -> bool:
    """Whether the checkpoint's record has matrices that were pruned by another method than asked."""
    from halve.recorded import Record, read_record

    try:
        return read_record(out, Record).fell_back
    except HalveError as error:  # there is no other to end with
        say(err, str(error), label="error", style="red")
        raise typer.Exit(EXIT_REFUSED) from error


def _say_how_to_resume(out: Path) -> None:
    from halve.checkpoint.directory import is_training

    what = "what is done of the training is" if is_training(out) else "finished blocks are"
    say(err, f"{what} kept in {out}: continue with `halve resume {out}`")
