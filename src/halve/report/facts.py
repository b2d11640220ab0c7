"""What the report says of a checkpoint: ``halve.json`` and ``halve-measured.json``, read and checked.

Both may come from strangers, so every value is brought to its type here; pages are made of nothing else.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from halve.checkpoint.directory import RECORD
from halve.checkpoint.validated import wrong
from halve.evaluation.figure import measured_as, said_difference
from halve.evaluation.request import overlap
from halve.model.plan import places_of
from halve.order.recording import said_of_orders
from halve.recorded import MOST, REMEDY, Origin
from halve.report.measured import Measured, Score, WorkerSeconds, read_measured
from halve.report.schema import BlockEntry, MatrixEntry, WholeRecord, record_of
from halve.report.top_one_facts import TopOneFacts, saw_pictures
from halve.report.training_facts import TrainedScore, TrainingFacts, method_with, training_facts
from halve.report.values import finite_or_none, finite_value, perplexity_value, texts
from halve.run.contender import KEEP_DENSE
from halve.run.events import seconds_of_pruning
from halve.solve.outcome import Status
from halve.versions import named_versions


@dataclass(frozen=True, kw_only=True)
class MatrixFacts:
    """One pruned matrix.

    Attributes:
        name: as in ``halve.json``.
        block: index of its block, None if its name has none.
        kind: the rest of its name, experts without their number.
        shape: (d_out, d_in).
        method: that made its mask.
        status: how it ended.
        reason: if that is not ``ok``.
        loss: relative loss, None if there were no statistics.
        loss_before_refit: the same before the refit, None if there was none.
        tokens: calibration tokens behind its statistics, None if there were none.
        iterations: of the method, None if it does not iterate.
        seconds: for solving, None where that was not measured.
        kept: how many of its groups keep 0, 1, … N weights; empty for an unstructured pattern.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, int]
    method: str
    status: Status
    reason: str
    loss: float | None
    loss_before_refit: float | None
    tokens: int | None
    iterations: int | None
    seconds: float | None
    kept: tuple[int, ...]

    @property
    def fell_back(self) -> bool:
        """Whether another method was used than asked."""
        return self.status is Status.FELL_BACK


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """One reconstructed block: the relative error of its output, on held-out batches where there were any."""

    name: str
    before: float
    after: float
    undone: bool


