"""Whether a directory can be written to without harm, and whether its volume has room: asked before any work.

The one home of "does it fit on the disk?"; memory is asked for in `halve.memory`.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from halve.checkpoint.directory import CONFIG, is_unfinished
from halve.checkpoint.load import Source
from halve.errors import InputError


def check_destination(out: Path, source: Source | None, bytes_needed: int) -> None:
    """Check that a checkpoint can be written to ``out`` without harm, before any work is done.

    Args:
        out: the directory to write: absent, empty, or with an unfinished run in it.
        source: what is going to be pruned; None for a model built in memory.
        bytes_needed: size of the output in bytes.

    Raises:
        InputError: ``out`` is in use, is or lies in the input, cannot be written, or its volume is too full.
    """
    if source is not None:
        for path in {source.path.resolve(), *(path.resolve().parent for path in source.shards)}:
            _check_apart(out, path)
    real = out.resolve()
    if out.is_symlink() and not out.exists():
        raise InputError(f"{out} is a link to nothing: remove it, or give the directory it should point to")
    if not is_unfinished(out):
        if (out / CONFIG).exists():
            raise InputError(f"{out} holds a finished checkpoint: give a new directory")
        refuse_contents(out)
    volume = next(path for path in (real, *real.parents) if path.exists())
    if not volume.is_dir() or not os.access(volume, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be created: {volume} is not a directory you can write to")
    if not is_unfinished(out):  # what is still needed of an unfinished run is known later
        check_space(out, bytes_needed)


def refuse_contents(out: Path) -> None:
    """Refuse a path that is neither absent nor an empty directory.

    Raises:
        InputError: something is there.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file: give the name of a directory to create")
    if any(out.iterdir()):
        raise InputError(f"{out} is not empty: give a new directory, or empty this one")


def check_space(
    directory: Path, bytes_needed: int, what: str = "", remedy: str = "free some space, or write elsewhere"
) -> None:
    """Check that the volume of a directory has room.

    Args:
        directory: it need not exist yet.
        bytes_needed: there.
        what: they are for, where the directory's name does not tell.
        remedy: what the user can do.

    Raises:
        InputError: the volume is too full.
    """
    real = directory.resolve()
    free = shutil.disk_usage(next(path for path in (real, *real.parents) if path.exists())).free
    if free < bytes_needed:
        purpose = f" for {what}" if what else ""
        raise InputError(
            f"{directory} needs {bytes_needed / 1e9:.2f} GB{purpose} and its volume has {free / 1e9:.2f} GB free: "
            f"{remedy}"
        )


def same_volume(one: Path, other: Path) -> bool:
    """Whether two existing files or directories take their space from the same volume."""
    return one.stat().st_dev == other.stat().st_dev


def check_shared_space(needs: Sequence[tuple[Path, int]]) -> None:
    """Check that the volumes of several directories have room, together where they share one.

    Args:
        needs: each directory, which is there already, with the bytes that it needs.

    Raises:
        InputError: a volume is too full.
    """
    pending = list(needs)
    while pending:
        directory = pending[0][0]
        sharing = [need for need in pending if same_volume(need[0], directory)]
        check_space(directory, sum(size for _, size in sharing))
        pending = [need for need in pending if need not in sharing]


def _check_apart(out: Path, taken: Path) -> None:
    real = out.resolve()
    ancestors = [path for path in (real, *real.parents) if path.exists()]
    if any(path.samefile(taken) for path in ancestors):  # by inode, so that a bind mount is seen through
        raise InputError(f"{out} is, or lies in, the input {taken}: write to a directory of its own")
    if taken.is_relative_to(real):
        raise InputError(f"{out} contains the input {taken}: write to a directory of its own")
