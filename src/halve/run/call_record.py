"""What `halve.prune` was called with as JSON values, and back: what `halve.resume` goes by."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halve.errors import InputError, first_few
from halve.run.request import Request
from halve.serial import from_plain, to_plain


@dataclass(frozen=True)
class Call:
    """A call that can be repeated.

    Attributes:
        model: a directory, a file, or a name on the hub.
        request: what was asked for.
    """

    model: str
    request: Request


def written_down(model: Any, tokenizer: Any, request: Request) -> dict[str, Any] | None:
    """Return a call as JSON values, and the directory that relative paths in it are of.

    Args:
        model: as `halve.prune` was given it.
        tokenizer: likewise.
        request: what was asked for.

    Returns:
        dict[str, Any] | None: None if model, tokenizer or data are objects in memory.

    Raises:
        InputError: a value is none that JSON has.
    """
    source = request.calibration.source
    named = isinstance(model, str | Path) and (source is None or isinstance(source, str | Path))
    if tokenizer is not None or not named:
        return None
    relative = any(_is_relative(place) for place in (str(model), *_places(request)))
    call = {
        "model": str(model),
        "request": to_plain(replace(request, placement=replace(request.placement, work=None))),  # the run knows it
        "directory": str(Path.cwd()) if relative else None,
    }
    try:
        return dict(json.loads(json.dumps(call)))
    except TypeError as error:
        raise InputError(
            f"an argument cannot be kept for resuming the run ({error}): give plain Python numbers and strings"
        ) from error


def read_back(call: dict[str, Any]) -> Call:
    """Return the call that `written_down` has kept.

    Raises:
        InputError: relative paths in it are of another directory than the current one.
    """
    directory, request = call["directory"], from_plain(Request, call["request"])
    if directory is not None and directory != str(Path.cwd()):
        relative = [place for place in (call["model"], *_places(request)) if not Path(place).expanduser().is_absolute()]
        there = [place for place in relative if (Path(directory) / place).exists()]
        raise InputError(
            f"the run was begun in {directory} with paths relative to it ({first_few(there or relative)}): resume it "
            f"from there, cd {shlex.quote(directory)}"
        )
    return Call(call["model"], request)


def _places(request: Request) -> Iterator[str]:
    """Yield what may be paths."""
    texts = () if request.evaluation is None else request.evaluation.data
    images = None if request.image_evaluation is None else request.image_evaluation.images
    for place in (request.calibration.source, request.placement.offload, images, *texts):
        if isinstance(place, str | Path):
            yield str(place)


def _is_relative(value: str) -> bool:
    """Whether this is a path that depends on the current directory; names on the hub are none."""
    return not Path(value).expanduser().is_absolute() and Path(value).exists()