@dataclass(frozen=True, kw_only=True)
class PerplexityFacts:
    """One text; ``before`` is the dense model's, None where it was not measured; infinite where it overflowed.

    ``difference`` is by how much pruning raised the logarithm, and its standard error, in words; empty where it is not
    known, as ``versions`` are where they were not put on record.
    """

    source: str
    seq_len: int
    windows: int
    dtype: str
    dtype_before: str
    sha256: str
    before: float | None
    after: float | None
    bos: str = ""
    scored: str = ""
    difference: str = ""
    versions: str = ""

    @property
    def title(self) -> str:
        """The text's name without its directory."""
        return Path(self.source).name

    @property
    def measured_as(self) -> str:
        """Sequence length, windows, BOS and dtype, without which a perplexity says nothing."""
        same = self.dtype_before in ("", self.dtype)
        dtype = self.dtype if same else f"{self.dtype_before} before, {self.dtype} after"
        return measured_as(self.windows, self.seq_len, self.bos, dtype, self.scored)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A pruned checkpoint.

    Attributes:
        directory: where it lies.
        model: what was pruned, as the user named it.
        pattern: ``2:4``, …
        method: with its refit, ``auto+cg``, and ``+block`` for reconstructed blocks; then what was trained.
        matches_dense: whether losses are against targets from the dense model.
        mean_loss: mean relative loss, None where nothing was measured.
        matrices: in the order of the model.
        blocks: that were reconstructed.
        trainings: that followed, or made the masks, in order.
        excluded: how many parameters stayed dense, by reason.
        dense_weights: number of weights in them.
        origin: what was pruned, and where that came from.
        reordered: what there is to say of channels that were reordered, now or before; empty where none were.
        norms: number of batch norms whose statistics were estimated anew.
        only_convolutions: whether all that was pruned are convolutions, for which there are no sparse products.
        merged: names of the adapters that were merged, in order.
        rounded: kinds of integers that kept weights were rounded to when they were packed, in order.
        warnings: sentences.
        settings: what was asked for, name and value.
        calibration: on what, name and value.
        environment: versions and machine, name and value.
        files: sha256 by file.
        seconds: by phase; empty where that was not measured.
        memory: bytes of resident memory by phase.
        device_memory: bytes on a GPU by phase.
        resumed_blocks: that an earlier process had finished.
        finished: UTC time at which the run ended, empty where that is not known.
        perplexity: one entry a text.
        top_one: one entry a set of pictures.
        workers: one entry a worker, where there were several.
    """

    directory: Path
    model: str
    pattern: str
    method: str
    matches_dense: bool
    mean_loss: float | None
    matrices: tuple[MatrixFacts, ...]
    blocks: tuple[BlockFacts, ...]
    trainings: tuple[TrainingFacts, ...]
    excluded: Mapping[str, int]
    warnings: tuple[str, ...]
    settings: Mapping[str, str]
    calibration: Mapping[str, str]
    environment: Mapping[str, str]
    files: Mapping[str, str]
    seconds: Mapping[str, float]
    memory: Mapping[str, int]
    device_memory: Mapping[str, int]
    resumed_blocks: int
    finished: str
    perplexity: tuple[PerplexityFacts, ...]
    top_one: tuple[TopOneFacts, ...] = ()
    workers: tuple[WorkerSeconds, ...] = ()
    origin: Origin
    dense_weights: int
    reordered: str = ""
    norms: int = 0
    only_convolutions: bool = False
    merged: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        """The model's name without its directory."""
        return Path(self.model).name or self.model

    @property
    def directory_name(self) -> str:
        """The last part of the directory's path, whatever it was called as."""
        return self.directory.resolve().name

    @property
    def fallbacks(self) -> tuple[MatrixFacts, ...]:
        """Matrices that were pruned by another method than asked."""
        return tuple(matrix for matrix in self.matrices if matrix.fell_back)

    @property
    def worst(self) -> tuple[MatrixFacts, ...]:
        """The five matrices that lost most."""
        return tuple(sorted((m for m in self.matrices if m.loss is not None), key=lambda m: -(m.loss or 0.0))[:5])

    @property
    def without_loss(self) -> int:
        """Number of matrices that have no loss: pruned without statistics."""
        return sum(matrix.loss is None for matrix in self.matrices)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of matrices, in the order of the model."""
        return tuple(dict.fromkeys(matrix.kind for matrix in self.matrices))

    @property
    def weights(self) -> int:
        """Number of weights in the pruned matrices."""
        return sum(matrix.shape[0] * matrix.shape[1] for matrix in self.matrices)

    @property
    def seconds_of_pruning(self) -> float | None:
        """Seconds of all phases but those around pruning."""
        return seconds_of_pruning(self.seconds) if self.seconds else None

    @property
    def worker_steps(self) -> tuple[str, ...]:
        """What workers did, in the order in which they did it first."""
        return tuple(dict.fromkeys(step for worker in self.workers for step in worker.seconds))

    @property
    def cautions(self) -> tuple[str, ...]:
        """What must be known to read the numbers rightly, a sentence each."""
        measured = {score.source for score in self.perplexity}
        measured |= {score.source for training in self.trainings for score in training.scores}
        found = [overlap(self.calibration.get("source"), measured)]
        pictures = [score.source for score in self.top_one]
        found.append(overlap(self.calibration.get("source"), pictures, figures="accuracies"))
        trained_on = dict.fromkeys(source for each in self.trainings for source in each.sources)
        found += [overlap(source, measured, used="trained") for source in trained_on]
        return tuple(f"{sentence}." for sentence in found if sentence)

    @property
    def sees(self) -> bool:
        """Whether the model was shown pictures, so that text says nothing of it."""
        return bool(self.top_one) or saw_pictures(self.calibration)

    @property
    def tokens_trained_on(self) -> int:
        """Tokens of all trainings together."""
        return sum(training.tokens for training in self.trainings)

    @property
    def masks_were_learned(self) -> bool:
        """Whether a training made the masks."""
        return any(training.kind == "learn" for training in self.trainings)

    def dense_perplexity(self, score: TrainedScore) -> float | None:
        """Return the dense model's perplexity of a text that a training was measured on; None where none is known."""
        wanted = (score.source, score.sha256, score.seq_len, score.windows)
        same = [each for each in self.perplexity if (each.source, each.sha256, each.seq_len, each.windows) == wanted]
        return same[-1].before if same else None

    def mean_losses(self, kind: str | None = None) -> dict[int, float]:
        """Return the mean relative loss by block, of one kind of matrix or of all; -1 stands for no block."""
        found: dict[int, list[float]] = {}
        for matrix in self.matrices:
            if matrix.loss is not None and kind in (None, matrix.kind):
                found.setdefault(-1 if matrix.block is None else matrix.block, []).append(matrix.loss)
        return {block: math.fsum(losses) / len(losses) for block, losses in sorted(found.items())}

    def kept(self, kind: str | None = None) -> tuple[int, ...]:
        """Return how many groups keep 0, 1, … N weights, of one kind of matrix or of all."""
        counts = [matrix.kept for matrix in self.matrices if matrix.kept and kind in (None, matrix.kind)]
        return tuple(map(sum, zip(*counts, strict=True)))


def read_run(directory: Path) -> RunFacts:
    """Read what Halve left beside a checkpoint.

    Raises:
        InputError: there is no ``halve.json``.
        CorruptFileError: a file is malformed.
    """
    record, measured = record_of(directory, WholeRecord), read_measured(directory)
    try:
        return _facts(directory, record, measured)
    except ValueError as error:
        raise wrong(directory / RECORD, str(error), REMEDY) from error


