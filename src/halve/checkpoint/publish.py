"""Staged publication: files are put together and verified elsewhere, then move to their place, the last ones last."""

from collections.abc import Mapping
from pathlib import Path

from halve.checkpoint.directory import LAST
from halve.checkpoint.durable import move_file, sha256_of
from halve.errors import CorruptFileError


def move_into_place(staging: Path, out: Path, files: Mapping[str, str]) -> None:
    """Move the files of a finished directory to their final place; what an earlier attempt moved stays there.

    Args:
        staging: where they were put together, on the volume of ``out``.
        out: where they belong.
        files: sha256 of every file, by its name in the directory.

    Raises:
        CorruptFileError: a file was damaged since it was verified; nothing more was moved.
        OSError: the volume failed.
    """
    order = [*sorted(files.keys() - set(LAST)), *(name for name in LAST if name in files)]
    for name in order:
        staged = staging / name
        check_hash(staged if staged.exists() else out / name, files[name])
    for name in order:
        if (staging / name).exists():
            move_file(staging / name, out / name, name if name in LAST else "file")


def check_hash(path: Path, expected: str) -> None:
    """Refuse a file of an unfinished run that is not the one that was written.

    Raises:
        CorruptFileError: it is missing, or has another sha256 than ``expected``.
    """
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing: put it back, or remove the unfinished run and begin again")
    if sha256_of(path) != expected:
        raise CorruptFileError(
            f"{path} was changed since it was written: put it back, or remove the unfinished run and begin again"
        )
