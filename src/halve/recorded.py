"""``halve.json``, read: what every reader of a record may rely on, checked once and told in the same words.

`halve.report.record` writes it, above the run that it is about. What reads it — packing, verification, the report, the
command line — stands on several floors, so the reader stands below all of them, on the floor of the pattern, the
layouts and the outcomes that a record names. A reader that needs more of it extends `Record` by fields of its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from torch import Tensor

from halve.checkpoint.directory import RECORD, contained
from halve.checkpoint.durable import sha256_of
from halve.checkpoint.shards import read_json
from halve.checkpoint.validated import shown, validated, wrong
from halve.errors import HalveError, InputError, PatternError
from halve.maths.pattern import Pattern
from halve.model.layers import Layout
from halve.order.folds import Move
from halve.order.recording import read_channels
from halve.solve.outcome import Status

FORMAT = 1
"""Version of the layout of ``halve.json``."""
REMEDY = "restore it, or prune again"
MOST = 1e18
"""Numbers that Halve has put on record are smaller, or damaged; such a number fits a float and an integer."""


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A model: its kind, the name that the user gave, and a commit of the hub."""

    kind: Literal["directory", "hub", "gguf", "memory"]
    name: str
    revision: str | None = None


class Origin(Named, frozen=True, kw_only=True):
    """What was pruned, and the sha256 of its files; of a checkpoint that Halve wrote, also what that was made from.

    ``reordered`` says that its channels were in another order than those of what it was made from.
    """

    sha256: str | None = None
    reordered: bool = False
    made_from: Named | None = None