def _facts(directory: Path, record: WholeRecord, measured: Measured) -> RunFacts:
    places = places_of([entry.name for entry in record.matrices])
    matrices = tuple(_matrix(entry, places[entry.name], measured.matrix_seconds) for entry in record.matrices)
    trainings = tuple(training_facts(entry) for entry in record.trainings)
    if len({len(matrix.kept) for matrix in matrices if matrix.kept}) > 1:
        raise ValueError("`kept_per_group` has different lengths")
    return RunFacts(
        directory=directory,
        model=record.source.name,
        pattern=record.pattern,
        method=method_with("+".join(_contender(record)), trainings),
        matches_dense=record.objective.match_dense != 0.0,
        mean_loss=finite_or_none(record.mean_relative_loss),
        matrices=matrices,
        blocks=tuple(_block(entry) for entry in record.blocks),
        trainings=trainings,
        excluded=Counter(entry.reason for entry in record.excluded),
        warnings=record.warnings,
        settings=texts(_settings(record)),
        calibration=texts(record.calibration),
        environment=texts(record.environment),
        files=record.files or {},
        seconds=measured.seconds,
        memory={phase: int(value) for phase, value in measured.peak_memory.items()},
        device_memory={phase: int(value) for phase, value in measured.peak_device_memory.items()},
        resumed_blocks=int(measured.resumed_blocks),
        finished=measured.finished,
        perplexity=tuple(_perplexity(entry) for entry in measured.perplexity),
        top_one=tuple(map(TopOneFacts.of, measured.top_one)),
        workers=measured.workers,
        origin=record.source,
        dense_weights=int(finite_value(sum(math.prod(entry.shape) for entry in record.excluded if entry.shape))),
        reordered=said_of_orders(len(record.orders), folds=record.folds, before=record.source.reordered),
        norms=len({name.rpartition(".")[0] for name in record.norm_statistics}),
        only_convolutions=bool(record.matrices) and all(entry.layout == "conv" for entry in record.matrices),
        merged=tuple(entry.adapter.name for entry in record.merges),
        rounded=tuple(entry.values for entry in record.quantised),
    )


def _settings(record: WholeRecord) -> dict[str, Any]:
    """Return what was asked for, value by name; what belongs together has its group before the name."""
    names = ("pattern", "method", "refit", "skip", "fallback", "min_expert_tokens", "device", "forward_dtype")
    settings = {name: getattr(record, name) for name in names} | record.options
    settings |= {name: value for name in ("batch_norm", "permute") if (value := getattr(record, name))}
    faster, costliest = record.only_where_faster or {}, record.keep_dense or {}
    groups = {
        "objective": to_builtins(record.objective),
        "reconstruction": record.reconstruction or {},
        "only_where_faster": {name: faster[name] for name in ("factor", "batch") if name in faster},
        "keep_dense": {name: costliest[name] for name in ("amount", "tokens") if name in costliest},
    }
    return settings | {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}


def _contender(record: WholeRecord) -> list[str]:
    """Return the method and what followed it, as `halve compare` has them, also where all contenders had it alike."""
    refit = [] if record.refit == "none" else [record.refit]
    kept = [] if record.keep_dense is None else [f"{KEEP_DENSE}={record.keep_dense.get('amount')}"]
    return [record.method, *refit, *([] if record.reconstruction is None else ["block"]), *kept]


def _matrix(entry: MatrixEntry, place: tuple[int | None, str], seconds: Mapping[str, float]) -> MatrixFacts:
    block, kind = place
    tokens, iterations = finite_or_none(entry.facts.get("tokens")), finite_or_none(entry.facts.get("iterations"))
    return MatrixFacts(
        name=entry.name,
        block=block,
        kind=kind,
        shape=entry.shape,
        method=entry.method,
        status=entry.status,
        reason=entry.reason,
        loss=finite_or_none(entry.facts.get("relative_loss")),
        loss_before_refit=finite_or_none(entry.facts.get("relative_loss_before_refit")),
        tokens=None if tokens is None else int(tokens),
        iterations=None if iterations is None else int(iterations),
        seconds=seconds.get(entry.name),
        kept=_kept(entry.kept_per_group or ()),
    )


def _kept(counts: tuple[int, ...]) -> tuple[int, ...]:
    if counts and (min(counts) < 0 or not 0 < sum(counts) < MOST):
        raise ValueError("`kept_per_group` does not count groups")
    return counts


def _block(entry: BlockEntry) -> BlockFacts:
    return BlockFacts(
        name=entry.name,
        before=finite_value(entry.error_before),
        after=finite_value(entry.error_after),
        undone=not entry.epoch,
    )


def _perplexity(entry: Score) -> PerplexityFacts:
    return PerplexityFacts(
        source=entry.source,
        seq_len=int(entry.seq_len),
        windows=int(entry.windows),
        dtype=entry.dtype,
        dtype_before=entry.dtype_before or "",
        sha256=entry.tokens_sha256,
        before=perplexity_value(entry.before, entry.before_nll),
        after=perplexity_value(entry.after, entry.after_nll),
        bos=entry.bos,
        scored=entry.scored,
        difference="" if entry.log_difference is None else said_difference(*entry.log_difference),
        versions=_measured_by(entry),
    )


def _measured_by(entry: Score) -> str:
    after, before = named_versions(entry.versions), named_versions(entry.versions_before or {})
    return after if before in ("", after) else f"{before} before, {after} after"
