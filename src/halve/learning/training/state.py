"""A training on disk: what was asked, the states that it can go on from, and the way to a checkpoint in its place.

It lives in ``.halve`` inside its output directory, as a run does that prunes. The Trainer writes its states in place
and takes the newest, finished or not; here a state counts only when a mark with the sha256 of all its files lies in
it, which is written last. Optimiser and generator states are pickles: they are read back from this directory alone,
after their hash was checked, and by PyTorch's loader for plain weights, which runs no code.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct
from safetensors.torch import load_file
from torch import Tensor

from halve.checkpoint.directory import CONFIG, HOME, TRAINING, is_training, is_unfinished
from halve.checkpoint.durable import (
    check_hash,
    crash_point,
    locked,
    make_directory,
    move_into_place,
    sha256_of,
    sync_directory,
    write_file,
    writing,
)
from halve.checkpoint.room import refuse_contents
from halve.checkpoint.shards import file_of, read_json
from halve.checkpoint.validated import validated
from halve.errors import AlreadyCompleteError, CorruptFileError, InputError, ResumeMismatchError

MARK = "whole.json"
TEXT = "text.safetensors"
"""The rows of a training whose text cost much."""
_RUN = ("run.json", "work.json")
"""What a run that prunes has in that place instead."""
_TRAINED = "trained.safetensors"
_BEST = "best"
_LEARNER = "learner:"
"""What the names of a learner's own tensors begin with, beside those of parameters."""
_COMPLETE = "{} holds a finished checkpoint: nothing is left to do"
_REMEDY = "put it back, or remove the unfinished training and begin again"


class _Manifest(Struct, frozen=True, kw_only=True):
    """What a training began with, and what it has found out since."""

    fingerprint: dict[str, str]
    call: dict[str, Any] | None = None
    facts: dict[str, Any] = {}


class _Mark(Struct, frozen=True, kw_only=True):
    """The files of a whole state, with their sha256."""

    files: dict[str, str]


