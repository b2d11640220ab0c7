"""What the report says of a checkpoint: ``halve.json`` and ``halve-measured.json``, read and checked.

Both may come from strangers, so every value is brought to its type here; pages are made of nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.checkpoint.directory import RECORD, is_unfinished, refuse_packed
from halve.checkpoint.shards import read_json
from halve.errors import CorruptFileError, InputError
from halve.evaluation.perplexity import measured_as
from halve.model.layers import place_of
from halve.report.measured import read_measured
from halve.report.record import FORMAT
from halve.run.events import AROUND

_MOST = 1e18
"""Numbers on record are smaller, or damaged."""


@dataclass(frozen=True)
class MatrixFacts:
    """One pruned matrix.

    Attributes:
        name: as in ``halve.json``.
        block: index of its block, None if its name has none.
        kind: the rest of its name, experts without their number.
        shape: (d_out, d_in).
        method: that made its mask.
        status: how it ended; ``ok`` or another of `halve.solve.outcome.Status`.
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
    status: str
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
        return self.status == "fell_back"


@dataclass(frozen=True)
class BlockFacts:
    """One reconstructed block: the relative error of its output, on held-out batches where there were any."""

    name: str
    before: float
    after: float
    undone: bool


@dataclass(frozen=True)
class PerplexityFacts:
    """One text; ``before`` is the dense model's, None where it was not measured; infinite where it overflowed."""

    source: str
    seq_len: int
    windows: int
    dtype: str
    dtype_before: str
    sha256: str
    before: float | None
    after: float | None

    @property
    def title(self) -> str:
        """The text's name without its directory."""
        return Path(self.source).name

    @property
    def measured_as(self) -> str:
        """Sequence length, windows and dtype, without which a perplexity says nothing."""
        same = self.dtype_before in ("", self.dtype)
        return measured_as(
            self.windows, self.seq_len, self.dtype if same else f"{self.dtype_before} before, {self.dtype} after"
        )


@dataclass(frozen=True)
class RunFacts:
    """A pruned checkpoint.

    Attributes:
        directory: where it lies.
        model: what was pruned, as the user named it.
        pattern: ``2:4``, …
        method: with its refit, ``auto+cg``, and ``+block`` for reconstructed blocks.
        matches_dense: whether losses are against targets from the dense model.
        mean_loss: mean relative loss, None where nothing was measured.
        matrices: in the order of the model.
        blocks: that were reconstructed.
        excluded: how many parameters stayed dense, by reason.
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
    """

    directory: Path
    model: str
    pattern: str
    method: str
    matches_dense: bool
    mean_loss: float | None
    matrices: tuple[MatrixFacts, ...]
    blocks: tuple[BlockFacts, ...]
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
        return sum(value for phase, value in self.seconds.items() if phase not in AROUND) if self.seconds else None

    @property
    def cautions(self) -> tuple[str, ...]:
        """What must be known to read the numbers rightly, a sentence each."""
        source = self.calibration.get("source")
        texts = [score.title for score in self.perplexity if score.source == source]
        return tuple(f"{text} was both calibrated on and evaluated on: its perplexity flatters." for text in texts)

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
    record, measured = read_record(directory), read_measured(directory)
    try:
        return _facts(directory, record, measured)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{directory / RECORD} is not as Halve writes it ({type(error).__name__}: {error}): "
            "restore it, or prune again"
        ) from error


def read_record(directory: Path) -> dict[str, Any]:
    """Read the ``halve.json`` of a pruned checkpoint, its values unchecked.

    Raises:
        InputError: there is none, or the checkpoint is packed.
        CorruptFileError: it is not a JSON object.
    """
    refuse_packed(directory)
    path = directory / RECORD
    if not path.exists():
        if is_unfinished(directory):
            raise InputError(f"{directory} holds an unfinished run: complete it with `halve resume {directory}`")
        raise InputError(f"{directory} has no {RECORD}: give a checkpoint that halve prune has written")
    return read_json(path)


