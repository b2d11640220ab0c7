"""From trained weights to a verified checkpoint in its place, and what is put on record of a training."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from halve.checkpoint.directory import MEASURED
from halve.checkpoint.durable import sha256_of
from halve.checkpoint.load import LoadedModel, Source
from halve.checkpoint.write import write_checkpoint
from halve.errors import HalveError
from halve.evaluation.figure import Perplexity
from halve.learning.training.course import Trained, curve_json
from halve.learning.training.state import TrainingFiles
from halve.learning.training.text import TrainingRows
from halve.memory import peak_memory
from halve.provenance import environment, files_sha256, source_fields
from halve.report.card import leave_beside
from halve.report.measured import FORMAT, add_perplexity, write_measured
from halve.serial import to_plain
from halve.verification import check

if TYPE_CHECKING:
    from halve.learning.lesson import Lesson


class Clock:
    """Adds up the seconds of the phases of a training."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Count what happens inside towards a phase."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun


def round_as_written(loaded: LoadedModel, changed: Collection[str]) -> None:
    """Round trained parameters to what the checkpoint will hold, so that what is measured in memory is what is written.

    Args:
        loaded: the trained model, in float32.
        changed: names of its parameters.
    """
    with torch.no_grad():
        for name in changed:
            parameter = loaded.model.get_parameter(name)
            dtype = loaded.layout.tensors[loaded.layout.locate(name).tensors[0]].dtype
            parameter.copy_(parameter.to(dtype))


def source_json(source: Source) -> dict[str, Any]:
    """Return what is put on record of a model that was read: its kind, name, commit and the hash of its files."""
    return {
        "kind": source.kind,
        "name": source.name,
        "revision": source.revision,
        "sha256": files_sha256(source_fields(source)),
    }


def training_entry(
    lesson: "Lesson", rows: TrainingRows, trained: Trained, tensors: Collection[str], notes: Collection[str]
) -> dict[str, Any]:
    """Return a training as ``halve.json`` has it; no times, so that equal trainings are equal.

    Args:
        lesson: what was learned.
        rows: the text.
        trained: what came of it.
        tensors: on disk that it may have changed.
        notes: sentences.
    """
    training = lesson.request
    machine = training.machine
    options = to_plain(training)
    for group in ("text", "schedule"):
        options |= options.pop(group)
    options.pop("machine")
    options.pop("evaluation")
    start = source_json(lesson.began)
    return {
        "kind": lesson.kind,
        "method": lesson.method,
        "trained": lesson.what,
        "teacher": None if lesson.teacher is None else source_json(lesson.teacher),
        "started_from": {"name": start["name"], "sha256": start["sha256"]},
        "options": options,
        "text": {
            "sources": rows.sources,
            "sequences": len(rows.order),
            "seq_len": rows.rows.ids.shape[1],
            "sha256": rows.sha256,
            "held_out_tokens": rows.held_out.learned,
            "notes": list(notes),
        },
        "learning_rate": trained.learning_rate,
        "rates_tried": {f"{rate:g}": loss for rate, loss in trained.tried.items()},
        "steps": trained.steps,
        "best_step": trained.best,
        "tokens": trained.steps * len(rows.order) // max(1, trained.planned) * rows.rows.ids.shape[1],
        "device": str(machine.target),
        "forward_dtype": str(machine.precision).removeprefix("torch."),
        "tensors": sorted(tensors),
        "curve": curve_json(trained.curve),
        "perplexity": [],
        "environment": environment(),
    }


def publish(
    files: TrainingFiles,
    loaded: LoadedModel,
    changed: Collection[str],
    record: Mapping[str, Any],
    clock: Clock,
    dense: Source | None,
    scores: tuple[Sequence[Perplexity], Sequence[Perplexity]] = ((), ()),
) -> tuple[str, ...]:
    """Write, verify and publish the checkpoint, and remove everything else of the training.

    Args:
        files: of the training.
        loaded: the trained model.
        changed: names of the parameters that may have changed.
        record: the content of ``halve.json`` but for the files' sha256.
        clock: what the training took so far.
        dense: the model that was pruned, for what must not have changed; None where it is not here.
        scores: perplexities of the dense model, and of the trained one, text by text.

    Returns:
        tuple[str, ...]: what there is to say of the report and the model card, sentences.

    Raises:
        HalveError: the bytes on disk are not as they should be, or the volume failed.
    """
    with clock.timing("write"):
        sums = write_checkpoint(files.prepare_staging(), loaded, changed, record)
    with clock.timing("verify"):
        against = dense if dense is not None and dense.shards else None
        code = against is not None and against.trust_remote_code
        verdict = check(files.staging, against=against, trust_remote_code=code)
        if not verdict.ok:
            raise HalveError(
                f"the checkpoint just written to {files.staging} is wrong, do not use it: {verdict.problems[0]}"
            )
    write_measured(
        files.staging,
        {
            "format": FORMAT,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": {phase: round(value, 3) for phase, value in clock.seconds.items()},
            "peak_memory": {"train": peak_memory()},
            "perplexity": [],
        },
    )
    if scores[1]:
        add_perplexity(files.staging, *scores)
    sums[MEASURED] = sha256_of(files.staging / MEASURED)
    written, notes = leave_beside(files.staging, loaded.source, files.out)
    files.publish(sums | written)
    return tuple(notes)