class TrainingFiles:
    """One training's files, held by this process alone; made by `open_training`.

    Args:
        out: the directory of the checkpoint.
        writes: whether this process writes; of several that train together the first one does.

    Attributes:
        out: the directory of the checkpoint.
        home: the directory in it that is the training's own.
        staging: where the checkpoint is put together.
    """

    def __init__(self, out: Path, *, writes: bool = True) -> None:
        self.out = out
        self.writes = writes
        self.home = out / HOME
        self.staging = self.home / "output"
        self._manifest: _Manifest | None = None
        path = self.home / TRAINING
        if path.exists():
            self._manifest = validated(read_json(path), _Manifest, path, _REMEDY)

    @property
    def begun(self) -> bool:
        """Whether there is a training to continue."""
        return self._manifest is not None

    @property
    def call(self) -> dict[str, Any] | None:
        """The call that began it; None where it cannot be written down."""
        return None if self._manifest is None else self._manifest.call

    def begin(self, fingerprint: Mapping[str, str], call: Mapping[str, Any] | None) -> None:
        """Note what decides the bytes of the result, unless that was done before."""
        if self._manifest is not None:
            return
        if self.writes:  # what lies here without a manifest belongs to nothing
            for path in (*self.home.glob("checkpoint-*"), self.staging):
                shutil.rmtree(path, ignore_errors=True)
            for path in self.home.glob(f"{_BEST}-*"):
                path.unlink()
        self._write(_Manifest(fingerprint=dict(fingerprint), call=None if call is None else dict(call)))

    def compare(self, fingerprint: Mapping[str, str]) -> None:
        """Compare what decides the bytes of the result with what was noted, if the training was begun.

        Raises:
            ResumeMismatchError: a field differs.
        """
        if self._manifest is None:
            return
        begun = self._manifest.fingerprint
        differing = sorted(
            name for name in begun.keys() | fingerprint.keys() if begun.get(name) != fingerprint.get(name)
        )
        if differing:
            name = differing[0]
            rest = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
            raise ResumeMismatchError(
                f"the training in {self.out} began otherwise: {name} was {begun.get(name, 'absent')} and is "
                f"{fingerprint.get(name, 'absent')}{rest}: call as it began, or give another directory"
            )

    def fact(self, name: str) -> Any:
        """Return what the training has found out under a name; None where it has not yet."""
        return None if self._manifest is None else self._manifest.facts.get(name)

    def keep_fact(self, name: str, value: Any) -> None:
        """Keep something for a training that goes on, as plain JSON values."""
        held = self._manifest
        if held is None:
            raise RuntimeError("the training was not begun")
        self._write(_Manifest(fingerprint=held.fingerprint, call=held.call, facts=held.facts | {name: value}))

    def newest(self) -> Path | None:
        """Return the newest whole state, and remove what was left of those that were never finished.

        Raises:
            CorruptFileError: a file of it was changed since it was marked.
        """
        found = []
        for path in self.home.glob("checkpoint-*"):
            if (path / MARK).exists():
                found.append(path)
            elif self.writes:
                shutil.rmtree(path)
        if not found:
            return None
        path = max(found, key=lambda each: int(each.name.rpartition("-")[2]))
        for name, sha256 in validated(read_json(path / MARK), _Mark, path / MARK, _REMEDY).files.items():
            check_hash(path / name, sha256)
        return path

    def mark(self, state: Path) -> None:
        """Mark a state as whole, once all its files are on the disk, and remove the states before it."""
        crash_point("state.written")
        with writing(state):
            files = {}
            for path in sorted(each for each in state.rglob("*") if each.is_file()):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                files[str(path.relative_to(state))] = sha256_of(path)
            sync_directory(state)
            write_file(state / MARK, [json.dumps({"files": files}).encode()], "mark")
        for older in self.home.glob("checkpoint-*"):
            if older != state:
                (older / MARK).unlink(missing_ok=True)
                crash_point("state.unmarked")
                shutil.rmtree(older)
        crash_point("state.done")

    def write_trained(self, state: Path, parameters: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Write the trained parameters, and a learner's own tensors, into a state."""
        self._write_tensors(state / _TRAINED, parameters, own, "trained")

    def read_trained(self, state: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the parameters of a state back in place, and return the learner's own tensors."""
        return self._read_tensors(state / _TRAINED, parameters)

    def write_best(
        self, step: int, parameters: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: int | None = None
    ) -> None:
        """Keep the weights of a step that the held-out text likes best so far; those before it are removed.

        Args:
            step: optimiser steps done.
            parameters: that are trained, by name.
            own: a learner's own tensors.
            needed: a step before it whose weights stay: the best one of the newest state, from which a stopped
                training goes on.
        """
        path = self.home / f"{_BEST}-{step}.safetensors"
        sha256 = self._write_tensors(path, parameters, own, "best")
        with writing(path):
            write_file(path.with_suffix(".json"), [json.dumps({"files": {path.name: sha256}}).encode()], "best")
        for older in self.home.glob(f"{_BEST}-*"):
            if older.stem not in {path.stem, f"{_BEST}-{needed}"}:
                older.unlink()

    def read_best(self, step: int, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the weights of that step back in place, and return the learner's own tensors.

        Raises:
            CorruptFileError: they are missing, or were changed.
        """
        path = self.home / f"{_BEST}-{step}.safetensors"
        note = path.with_suffix(".json")
        if not note.exists():
            raise CorruptFileError(f"{note} is missing: {_REMEDY}")
        check_hash(path, validated(read_json(note), _Mark, note, _REMEDY).files[path.name])
        return self._read_tensors(path, parameters)

    def prepare_staging(self) -> Path:
        """Return the directory to put the checkpoint together in, empty."""
        shutil.rmtree(self.staging, ignore_errors=True)
        return self.staging

    def publish(self, files: Mapping[str, str]) -> None:
        """Move the verified checkpoint to its place, and remove everything else.

        A training that is stopped meanwhile is called again, finds its last state, and does this again.

        Args:
            files: sha256 of every file in `staging`, by name.

        Raises:
            CorruptFileError: a file was damaged since it was verified; nothing more was moved.
            HalveError: the volume failed.
        """
        with writing(self.out):
            move_into_place(self.staging, self.out, files)
            self.remove()

    def remove(self) -> None:
        """Remove everything of the training but its checkpoint; without its manifest nobody goes on with the rest."""
        crash_point("remove.start")
        (self.home / TRAINING).unlink(missing_ok=True)
        crash_point("remove.file")
        shutil.rmtree(self.home)
        crash_point("remove.done")

    def _write_tensors(self, path: Path, parameters: Mapping[str, Tensor], own: Mapping[str, Tensor], kind: str) -> str:
        tensors = {**parameters, **{f"{_LEARNER}{name}": value for name, value in own.items()}}
        with writing(path):
            return write_file(path, file_of(tensors), kind)

    def _read_tensors(self, path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held = load_file(path)
        own = {name.removeprefix(_LEARNER): held.pop(name) for name in list(held) if name.startswith(_LEARNER)}
        if held.keys() != parameters.keys():
            raise CorruptFileError(f"{path} holds other parameters than are trained: {_REMEDY}")
        for name, parameter in parameters.items():
            parameter.data.copy_(held[name])
        return own

    def _write(self, manifest: _Manifest) -> None:
        content = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
        self._manifest = manifest
        if not self.writes:
            return
        with writing(self.home):
            write_file(self.home / TRAINING, [json.dumps(content, indent=2).encode()], "manifest")


@contextmanager
def open_training(out: Path) -> Iterator[TrainingFiles]:
    """Hold the directory of a training for this process alone.

    Args:
        out: the directory of the checkpoint, made if it does not exist.

    Raises:
        InputError: another process holds it, or it has other contents than a training's.
        CorruptFileError: what the training in it has kept was damaged.
        AlreadyCompleteError: its checkpoint is complete.
    """
    home = out / HOME
    if not home.is_dir():
        refuse_contents(out)
    elif any((home / name).exists() for name in _RUN) or any(home.glob("block-*")):
        raise InputError(f"{out} holds an unfinished run of halve prune: complete it with `halve resume {out}`")
    new = [path for path in (home, *home.parents) if not path.exists()]
    make_directory(home)
    with locked(home / "lock", out):
        files: TrainingFiles | None = None
        try:
            files = TrainingFiles(out)
            _refuse_complete(files)
            yield files
        except BaseException:
            if files is None or not (files.begun or (home / TEXT).exists()):
                shutil.rmtree(home, ignore_errors=True)
            for path in new:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
            raise


def _refuse_complete(files: TrainingFiles) -> None:
    """Complete what a process began that was stopped while it cleared the training away."""
    if not files.begun and (files.out / CONFIG).exists():
        files.remove()
        raise AlreadyCompleteError(_COMPLETE.format(files.out))


def recorded_training(out: Path) -> dict[str, Any] | None:
    """Return the call that began the unfinished training in a directory; None where there is no training in it.

    Raises:
        InputError: it was given objects in memory.
        AlreadyCompleteError: its checkpoint is complete.
    """
    home = out / HOME
    if not is_training(out):
        if not is_unfinished(out) and (out / CONFIG).exists():
            raise AlreadyCompleteError(_COMPLETE.format(out))
        if (home / TEXT).exists():
            raise InputError(f"the training in {out} was stopped before it began; its text is kept: call it again")
        if (out / CONFIG).exists() and not any((home / name).exists() for name in _RUN):
            with open_training(out):
                pass
        return None
    call = TrainingFiles(out).call
    if call is None:
        raise InputError(f"the training in {out} was given a model in memory: call with the same again")
    return call
