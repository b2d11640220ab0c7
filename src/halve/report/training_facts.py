"""What the report says of the trainings that followed the pruning, or took its place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.evaluation.figure import measured_as, said_difference
from halve.report.schema import PointEntry, TrainedScoreEntry, TrainingEntry
from halve.report.values import finite_or_none, finite_value, perplexity_value, texts

MOST_POINTS = 1000
"""Points of a curve that a page shows; of more than that, so many, evenly spread."""


@dataclass(frozen=True, kw_only=True)
class TrainedScore:
    """Perplexity of one evaluation text before and after a training; infinite where it overflowed.

    ``difference`` is by how much the training raised the logarithm, and its standard error, in words; empty where it is
    not known.
    """

    source: str
    seq_len: int
    windows: int
    measured_as: str
    sha256: str
    before: float | None
    after: float | None
    difference: str

    @property
    def title(self) -> str:
        """The text's name without its directory."""
        return Path(self.source).name


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """One training.

    Attributes:
        kind: ``finetune`` or ``learn``.
        method: that learned the masks, or what was done with them.
        trained: what of the model.
        teacher: the model's name that it learned from, empty without one.
        started_from: name of the checkpoint that it began with, empty where that is not known.
        settings: what was asked for, name and value.
        sources: of the text, and the tokens from each.
        sequences: of the text.
        seq_len: tokens in each.
        text_sha256: of the text's tokens.
        held_out_tokens: that decided about the learning rate and which weights stay.
        notes: sentences on the text.
        learning_rate: at the peak.
        rates_tried: what each learning rate came to on the held-out text; None where it diverged.
        steps: of the optimiser.
        best_step: whose weights stayed.
        tokens: trained on.
        device: where.
        forward_dtype: of the products.
        curve: what was known of steps, in their order.
        scores: perplexities before and after, one entry a text.
        environment: versions and machine, name and value.
    """

    kind: str
    method: str
    trained: str
    teacher: str
    started_from: str
    settings: Mapping[str, str]
    sources: Mapping[str, int]
    sequences: int
    seq_len: int
    text_sha256: str
    held_out_tokens: int
    notes: tuple[str, ...]
    learning_rate: float
    rates_tried: Mapping[str, float | None]
    steps: int
    best_step: int
    tokens: int
    device: str
    forward_dtype: str
    curve: tuple[PointEntry, ...]
    scores: tuple[TrainedScore, ...]
    environment: Mapping[str, str]

    @property
    def losses(self) -> tuple[PointEntry, ...]:
        """The points that have a loss, of very many some."""
        return _some(tuple(point for point in self.curve if point.loss is not None))

    @property
    def held_out(self) -> tuple[PointEntry, ...]:
        """The points that are of the held-out text, of very many some."""
        return _some(tuple(point for point in self.curve if point.kl is not None or point.perplexity is not None))

    @property
    def teacher_name(self) -> str:
        """The teacher's name without its directory."""
        return Path(self.teacher).name or self.teacher

    @property
    def started_from_name(self) -> str:
        """The name of the checkpoint that it began with, without its directory."""
        return Path(self.started_from).name or self.started_from

    @property
    def done(self) -> str:
        """What it did, as a participle that stands behind the name of a method."""
        return "fine-tuned" if self.kind == "finetune" else f"masks by {self.method}"


def _some(points: tuple[PointEntry, ...]) -> tuple[PointEntry, ...]:
    """Return `MOST_POINTS` at most, evenly spread, the last among them."""
    stride = -(-len(points) // MOST_POINTS)
    return points if stride <= 1 else points[::-1][::stride][::-1]


def method_with(method: str, trainings: tuple[TrainingFacts, ...]) -> str:
    """Name how a checkpoint was made: the method of the pruning, and the trainings after it.

    Args:
        method: as the record names it; that of the first training, where that learned the masks from dense weights.
        trainings: in order.
    """
    learned_it = bool(trainings) and trainings[0].kind == "learn" and trainings[0].method == method
    found: list[list[Any]] = []
    for training in trainings[1:] if learned_it else trainings:
        if found and found[-1][0] == training.done:
            found[-1][1] += 1
        else:
            found.append([training.done, 1])
    return ", ".join([method, *(done if times == 1 else f"{done} {times} times" for done, times in found)])


def training_facts(entry: TrainingEntry) -> TrainingFacts:
    """Return what a page says of a training.

    Raises:
        ValueError: a number is none that Halve would have put on record.
    """
    return TrainingFacts(
        kind=entry.kind,
        method=entry.method,
        trained=entry.trained,
        teacher="" if entry.teacher is None else entry.teacher.name,
        started_from="" if entry.started_from is None else entry.started_from.name,
        settings=texts(_flat(entry.options)),
        sources=entry.text.sources,
        sequences=entry.text.sequences,
        seq_len=entry.text.seq_len,
        text_sha256=entry.text.sha256,
        held_out_tokens=entry.text.held_out_tokens,
        notes=entry.text.notes,
        learning_rate=finite_value(entry.learning_rate),
        rates_tried={rate: finite_or_none(loss) for rate, loss in entry.rates_tried.items()},
        steps=entry.steps,
        best_step=entry.best_step,
        tokens=entry.tokens,
        device=entry.device,
        forward_dtype=entry.forward_dtype,
        curve=tuple(map(_point, entry.curve)),
        scores=tuple(map(_score, entry.perplexity)),
        environment=texts(entry.environment),
    )


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by name; what belongs to a group has its group before the name."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            found[name] = value
    return found


def _point(entry: PointEntry) -> PointEntry:
    for value in (entry.loss, entry.kl, entry.perplexity, entry.learning_rate):
        finite_or_none(value)
    return entry


def _score(entry: TrainedScoreEntry) -> TrainedScore:
    difference = finite_or_none(entry.log_difference)
    stderr = finite_or_none(entry.log_difference_stderr)
    return TrainedScore(
        source=entry.source,
        seq_len=entry.seq_len,
        windows=entry.windows,
        measured_as=measured_as(entry.windows, entry.seq_len, entry.bos, entry.dtype, entry.scored),
        sha256=entry.tokens_sha256,
        before=perplexity_value(finite_or_none(entry.before), finite_or_none(entry.before_nll)),
        after=perplexity_value(finite_or_none(entry.after), finite_or_none(entry.after_nll)),
        difference="" if difference is None else said_difference(difference, stderr),
    )