def _facts(directory: Path, record: Mapping[str, Any], measured: Mapping[str, Any]) -> RunFacts:
    if record["format"] != FORMAT:
        raise ValueError(f"its format is {record['format']}, and this version of Halve reads {FORMAT}")
    names = ("pattern", "method", "refit", "skip", "fallback", "min_expert_tokens", "device", "forward_dtype")
    objective = {f"objective.{name}": value for name, value in record["objective"].items()}
    tuning = record["reconstruction"]
    settings = {name: record[name] for name in names} | dict(record["options"]) | objective
    settings |= {} if tuning is None else {f"reconstruction.{name}": value for name, value in tuning.items()}
    faster = record.get("only_where_faster") or {}
    settings |= {f"only_where_faster.{name}": faster[name] for name in ("factor", "batch") if name in faster}
    seconds = measured.get("matrix_seconds", {})
    matrices = tuple(_matrix(entry, seconds) for entry in record["matrices"])
    if len({len(matrix.kept) for matrix in matrices if matrix.kept}) > 1:
        raise ValueError("kept_per_group has different lengths")
    reasons: dict[str, int] = {}
    for entry in record["excluded"]:
        reasons[str(entry["reason"])] = reasons.get(str(entry["reason"]), 0) + 1
    return RunFacts(
        directory=directory,
        model=str(record["source"]["name"]),
        pattern=str(record["pattern"]),
        method="+".join(_contender(record)),
        matches_dense=float(record["objective"]["match_dense"]) != 0.0,
        mean_loss=_number(record["mean_relative_loss"]),
        matrices=matrices,
        blocks=tuple(_block(entry) for entry in record["blocks"]),
        excluded=reasons,
        warnings=tuple(str(warning) for warning in record["warnings"]),
        settings=_texts(settings),
        calibration=_texts(record["calibration"]),
        environment=_texts(record["environment"]),
        files=_texts(record.get("files", {})),
        seconds={phase: float(value) for phase, value in measured.get("seconds", {}).items()},
        memory={phase: int(value) for phase, value in measured.get("peak_memory", {}).items()},
        device_memory={phase: int(value) for phase, value in measured.get("peak_device_memory", {}).items()},
        resumed_blocks=int(measured.get("resumed_blocks", 0)),
        finished=str(measured.get("finished", "")),
        perplexity=tuple(_perplexity(entry) for entry in measured["perplexity"]),
    )


def _contender(record: Mapping[str, Any]) -> list[str]:
    """Return the method and what followed it, as `halve compare` names them."""
    refit = [] if record["refit"] == "none" else [str(record["refit"])]
    return [str(record["method"]), *refit, *([] if record["reconstruction"] is None else ["block"])]


def _matrix(entry: Mapping[str, Any], seconds: Mapping[str, float]) -> MatrixFacts:
    name, facts = str(entry["name"]), entry["facts"]
    block, kind = place_of(name)
    d_out, d_in = entry["shape"]
    tokens, iterations = facts.get("tokens"), facts.get("iterations")
    return MatrixFacts(
        name=name,
        block=block,
        kind=kind,
        shape=(int(d_out), int(d_in)),
        method=str(entry["method"]),
        status=str(entry["status"]),
        reason=str(entry["reason"]),
        loss=_number(facts.get("relative_loss")),
        loss_before_refit=_number(facts.get("relative_loss_before_refit")),
        tokens=None if tokens is None else int(tokens),
        iterations=None if iterations is None else int(iterations),
        seconds=seconds.get(name),
        kept=_kept(entry.get("kept_per_group")),
    )


def _kept(counts: Sequence[int] | None) -> tuple[int, ...]:
    kept = tuple(int(count) for count in counts or ())
    if kept and (min(kept) < 0 or not 0 < sum(kept) < _MOST):
        raise ValueError("kept_per_group does not count groups")
    return kept


def _block(entry: Mapping[str, Any]) -> BlockFacts:
    return BlockFacts(
        str(entry["name"]), _finite(entry["error_before"]), _finite(entry["error_after"]), not int(entry["epoch"])
    )


def _perplexity(entry: Mapping[str, Any]) -> PerplexityFacts:
    return PerplexityFacts(
        source=entry["source"],
        seq_len=int(entry["seq_len"]),
        windows=int(entry["windows"]),
        dtype=str(entry.get("dtype", "")),
        dtype_before=str(entry.get("dtype_before") or ""),
        sha256=entry["tokens_sha256"],
        before=_score(entry, "before"),
        after=_score(entry, "after"),
    )


def _number(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) < _MOST:
        raise ValueError(f"{value} is no loss or error")
    return number


def _score(entry: Mapping[str, Any], name: str) -> float | None:
    """Return a perplexity; it is infinite where only its logarithm is on record."""
    if entry.get(name) is None and entry.get(f"{name}_nll") is not None:
        return math.inf
    return _number(entry.get(name))


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value)) or "—"
    return "—" if value in (None, "") else str(value)
