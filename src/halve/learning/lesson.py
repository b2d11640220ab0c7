"""A training from a checkpoint to a checkpoint: what fine-tuning and learning masks have in common.

A `Lesson` says what is to be learned; `carry_out` loads the models, reads the text, checks that there is room, trains,
measures, writes, verifies and publishes. It goes on where a stopped training left off.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halve.checkpoint.load import LoadedModel, Source, load_model
from halve.checkpoint.room import check_destination
from halve.checkpoint.shards import tensor_bytes
from halve.checkpoint.write import output_bytes
from halve.errors import CorruptFileError, HalveError, InputError
from halve.evaluation.figure import Perplexity
from halve.evaluation.request import Evaluation, overlap
from halve.learning.launch import check_launcher, processes
from halve.learning.learner import Learner
from halve.learning.options import NONE, Shape, Training
from halve.learning.training.course import Course, Trained
from halve.learning.training.heads import check_causal
from halve.learning.training.needs import least_needs
from halve.learning.training.publishing import Clock, publish, round_as_written, training_entry
from halve.learning.training.state import TrainingFiles, open_training
from halve.learning.training.text import TrainingRows, read_rows, training_rows, write_rows
from halve.learning.training.trainer import NotFiniteError
from halve.learning.training.watching import Watch
from halve.provenance import deciding_environment, files_sha256, flat, source_fields
from halve.report.training import scores_json
from halve.serial import to_plain


@dataclass(frozen=True, kw_only=True)
class Taught:
    """The result of a training.

    Attributes:
        model: the trained model, in float32, rounded as it was written, on the CPU.
        trained: how the training went.
        record: the content of ``halve.json`` but for the files' sha256.
        out: the checkpoint's directory.
        dense: the teacher's perplexities, one a text of the evaluation, empty without one.
        before: those of the model that the training began with.
        after: the trained model's.
        notes: what to know, sentences.
    """

    model: nn.Module
    trained: Trained
    record: dict[str, Any] = field(repr=False)
    out: Path
    dense: tuple[Perplexity, ...] = ()
    before: tuple[Perplexity, ...] = ()
    after: tuple[Perplexity, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is learned.

    Attributes:
        command: of the command line, for a training that goes on.
        kind: of the training on record, ``finetune`` or ``learn``.
        method: on record.
        what: is trained, a word.
        began: the checkpoint that the training begins with.
        teacher: the model to learn from; None learns from the text alone.
        dense: the dense model, for what must not have changed; None where it is not here.
        request: what was asked for.
        prepare: given the student on its device and the rows, what makes a learner that is attached to nothing yet.
        default_rate: the learning rate where none is given; None tries several.
        record: given the trained student and the entry of this training, the content of ``halve.json``.
        also: sha256 of what else is read and decides about the bytes, by what it is.
        notes: given nothing, sentences on what was prepared.
    """

    command: str
    kind: str
    method: str
    what: str
    began: Source
    teacher: Source | None
    dense: Source | None
    request: Training
    prepare: Callable[[LoadedModel, TrainingRows], Callable[[], Learner]]
    default_rate: float | None = None
    record: Callable[[LoadedModel, Mapping[str, Any]], dict[str, Any]]
    also: Mapping[str, str] = field(default_factory=dict)
    notes: Callable[[], tuple[str, ...]] = tuple

    @cached_property
    def models(self) -> dict[str, str]:
        """What decides about the models that are read: the sha256 of their files."""
        return {
            "started_from": files_sha256(source_fields(self.began)),
            "teacher": NONE if self.teacher is None else files_sha256(source_fields(self.teacher)),
        }


def carry_out(lesson: Lesson, out: Path, watch: Watch | None = None) -> Taught:
    """Train, and publish what comes out; what is raised is as for `halve.learning.finetuning.finetune`."""
    watch = watch or Watch()
    request, source = lesson.request, lesson.began
    request.check()
    shape = Shape.of(request, processes())
    check_destination(out, source, source.size)
    clock = Clock()
    check_launcher()
    with holding(out, request.machine.target) as files, _telling_what_is_kept(files):
        _refuse_too_large(lesson, files, watch)
        watch.phase("load")
        with clock.timing("load"):
            student = load_student(source, request)
            teacher = None if lesson.teacher is None else load_teacher(lesson.teacher, request, student)
        watch.phase("text")
        with clock.timing("text"):
            rows = _kept_rows(files, lesson, student, teacher, shape, watch)
        mark = _fingerprint(lesson, rows)
        files.compare(mark)
        with clock.timing("prepare"):
            make = lesson.prepare(student, rows)
            course = Course(
                student.model, None if teacher is None else teacher.model, rows, request, shape, files, watch
            )
            needs = course.needs(make, output_bytes(student))
        watch.needs(needs)
        needs.check(files)
        files.begin(mark, call_of(lesson))
        judge = _Judge(request.evaluation, student, teacher, request, files, clock)
        judge.measure_before(watch)
        given = _hashes(student.model)
        watch.phase("train")
        with clock.timing("train"):
            trained = course.run(make, lesson.default_rate)
        changed = [name for name, found in _hashes(student.model).items() if found != given[name]]
        round_as_written(student, changed)
        after = judge.measure_after(watch)
        student.model.cpu()
        notes = [*student.notes, *rows.notes, *course.notes, *lesson.notes()]
        tensors = {tensor for name in changed for tensor in student.layout.locate(name).tensors}
        entry = training_entry(lesson, rows, trained, tensors, notes)
        entry["perplexity"] = scores_json(judge.before, after)
        record = lesson.record(student, entry)
        watch.phase("write")
        notes += judge.cautions
        if files.writes:
            notes += publish(files, student, changed, record, clock, lesson.dense, (judge.dense, after))
    return Taught(
        model=student.model,
        trained=trained,
        record=record,
        out=out,
        dense=judge.dense,
        before=judge.before,
        after=after,
        notes=tuple(notes),
    )