class TrainedFrom(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint that a training began with, and the sha256 of its files."""

    name: str
    sha256: str | None = None


class RecordedMatrix(msgspec.Struct, frozen=True, kw_only=True):
    """One matrix.

    Attributes:
        tensors: on disk that hold it; none where nothing was written.
        layout: how they have it.
        status: how its solve ended; a failed one was left dense.
    """

    tensors: tuple[str, ...]
    layout: Layout = "out_in"
    status: Status = Status.OK


class RecordedMove(msgspec.Struct, frozen=True, kw_only=True):
    """Channels of one tensor on disk that were moved (`halve.order.folds.Move`)."""

    tensor: str
    dim: Annotated[int, msgspec.Meta(ge=0, le=7)]
    start: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    stride: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    repeats: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)] = 1


class RecordedOrder(msgspec.Struct, frozen=True, kw_only=True):
    """One order of channels; ``channels`` is that of ``units`` x ``width`` as `halve.order.recording` packs it."""

    block: str
    units: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)]
    width: Annotated[int, msgspec.Meta(ge=1, lt=1 << 24)]
    channels: str
    moves: tuple[RecordedMove, ...]


class RecordedBlock(msgspec.Struct, frozen=True, kw_only=True):
    """One reconstructed block; ``tensors`` are those on disk that its reconstruction may have changed."""

    tensors: tuple[str, ...] = ()


class RecordedTraining(msgspec.Struct, frozen=True, kw_only=True):
    """One training end to end; ``tensors`` are those on disk that it may have changed, pruned or not."""

    tensors: tuple[str, ...]
    started_from: TrainedFrom | None = None


class RecordedMerge(msgspec.Struct, frozen=True, kw_only=True):
    """One merge of an adapter into a checkpoint; ``tensors`` are those on disk that it changed."""

    tensors: tuple[str, ...] = ()
    into: Named | None = None


class RecordedRounding(msgspec.Struct, frozen=True, kw_only=True):
    """One rounding to integers while the checkpoint was packed.

    Attributes:
        values: the kind of integers.
        weights_before: sha256 of the weight files before it, by name.
        calibration: the text on which the integers were solved for; None where each weight was rounded to the nearest.
        mean_relative_loss: of the matrices, where they were solved for.
    """

    values: str
    weights_before: dict[str, str]
    calibration: dict[str, Any] | None = None
    mean_relative_loss: float | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a record says of the files beside it; every field but these is read by whoever needs it.

    Attributes:
        format: version of the layout.
        pattern: that the matrices have, unparsed; None where nothing was pruned.
        matrices: that were to be pruned.
        blocks: that were reconstructed.
        norm_statistics: tensors on disk of batch norms whose statistics were estimated anew.
        orders: of channels that were moved.
        trainings: that followed, in order.
        merges: of adapters, in their order.
        quantised: roundings to integers, in their order.
        files: sha256, in hexadecimal, of every other file that was written, by name; None if it is not on record.
    """

    format: int = FORMAT
    pattern: str | None = None
    matrices: tuple[RecordedMatrix, ...] = ()
    blocks: tuple[RecordedBlock, ...] = ()
    norm_statistics: tuple[str, ...] = ()
    orders: tuple[RecordedOrder, ...] = ()
    trainings: tuple[RecordedTraining, ...] = ()
    merges: tuple[RecordedMerge, ...] = ()
    quantised: tuple[RecordedRounding, ...] = ()
    files: dict[str, str] | None = None

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layout of every tensor on disk that was pruned, by name."""
        return {
            name: matrix.layout
            for matrix in self.matrices
            if matrix.status is not Status.FAILED
            for name in matrix.tensors
        }

    @property
    def failed(self) -> list[str]:
        """Names of the tensors that were to be pruned and were left dense."""
        return sorted(name for matrix in self.matrices if matrix.status is Status.FAILED for name in matrix.tensors)

    @property
    def tuned(self) -> set[str]:
        """Names of the tensors, pruned or not, that anything but pruning itself may have changed."""
        changes: tuple[RecordedBlock | RecordedTraining | RecordedMerge, ...]
        changes = (*self.blocks, *self.trainings, *self.merges)
        return {*self.norm_statistics, *(name for change in changes for name in change.tensors)}

    @property
    def fell_back(self) -> bool:
        """Whether a matrix was pruned by another method than asked."""
        return any(matrix.status is Status.FELL_BACK for matrix in self.matrices)


class SourcedRecord(Record, frozen=True, kw_only=True):
    """A record with what was pruned."""

    source: Origin


Kind = TypeVar("Kind", bound=Record)


def read_record(directory: Path, kind: type[Kind]) -> Kind:
    """Read the ``halve.json`` of a directory.

    Args:
        directory: that has one.
        kind: `Record`, or one with more fields.

    Raises:
        CorruptFileError: it is missing, no JSON, a link that leaves the directory, or not as Halve writes it.
        UnreadableFileError: it cannot be read.
    """
    path = contained(directory, directory / RECORD)
    record = validated(read_json(path), kind, path, REMEDY)
    if record.format != FORMAT:
        raise wrong(path, f"its format is {record.format}, and this version of Halve reads {FORMAT}", REMEDY)
    return record


def pattern_of(record: Record, directory: Path) -> Pattern | None:
    """Return the pattern that the matrices of the record in a directory have; None where it names none.

    Raises:
        CorruptFileError: it is none.
    """
    try:
        return None if record.pattern is None else Pattern(record.pattern)
    except PatternError as error:
        raise wrong(directory / RECORD, str(error), REMEDY) from error


def pattern_on_disk(model: str | Path) -> Pattern | None:
    """Return the pattern that a checkpoint was pruned to; None where it is no directory with a record that names one.

    Args:
        model: as a user writes it: a directory, or anything else.

    Raises:
        CorruptFileError: there is a record, and it cannot be read.
    """
    directory = Path(model).expanduser()
    return pattern_of(read_record(directory, Record), directory) if (directory / RECORD).is_file() else None


def orders_of(record: Record, directory: Path) -> list[tuple[Tensor, tuple[Move, ...]]]:
    """Return the orders of channels in the record of a directory, with the moves of tensors on disk.

    Raises:
        CorruptFileError: an entry is no order of channels.
    """
    try:
        return [
            (
                read_channels(each.channels, each.units, each.width),
                tuple(Move(move.tensor, move.dim, move.start, move.stride, move.repeats) for move in each.moves),
            )
            for each in record.orders
        ]
    except InputError as error:
        raise wrong(directory / RECORD, str(error), REMEDY) from error


def made_from(directory: Path) -> dict[str, Any]:
    """Return what is put on record of where a checkpoint came from; nothing where Halve did not write it."""
    if not (directory / RECORD).is_file():
        return {}
    try:
        read = read_record(directory, SourcedRecord)
    except HalveError:  # of whoever calls a file so; it says nothing of the weights
        return {}
    before = read.source
    first: Named = before if before.made_from is None else before.made_from
    reordered = {"reordered": True} if read.orders or before.reordered else {}
    return {**reordered, "made_from": {"kind": first.kind, "name": first.name, "revision": first.revision}}


@dataclass(frozen=True, kw_only=True)
class ChannelOrder:
    """The order of a checkpoint's channels, told by the models that have the same.

    Attributes:
        reordered: whether it is another one than that of the model that all this began with.
        names: of models that have the same, as users gave them; the checkpoint's own is not among them.
        sha256s: of the files of such models, the checkpoint's own among them.
    """

    reordered: bool
    names: frozenset[str] = frozenset()
    sha256s: frozenset[str] = frozenset()

    def is_that_of(self, other: "ChannelOrder") -> bool:
        """Whether two checkpoints of one model are known to have their channels in the same order."""
        return not (self.reordered or other.reordered) or not self.sha256s.isdisjoint(other.sha256s)


def channel_order(directory: Path, sha256: str) -> ChannelOrder:
    """Return the order of the channels of a checkpoint, or of a model that Halve did not write.

    Args:
        directory: of the checkpoint; a file has no record.
        sha256: of its files.

    Raises:
        CorruptFileError, UnreadableFileError: it has a record that cannot be read.
    """
    if not (directory.is_dir() and (directory / RECORD).is_file()):
        return ChannelOrder(reordered=False, sha256s=frozenset({sha256}))
    record = read_record(directory, SourcedRecord)
    found = order_on_record(record)
    return ChannelOrder(reordered=found.reordered, names=found.names, sha256s=found.sha256s | {sha256})


def order_on_record(record: SourcedRecord) -> ChannelOrder:
    """Return what a record says of the order of channels; the checkpoint's own sha256 is not in it."""
    alike: list[Named | TrainedFrom | None] = [each.started_from for each in record.trainings]
    alike += [each.into for each in record.merges]
    if not record.orders:
        alike += [record.source, None if record.source.reordered else record.source.made_from]
    models = [each for each in alike if each is not None]
    sums = (each.sha256 for each in models if isinstance(each, Origin | TrainedFrom))
    return ChannelOrder(
        reordered=bool(record.orders) or record.source.reordered,
        names=frozenset(each.name for each in models),
        sha256s=frozenset(each for each in sums if each is not None),
    )


def change_of(directory: Path, name: str, sha256: str) -> str:
    """Say how a file is not as it was written; empty where it is.

    Args:
        directory: that it is in.
        name: of the file, as the record has it.
        sha256: that is on record.

    Raises:
        UnreadableFileError: it cannot be read.
    """
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        return f"{RECORD} records the file {shown(repr(name))}, which is outside the directory"
    if not path.is_file():
        return f"{shown(name)} is recorded in {RECORD} and is missing"
    if sha256_of(path) != sha256:
        return f"{shown(name)} does not have the sha256 recorded when it was written: it has been changed"
    return ""
