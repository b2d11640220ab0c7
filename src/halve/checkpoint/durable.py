"""Files that are whole or absent, whatever happens: written under another name, flushed to the disk, then renamed.

A directory of them is put together and verified elsewhere, then moves to its place, the last files last. Who writes to
a directory holds its lock, and a killed process leaves none behind. (The package filelock would not make this shorter:
up to 3 it empties a file that another process holds, which says who; 4 leaves writing that down to us, and where
``flock`` is missing takes a file that a killed process leaves behind.)
"""

import errno
import fcntl
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from halve.checkpoint.directory import LAST
from halve.checkpoint.shards import CHUNK, reading
from halve.errors import CorruptFileError, HalveError, InputError

CRASH_POINT = "HALVE_CRASH_POINT"
"""Environment variable of the fault tests: ``name@k`` kills the process as it passes that crash point for the k-th
time."""
CRASH_LOG = "HALVE_CRASH_LOG"
"""Environment variable of the fault tests: a file to which every crash point passed is added, as ``name@k``."""
_SUFFIX = ".tmp"
_passed: Counter[str] = Counter()

Content = Iterable[bytes | memoryview]


def write_file(path: Path, chunks: Content, kind: str) -> str:
    """Write one file so that it is whole or absent even if the machine stops, and return its sha256 in hexadecimal.

    Args:
        path: the file, replaced if it exists; its directory is made if it does not.
        chunks: its content.
        kind: what it is, for the names of the crash points.

    Raises:
        OSError: the volume is full or failed; what was there under that name before is still there.
    """
    digest = hashlib.sha256()
    if not path.parent.exists():
        make_directory(path.parent)
    temporary = path.with_name(f".{path.name}{_SUFFIX}")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    crash_point(f"{kind}.start")
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                _append(file, chunk)
                digest.update(chunk)
            file.flush()
            crash_point(f"{kind}.written")
            os.fsync(file.fileno())
        crash_point(f"{kind}.synced")
        temporary.replace(path)
        crash_point(f"{kind}.renamed")
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    crash_point(f"{kind}.done")
    return digest.hexdigest()


class Write(Protocol):
    """How the files of a directory that is being filled are written, as `filling` yields it."""

    def __call__(self, name: str, chunks: Content, kind: str) -> str:
        """Write one file by its name in the directory, as `write_file` does."""


@contextmanager
def filling(directory: Path) -> Iterator[Write]:
    """Fill a directory, absent or empty; if that fails, take back what was written and the directories made for it.

    Args:
        directory: made if it does not exist.

    Raises:
        HalveError: the volume is full or failed; what cannot be read of the content is an `UnreadableFileError`.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    written: list[Path] = []

    def write(name: str, chunks: Content, kind: str) -> str:
        written.append(directory / name)
        return write_file(directory / name, chunks, kind)

    try:
        with writing(directory):
            make_directory(directory)
            yield write
    except BaseException:
        _remove(directory, written, made)
        raise


def _remove(directory: Path, written: list[Path], made: list[Path]) -> None:
    for path in written:
        path.unlink(missing_ok=True)
    emptied = {path.parent for path in written if path.parent != directory} | set(made)
    for place in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Say in one sentence what is wrong with a volume that could not be written to.

    Raises:
        HalveError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        hint = "free some space and call again" if error.errno == errno.ENOSPC else "check the volume and call again"
        raise HalveError(f"writing {where} failed ({error.strerror or error}): {hint}") from error


def _append(file: BinaryIO, chunk: bytes | memoryview) -> None:
    """Write one chunk: the one place where a full disk shows, so that tests can fill it."""
    file.write(chunk)


def move_file(path: Path, target: Path, kind: str) -> None:
    """Give a file that is on the disk already its final place on the same volume."""
    if not target.parent.exists():
        make_directory(target.parent)
    crash_point(f"{kind}.start")
    path.replace(target)
    crash_point(f"{kind}.renamed")
    sync_directory(target.parent)
    crash_point(f"{kind}.done")


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it, so that they survive a power loss."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal.

    Raises:
        UnreadableFileError: it cannot be read.
    """
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashed(chunks: Content) -> str:
    """Return the sha256 of all chunks together, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def file_chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, at most 16 MiB at a time.

    Raises:
        UnreadableFileError: it cannot be read.
    """
    with reading(path), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def crash_point(name: str) -> None:
    """Mark a place where a process may die; does nothing unless a fault test asks for it in the environment."""
    log, asked = os.environ.get(CRASH_LOG), os.environ.get(CRASH_POINT)
    if log is None and asked is None:
        return
    _passed[name] += 1
    here = f"{name}@{_passed[name]}"
    if log is not None:
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(here + "\n")
    if here == asked:
        os.kill(os.getpid(), signal.SIGKILL)


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


@contextmanager
def locked(path: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a directory for this process alone.

    Args:
        path: the lock's file, made if it does not exist.
        out: the directory, for the message.

    Raises:
        InputError: another process holds it; the message names that process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise InputError(
                f"{out} is being written by another process ({holder}): wait for it, or write to another directory"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
        crash_point("unlock")
    finally:
        os.close(descriptor)