_WHOLE_BLOCKS = ("all", "everything")
"""Words for what is trained of which all weights of the blocks are a part."""


def _refuse_too_large(lesson: Lesson, files: TrainingFiles, watch: Watch) -> None:
    """Refuse models that cannot even be loaded to be trained, with the table of what that takes."""
    machine = lesson.request.machine
    whole = lesson.what in _WHOLE_BLOCKS
    needs = least_needs(lesson.began, lesson.teacher, machine.precision, machine.target, whole_blocks=whole)
    if not needs.fits:
        watch.needs(needs)
        needs.check(files)


def load_student(source: Source, request: Training) -> LoadedModel:
    """Load a model in float32, on the device of the training.

    Raises:
        InputError: it is no causal language model.
    """
    found = load_model(source, dtype=torch.float32, attention=request.machine.attention)
    nn.Module.to(found.model, request.machine.target)
    check_causal(found.model)
    return found


def load_teacher(source: Source, request: Training, student: LoadedModel) -> LoadedModel:
    """Load the model to learn from, in the dtype of the products.

    Raises:
        InputError: it has another vocabulary than the student.
    """
    found = load_model(source, dtype=request.machine.precision, attention=request.machine.attention)
    own = None if found.tokenizer is None else found.tokenizer.get_vocab()
    if own is not None and student.tokenizer is not None and own != student.tokenizer.get_vocab():
        raise InputError(
            f"the teacher {source.name} has another vocabulary than the student: give a teacher with the same tokenizer"
        )
    sizes = [_vocabulary(each.model) for each in (found, student)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher {source.name} has {sizes[0]} logits a token and the student {sizes[1]}: give a teacher with "
            "the same vocabulary"
        )
    nn.Module.to(found.model, request.machine.target)
    return found


