"""The state of a run on disk: what was asked, every finished block, and the way to a checkpoint that is in its place.

A run lives in ``.halve`` inside its output directory (its blocks elsewhere, if asked). Every block is committed as it
is finished: its tensors first, then the manifest that names them with their sha256. The checkpoint is put together
and verified in there, and its files then move to their final names, ``config.json`` last: a directory that can be
loaded is complete.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msgspec import Struct
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from halve.checkpoint.directory import CONFIG, HOME, is_unfinished
from halve.checkpoint.durable import (
    check_hash,
    crash_point,
    locked,
    make_directory,
    move_into_place,
    write_file,
    writing,
)
from halve.checkpoint.room import refuse_contents, same_volume
from halve.checkpoint.shards import file_of, read_json
from halve.checkpoint.validated import validated
from halve.errors import AlreadyCompleteError, CorruptFileError, InputError, ResumeMismatchError
from halve.provenance import Fingerprint, differences
from halve.run.manifest import MANIFEST, Manifest, read_manifest
from halve.text.tokens import SELF, Cut, TokenSet

_TOKENS = "calibration.safetensors"
_WORK = "work.json"
_RECORD = "record"
_HIDDEN = "hidden-"


class RunDirectory:
    """One run's state, held by this process alone; made by `open_run`.

    Attributes:
        out: the directory of the checkpoint.
        home: the directory in it that is the run's own.
        staging: where the checkpoint is put together.
        state: where finished blocks are kept.
        reserved: bytes that the checkpoint and the blocks which are not finished are going to take.
    """

    def __init__(self, out: Path, state: Path) -> None:
        self.reserved = 0
        self.out = out
        self.state = state
        self.home = out / HOME
        self.staging = self.home / "output"
        self._manifest = read_manifest(state / MANIFEST) if (state / MANIFEST).exists() else None
        if self._manifest is None and any(state.glob("block-*.safetensors")):
            raise CorruptFileError(
                f"{state / MANIFEST}, which names the finished blocks beside it, is missing: put it back, or remove "
                f"{self.home} and the blocks, and begin again"
            )

    @property
    def begun(self) -> bool:
        """Whether there is a run to continue."""
        return self._manifest is not None

    @property
    def committed(self) -> int:
        """Number of finished blocks."""
        return 0 if self._manifest is None else len(self._manifest.blocks)

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What the run began with; None if there is none to continue."""
        return None if self._manifest is None else self._manifest.fingerprint

    @property
    def worth_keeping(self) -> bool:
        """Whether it would cost anything to begin again: something is finished, or the model wrote its own text."""
        wrote = self._manifest is not None and (self._manifest.tokens or {}).get("facts", {}).get("source") == SELF
        return bool(self.committed) or self.verified or wrote

    @property
    def kept_bytes(self) -> int:
        """Size of the finished blocks."""
        blocks = [] if self._manifest is None else self._manifest.blocks
        return sum((self.state / name).stat().st_size for name, _ in blocks if (self.state / name).exists())

    @property
    def call(self) -> dict[str, Any] | None:
        """The call that began the run (`halve.run.call_record`); None where it cannot be written down."""
        return None if self._manifest is None else self._manifest.call

    @property
    def verified(self) -> bool:
        """Whether the checkpoint is put together and verified, so that only its files have to be moved."""
        return self._manifest is not None and self._manifest.files is not None

    def check_contents(self) -> None:
        """Refuse a directory that holds more than this run; tidy up one whose checkpoint is in its place already.

        Raises:
            AlreadyCompleteError: the run was stopped after its last file had been moved.
            InputError: the directory holds something else besides.
        """
        if (self.out / CONFIG).exists() and (self._manifest is None or self.verified):
            if self.verified:
                self.publish()
            else:
                self.remove()
            raise AlreadyCompleteError(f"the run in {self.out} was complete but for tidying up, which is done now")
        ours = {HOME} | ({Path(name).parts[0] for name in self._manifest.files or {}} if self._manifest else set())
        strange = sorted(path.name for path in self.out.iterdir() if path.name not in ours)
        if strange:
            raise InputError(
                f"{self.out} holds {strange[0]}, which is not of the run in it: remove that, or write elsewhere"
            )

    def check_code(self, fields: Fingerprint) -> None:
        """Refuse Python files that are not those with which the run began, before they are run.

        Args:
            fields: of the fingerprint, see `halve.provenance.code_fields`.

        Raises:
            ResumeMismatchError: one was changed, added or taken away.
        """
        if self._manifest is None:
            return
        begun = {name: value for name, value in self._manifest.fingerprint.items() if name.endswith(".py")}
        self._refuse(differences(begun, fields))

    def _refuse(self, found: list[str]) -> None:
        if found:
            raise ResumeMismatchError(
                f"{self.out} holds an unfinished run that was begun differently ({'; '.join(found)}): call as "
                "then, or write to a new directory"
            )

    def tokens(self, asked: Mapping[str, Any]) -> TokenSet | None:
        """Return the calibration tokens that the run began with; None if they were asked for otherwise.

        Raises:
            CorruptFileError: the file was damaged.
        """
        kept = None if self._manifest is None else self._manifest.tokens
        if kept is None or kept["asked"] != dict(asked):
            return None
        path = self.state / _TOKENS
        check_hash(path, kept["sha256"])
        cut = kept["facts"].get("cut")
        return TokenSet(load_file(path)["ids"], **kept["facts"] | {"cut": None if cut is None else Cut(**cut)})

    def measured(self, asked: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return the dense model's perplexities that were kept; None if none were, or they were asked for otherwise."""
        kept = None if self._manifest is None else self._manifest.measured
        return None if kept is None or kept["asked"] != dict(asked) else kept["scores"]

    def keep_measured(self, asked: Mapping[str, Any], scores: list[dict[str, Any]]) -> None:
        """Keep the dense model's perplexities for a run that is continued.

        Args:
            asked: on which texts and how, as plain JSON values.
            scores: likewise, one a text.

        Raises:
            HalveError: the volume is full or failed.
        """
        manifest = self._present()
        manifest.measured = {"asked": dict(asked), "scores": scores}
        manifest.write(self.state)

    def begin(
        self,
        fingerprint: Fingerprint,
        call: Mapping[str, Any] | None,
        tokens: TokenSet | None,
        asked: Mapping[str, Any],
        fallback: str | None = None,
    ) -> None:
        """Start a run, or make sure that the one in this directory is this one.

        Args:
            fingerprint: of this run.
            call: arguments that would repeat it, None if they cannot be written down.
            tokens: calibration tokens, kept for a run that is continued.
            asked: how they were asked for.
            fallback: method for matrices that the asked one fails on; a run that was begun without one may be
                continued with one, which is no difference for the blocks that did not need it.

        Raises:
            ResumeMismatchError: the run in this directory was begun with something else.
        """
        manifest = self._manifest
        if manifest is not None:
            found = differences(manifest.fingerprint, fingerprint)
            if manifest.fallback not in (None, fallback):
                found.append(f"fallback was {manifest.fallback} and is {fallback}")
            self._refuse(found)
            if manifest.fallback != fallback:
                manifest.fallback = fallback
                manifest.call = manifest.call if call is None else dict(call)
                manifest.write(self.state)
            return
        kept = None
        if tokens is not None:
            ids = tokens.ids.contiguous()
            content = file_of({"ids": ids})
            facts = {
                "source": tokens.source,
                "sha256": tokens.sha256,
                "documents": tokens.documents,
                "separator": tokens.separator,
                "revision": tokens.revision,
                "bos": tokens.bos,
                "lead": tokens.lead,
                "cut": None if tokens.cut is None else asdict(tokens.cut),
            }
            with writing(self.state):
                sha256 = write_file(self.state / _TOKENS, content, "tokens")
            kept = {"sha256": sha256, "facts": facts, "asked": dict(asked)}
        manifest = Manifest(dict(fingerprint), None if call is None else dict(call), fallback, kept)
        manifest.write(self.state)
        self._manifest = manifest

    def commit(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep the next finished block: it will not be worked on again.

        Args:
            tensors: the parameters that differ from the dense model's, by name.
            record: what was done, as plain JSON values.

        Raises:
            HalveError: the volume is full or failed; blocks committed before are still there.
        """
        manifest = self._present()
        content = file_of(tensors, {_RECORD: json.dumps(record)})
        name = f"block-{len(manifest.blocks):05d}.safetensors"
        with writing(self.state):
            manifest.blocks.append((name, write_file(self.state / name, content, "block")))
        if same_volume(self.state, self.out):
            self.reserved = max(0, self.reserved - (self.state / name).stat().st_size)
        try:
            manifest.write(self.state)
        except BaseException:
            manifest.blocks.pop()
            raise

    def read(self, block: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the record of a committed block.

        Raises:
            CorruptFileError: its file is missing or was damaged.
        """
        name, sha256 = self._present().blocks[block]
        path = self.state / name
        check_hash(path, sha256)
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()[_RECORD])
        return load_file(path), record

    def path(self, block: int) -> Path:
        """Return the file of a committed block, which holds its changed parameters by name."""
        return self.state / self._present().blocks[block][0]

    def prepare_staging(self) -> Path:
        """Return the directory to put the checkpoint together in, without what an earlier attempt left there."""
        shutil.rmtree(self.staging, ignore_errors=True)
        return self.staging

    def tidy(self) -> None:
        """Remove what a stopped process has left that is of no use to this one, before room is asked for."""
        if not self.verified:
            shutil.rmtree(self.staging, ignore_errors=True)
        shutil.rmtree(self.computed, ignore_errors=True)
        shutil.rmtree(self.workers, ignore_errors=True)
        for folder in self.home.glob(f"{_HIDDEN}*"):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def computed(self) -> Path:
        """The folder for weights that loading computes, of a model whose weights stay on disk."""
        return self.home / "weights"

    @property
    def workers(self) -> Path:
        """The folder for what workers on this machine keep."""
        return self.home / "workers"

    def hidden(self, name: str) -> Path:
        """Return a folder for hidden states."""
        return self.home / f"{_HIDDEN}{name}"

    def check_blocks(self) -> None:
        """Make sure that the committed blocks are what was written.

        Raises:
            CorruptFileError: a file is missing or was damaged.
        """
        for name, sha256 in self._present().blocks:
            check_hash(self.state / name, sha256)

    def publish(self, files: Mapping[str, str] | None = None) -> None:
        """Move the verified checkpoint to its place, and remove everything else.

        Args:
            files: sha256 of every file in `staging`, by name; None continues a move that was interrupted.

        Raises:
            CorruptFileError: a file was damaged since it was verified; nothing more was moved.
        """
        manifest = self._present()
        if files is not None:
            manifest.files = dict(files)
            manifest.write(self.state)
        names = manifest.files or {}
        with writing(self.out):
            move_into_place(self.staging, self.out, names)
            self.remove()

    def remove(self) -> None:
        """Take the run's state away: the checkpoint is complete, or there is nothing worth keeping."""
        crash_point("remove.start")
        blocks = [] if self._manifest is None else [name for name, _ in self._manifest.blocks]
        for path in (*(self.state / name for name in (*blocks, _TOKENS)), self.state / MANIFEST):  # the manifest last
            path.unlink(missing_ok=True)
            crash_point("remove.file")
        shutil.rmtree(self.home)
        for directory in {self.state, self.out}:
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()
        crash_point("remove.done")

    def _present(self) -> Manifest:
        if self._manifest is None:
            raise RuntimeError("the run was not begun")
        return self._manifest


@contextmanager
def open_run(out: Path, work: Path | None = None) -> Iterator[RunDirectory]:
    """Hold a run's directory for this process alone.

    Args:
        out: the directory of the checkpoint, made if it does not exist.
        work: a directory for the finished blocks; None keeps them inside ``out``, or where the run in ``out`` began.

    Raises:
        InputError: another process holds it, or it has other contents than a run's.
        CorruptFileError: what the run in it has kept was damaged, or is missing.
        AlreadyCompleteError: its checkpoint is complete.
    """
    home = out / HOME
    if not home.is_dir():
        refuse_contents(out)
    new = [path for path in (home, *home.parents) if not path.exists()]
    make_directory(home)
    with locked(home / "lock", out):
        run: RunDirectory | None = None
        fresh = home in new
        try:
            run = RunDirectory(out, _state(home, work))
            run.check_contents()
            fresh = not run.begun
            yield run
        except BaseException:
            if fresh and run is None:
                shutil.rmtree(home)
            elif fresh and run is not None and not run.worth_keeping:
                run.remove()
            for path in new:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
            raise


def recorded_call(out: Path) -> dict[str, Any]:
    """Return the call with which the unfinished run in a directory began (`halve.run.call_record`).

    Raises:
        InputError: there is no unfinished run in it, or it was given objects in memory.
        CorruptFileError: its manifest was damaged, or is missing.
        AlreadyCompleteError: its checkpoint is complete.
    """
    if not is_unfinished(out):
        if (out / CONFIG).exists():
            raise AlreadyCompleteError(f"{out} holds a finished checkpoint: nothing is left to do")
        raise InputError(f"{out} holds no unfinished run: give the directory that --out named")
    with open_run(out) as run:
        begun, call = run.begun, run.call
    if not begun:
        raise InputError(f"the run in {out} was stopped before anything was kept: prune again")
    if call is None:
        raise InputError(
            f"the run in {out} was given a model or data in memory: call prune again with the same, or, "
            "if it is of a merge, merge again"
        )
    return call


class _Work(Struct, frozen=True, kw_only=True):
    """The file that says where blocks are kept."""

    work: str


def _state(home: Path, work: Path | None) -> Path:
    """Return where blocks are kept, and note it where that is not ``home`` itself."""
    pointer = home / _WORK
    noted = None
    if pointer.exists():
        remedy = f"write into it where the run in {home.parent} keeps its blocks, or remove {home} and begin again"
        noted = Path(validated(read_json(pointer), _Work, pointer, remedy).work)
    if noted is not None and not noted.is_dir():
        raise CorruptFileError(
            f"{noted}, where the run in {home.parent} keeps its finished blocks, is missing: mount or restore it, or "
            f"remove {home} and begin again"
        )
    if noted is not None and work is not None and work.resolve() != noted:
        raise InputError(f"the run in {home.parent} keeps its blocks in {noted}, not in {work}: leave work out")
    if noted is not None or work is None:
        return noted or home
    if (home / MANIFEST).exists():
        raise InputError(f"the run in {home.parent} keeps its blocks there, not in {work}: leave work out")
    if work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise InputError(f"{work} is not an empty directory: give a new one for the run's blocks")
    make_directory(work)
    write_file(pointer, [json.dumps({"work": str(work.resolve())}).encode()], "work")
    return work.resolve()
