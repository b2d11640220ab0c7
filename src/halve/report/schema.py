"""All that a page, or a writer of the next record, reads of ``halve.json``: its fields and their types."""

from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from halve.checkpoint.directory import RECORD, refuse_packed, refuse_unfinished
from halve.errors import InputError
from halve.order.recording import FoldsEntry
from halve.recorded import (
    MOST,
    Kind,
    Origin,
    Record,
    RecordedBlock,
    RecordedMatrix,
    RecordedMerge,
    RecordedTraining,
    TrainedFrom,
    read_record,
)

Count = Annotated[int, Meta(ge=0, lt=int(MOST))]


class MatrixEntry(RecordedMatrix, frozen=True, kw_only=True):
    """One matrix: its name, what was done to it, and numbers about that."""

    name: str
    shape: tuple[int, int]
    method: str
    reason: str
    facts: dict[str, float | None]
    kept_per_group: tuple[int, ...] | None = None


class BlockEntry(RecordedBlock, frozen=True, kw_only=True):
    """One reconstructed block, and the error of its output."""

    name: str
    error_before: float
    error_after: float
    epoch: int


class ExcludedEntry(Struct, frozen=True, kw_only=True):
    """One parameter that stayed dense: why, and its shape."""

    reason: str
    shape: tuple[Count, ...] = ()


class MergedAdapter(Struct, frozen=True, kw_only=True):
    """An adapter that was merged: the name of its directory, and its kind."""

    name: str
    kind: str


class MergeEntry(RecordedMerge, frozen=True, kw_only=True):
    """One merge of an adapter."""

    adapter: MergedAdapter


class ObjectiveEntry(Struct, frozen=True, kw_only=True):
    """The objective, as it was followed."""

    shrinkage: float | str | UnsetType = UNSET
    match_dense: float
    match_ridge: float | UnsetType = UNSET


class TextEntry(Struct, frozen=True, kw_only=True):
    """The text of a training: tokens by source, sequences and their length, and the hash of their tokens."""

    sources: dict[str, Count]
    sequences: Count
    seq_len: Count
    sha256: str
    held_out_tokens: Count
    notes: tuple[str, ...] = ()


class PointEntry(Struct, frozen=True, kw_only=True):
    """What was known at one step of a training; null where it was not finite, absent where it was not measured."""

    step: Count
    tokens: Count
    loss: float | None = None
    kl: float | None = None
    perplexity: float | None = None
    learning_rate: float | None = None


class TrainedScoreEntry(Struct, frozen=True, kw_only=True):
    """Perplexity of one evaluation text, of the model that a training began with and of what it left."""

    source: str
    tokens_sha256: str
    seq_len: Count = 0
    windows: Count = 0
    dtype: str = ""
    bos: str = ""
    scored: str = ""
    before: float | None
    before_nll: float | None = None
    after: float | None
    after_nll: float | None = None
    log_difference: float | None = None
    log_difference_stderr: float | None = None


class TrainingEntry(RecordedTraining, frozen=True, kw_only=True):
    """One training."""

    kind: Literal["finetune", "learn"]
    method: str
    trained: str
    teacher: Origin | None
    started_from: TrainedFrom | None
    options: dict[str, Any]
    text: TextEntry
    learning_rate: float
    rates_tried: dict[str, float | None]
    steps: Count
    best_step: Count
    tokens: Count
    device: str
    forward_dtype: str
    curve: tuple[PointEntry, ...]
    perplexity: tuple[TrainedScoreEntry, ...]
    environment: dict[str, Any]


class WholeRecord(Record, frozen=True, kw_only=True):
    """All that a page shows of a record; what only stands in a table of settings may be any JSON."""

    format: int
    source: Origin
    pattern: str
    method: str
    refit: str
    options: dict[str, Any]
    skip: tuple[str, ...]
    fallback: str | None
    min_expert_tokens: int
    reconstruction: dict[str, Any] | None
    objective: ObjectiveEntry
    only_where_faster: dict[str, Any] | None = None
    batch_norm: str = ""
    permute: str = ""
    folds: FoldsEntry | None = None
    keep_dense: dict[str, Any] | None = None
    calibration: dict[str, Any]
    device: str
    forward_dtype: str
    mean_relative_loss: float | None
    matrices: tuple[MatrixEntry, ...]
    blocks: tuple[BlockEntry, ...]
    trainings: tuple[TrainingEntry, ...] = ()
    merges: tuple[MergeEntry, ...] = ()
    excluded: tuple[ExcludedEntry, ...]
    warnings: tuple[str, ...]
    environment: dict[str, Any]


def record_of(directory: Path, kind: type[Kind]) -> Kind:
    """Read the record of a checkpoint that a user says Halve has pruned.

    Args:
        directory: of the checkpoint.
        kind: what is to be read of it, see `halve.recorded.read_record`.

    Raises:
        InputError: there is none, the run is unfinished, or the checkpoint is packed.
        CorruptFileError, UnreadableFileError: as `halve.recorded.read_record`.
    """
    refuse_packed(directory)
    if not (directory / RECORD).exists():
        refuse_unfinished(directory)
        raise InputError(f"{directory} has no {RECORD}: give a checkpoint that halve prune has written")
    return read_record(directory, kind)