def _vocabulary(model: Any) -> int | None:
    """Return how many logits a model has for each token; None where its head does not tell."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "out_features", None)


def _hashes(model: nn.Module) -> dict[str, bytes]:
    """Return a hash of every parameter, which takes no memory, unlike a copy."""
    return {
        name: hashlib.blake2b(tensor_bytes(value.detach().cpu().contiguous())).digest()
        for name, value in model.named_parameters()
    }


def _kept_rows(
    files: TrainingFiles,
    lesson: Lesson,
    student: LoadedModel,
    teacher: LoadedModel | None,
    shape: Shape,
    watch: Watch,
) -> TrainingRows:
    """Return the rows of a training; those that cost much to make are kept for one that goes on."""
    text = lesson.request.text
    if not text.is_far:
        return training_rows(text, student, teacher, shape.sequences, watch.writing)
    asked = {**to_plain(text), "sequences": shape.sequences, **lesson.models}
    kept: TrainingRows | None = None
    with _first_process_first(files):
        kept = read_rows(files.home, asked)
        if kept is None and files.writes:
            kept = training_rows(text, student, teacher, shape.sequences, watch.writing)
            write_rows(files.home, kept, asked)
    if kept is None:
        raise HalveError(f"the first process has not kept the training text in {files.home}: see what it says")
    return kept


@contextmanager
def _first_process_first(files: TrainingFiles) -> Iterator[None]:
    """Let the other processes wait until the first one is through, if there are several."""
    if processes() == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState()
    if not files.writes:
        state.wait_for_everyone()
    yield
    if files.writes:
        state.wait_for_everyone()


@contextmanager
def _telling_what_is_kept(files: TrainingFiles) -> Iterator[None]:
    """Let an error say that the training can go on, where to call again would help."""
    try:
        yield
    except HalveError as error:
        helps = not isinstance(error, InputError | CorruptFileError | NotFiniteError)
        error.unfinished = files.out if helps and files.begun and files.home.is_dir() else None
        raise


@contextmanager
def holding(out: Path, device: torch.device) -> Iterator[TrainingFiles]:
    """Hold the directory of a training in the first process; the others wait for it, and only read."""
    if processes() == 1:
        with open_training(out) as files:
            yield files
        return
    from accelerate import PartialState

    # A teacher may write its text for hours while the others wait; who launched them ends them when one fails.
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if state.is_main_process:
        with open_training(out) as files:
            state.wait_for_everyone()
            yield files
        return
    state.wait_for_everyone()
    yield TrainingFiles(out, writes=False)


def _fingerprint(lesson: Lesson, rows: TrainingRows) -> dict[str, str]:
    """Return everything that decides the bytes of a training, field by field."""
    request = lesson.request
    asked = to_plain(request)
    machine = request.machine
    device = machine.target
    for group, names in (("text", ("data", "text_field")), ("schedule", ("log_to",))):
        for name in names:
            asked[group].pop(name)
    for name in ("evaluation", "machine", "teacher", "prior"):
        asked.pop(name, None)
    fields: dict[str, Any] = {
        **flat("", asked),
        "method": lesson.method,
        "text": rows.sha256,
        **lesson.models,
        **lesson.also,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device,
        "forward_dtype": machine.precision,
        "attention": machine.attention,
        "processes": processes(),
        **flat("environment", deciding_environment()),
    }
    return {name: str(value) for name, value in sorted(fields.items())}


def call_of(lesson: Lesson) -> dict[str, Any]:
    """Return a call as JSON values, for `halve resume`."""
    request = lesson.request
    places = [lesson.began.name, *(text.source for text in request.text.texts), request.teacher or ""]
    places.append(getattr(request, "prior", None) or "")
    places += [] if request.evaluation is None else [str(each) for each in request.evaluation.data]
    relative = any(not Path(place).expanduser().is_absolute() and Path(place).exists() for place in places if place)
    beside = [getattr(request, name, None) for name in ("save_masks", "save_adapter")]  # they need not exist yet
    relative |= any(not Path(place).expanduser().is_absolute() for place in beside if place is not None)
    call = {
        "command": lesson.command,
        "model": lesson.began.name,
        "request": to_plain(request),
        "directory": str(Path.cwd()) if relative else None,
    }
    return dict(json.loads(json.dumps(call)))


def check_directory(call: Mapping[str, Any]) -> None:
    """Refuse to go on with a training from another directory than it was begun in, where that matters.

    Raises:
        InputError: relative paths of the call are of another directory.
    """
    if call["directory"] is not None and call["directory"] != str(Path.cwd()):
        raise InputError(
            f"the training was begun in {call['directory']}, with paths relative to it: resume it from there"
        )


class _Judge:
    """Perplexity of the dense, the pruned and the trained model: what decides nothing, and tells what was gained."""

    def __init__(
        self,
        evaluation: Evaluation | None,
        student: LoadedModel,
        teacher: LoadedModel | None,
        request: Training,
        files: TrainingFiles,
        clock: Clock,
    ) -> None:
        self._evaluation = evaluation
        self._student = student
        self._teacher = teacher
        self._device = request.machine.target
        self._files = files
        self._clock = clock
        self._texts = [] if evaluation is None else evaluation.texts(student, request.text.seq_len)
        self.dense: tuple[Perplexity, ...] = ()
        self.before: tuple[Perplexity, ...] = ()
        trained_on = [text.source for text in request.text.texts]
        names = [text.source for text in self._texts]
        said = [overlap(each, names, used="trained") for each in trained_on]
        self.cautions = tuple(each for each in said if each)

    def measure_before(self, watch: Watch) -> None:
        """Measure the dense model and the pruned one, or take what was measured before the training was stopped."""
        if self._evaluation is None:
            return
        kept = self._files.fact("before")
        if kept is not None and kept["texts"] == [text.sha256 for text in self._texts]:
            self.dense, self.before = (tuple(_read(each) for each in kept[name]) for name in _JUDGED)
            return
        watch.phase("evaluate")
        with self._clock.timing("evaluate"):
            if self._teacher is not None:
                self.dense = self._evaluation.measure(self._teacher.model, self._texts, self._device)
            self.before = self._evaluation.measure(self._student.model, self._texts, self._device)
        measured = zip(_JUDGED, (self.dense, self.before), strict=True)
        values = {name: [asdict(each) for each in scores] for name, scores in measured}
        self._files.keep_fact("before", {"texts": [text.sha256 for text in self._texts], **values})

    def measure_after(self, watch: Watch) -> tuple[Perplexity, ...]:
        """Measure the trained model."""
        if self._evaluation is None:
            return ()
        watch.phase("evaluate")
        with self._clock.timing("evaluate"):
            return self._evaluation.measure(self._student.model, self._texts, self._device)


_JUDGED = ("dense", "pruned")


def _read(entry: Mapping[str, Any]) -> Perplexity:
    return Perplexity(**{**entry, "window_nll": tuple(entry["window_nll"])})
