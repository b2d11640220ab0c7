"""What can go wrong, named by what the user can do about it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def first_few(names: Sequence[str], few: int = 3) -> str:
    """Return what a message says of many names: the first of them, and how many there are besides."""
    rest = len(names) - few
    return ", ".join(names[:few]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with what it counts: ``counted(1, "row")``, ``counted(2, "matrix", "matrices")``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def one_line(error: BaseException) -> str:
    """Return an error of somebody else's code as part of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no reason given'}"


class HalveError(Exception):
    """Root of every error that Halve raises on purpose; its message is one sentence for the user.

    Attributes:
        unfinished: the output directory of a run that this error stopped and that can be resumed, if there is one.
    """

    unfinished: Path | None = None

    @property
    def details(self) -> str:
        """What the message leaves out: the errors that led to this one, a line for each; empty if there are none."""
        lines: list[str] = []
        error = _behind(self)
        while error is not None and len(lines) < _MOST_CAUSES:
            lines.append(one_line(error))
            error = _behind(error)
        return "\n".join(lines)


_MOST_CAUSES = 10


def _behind(error: BaseException) -> BaseException | None:
    if error.__cause__ is not None or error.__suppress_context__:
        return error.__cause__
    return error.__context__


class InputError(HalveError, ValueError):
    """An argument, option or file is not usable as given: change it and call again."""


class PatternError(InputError):
    """A sparsity pattern is malformed, or does not fit the shape it was asked for."""


class UnsupportedModelError(HalveError):
    """The model has a structure or a checkpoint that Halve cannot prune correctly, so it does not try."""


class CalibrationError(HalveError):
    """The calibration data did not give usable statistics: other text, more tokens, or a finite model."""


class LayerFailedError(HalveError):
    """A matrix could not be pruned as asked, and no fallback was allowed."""


class FactorisationError(HalveError):
    """A matrix could not be factorised, not even damped or in float64."""


class CorruptFileError(HalveError):
    """A file is truncated, malformed or contradicts another one: fetch or write it again."""


class UnreadableFileError(HalveError):
    """The system does not give a file's bytes: a volume is gone or fails, or permissions; the file may be sound."""


class AlreadyCompleteError(InputError):
    """There is nothing left to do: the run's checkpoint is complete, verified and in its place."""


class ResumeMismatchError(InputError):
    """An unfinished run was begun with other inputs, options or versions than it would now be continued with."""


@contextmanager
def noting(note: Callable[[HalveError], None]) -> Iterator[None]:
    """Hand the error that stops a block of statements to ``note``, for work that goes on after what is wrong."""
    try:
        yield
    except HalveError as error:
        note(error)
