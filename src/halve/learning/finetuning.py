"""Fine-tune a pruned checkpoint with its mask kept: from what the user names to a verified checkpoint on disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halve.checkpoint.directory import RECORD
from halve.checkpoint.load import LoadedModel, Source, resolve
from halve.errors import InputError
from halve.learning.launch import is_first_process
from halve.learning.learner import Learner
from halve.learning.lesson import Lesson, Taught, carry_out, check_directory
from halve.learning.methods.fixed_mask import FixedMaskLearner
from halve.learning.options import ADAPTERS, NONE, Finetuning, Training, refuse_present
from halve.learning.pruned_weights import find_pruned
from halve.learning.training.text import TrainingRows
from halve.learning.training.watching import Watch
from halve.model.masked import FixedMasks
from halve.option_groups import fill
from halve.report.before_after import NO_DENSE, find_dense, was_pruned
from halve.report.training import masks_after, previous_record, trained_record
from halve.serial import from_plain

COMMAND = "finetune"


def finetune(pruned: str | Path, out: str | Path, *, watch: Watch | None = None, **options: Any) -> Taught:
    """Train what a pruned checkpoint has kept, so that it says what the dense model says; zeros stay zeros.

    The loss is the Kullback-Leibler divergence from the dense model's distribution of the next token, over the whole
    vocabulary (`halve.learning.training.losses`). A training that was stopped is continued by the same call, from its
    newest whole state, to the same bytes on the same device. Under ``torchrun`` or ``accelerate launch`` all processes
    train together, and the first one writes.

    Everything else is an option, a keyword by its flat name: ``data=["text.jsonl"]``, ``tokens="2M"``,
    ``learning_rate=3e-4``, ``train="lora"``, … docs/options.md lists them.

    Args:
        pruned: directory of a checkpoint that `halve.prune` has written.
        out: directory for the trained checkpoint; it must not exist yet, be empty, or hold the same training,
            unfinished.
        watch: told what happens.
        **options: fields of `halve.learning.options.Finetuning` and its groups; None leaves one at its default.

    Raises:
        InputError: an argument cannot be used as given; nothing was done.
        UnsupportedModelError: the model cannot be trained on text.
        ResumeMismatchError: ``out`` holds an unfinished training that began otherwise.
        CorruptFileError: a file of a model, or of the unfinished training, was damaged.
        HalveError: the loss is not finite, or the volume failed.
    """
    return finetune_as(Path(pruned), Path(out), fill(Finetuning, options), watch)


def resume_finetuning(call: Mapping[str, Any], out: Path, watch: Watch | None = None) -> Taught:
    """Go on with a training as it was called (`halve.learning.training.state.recorded_training`).

    Raises:
        InputError: it began in another directory, with relative paths; else as `finetune`.
    """
    check_directory(call)
    return finetune_as(Path(call["model"]), out, from_plain(Finetuning, call["request"]), watch)


def finetune_as(pruned: Path, out: Path, request: Finetuning, watch: Watch | None = None) -> Taught:
    """Fine-tune as a request says; the arguments, and what is raised, are those of `finetune`."""
    request.check()
    refuse_present("save_adapter", request.save_adapter, out)
    if request.train in ADAPTERS:
        from halve.learning.lora import check_peft

        check_peft()
    source = resolve(pruned, trust_remote_code=request.machine.trust_remote_code)
    if source.kind != "directory" or not (pruned / RECORD).exists():
        raise InputError(f"{pruned} has no {RECORD}: give a checkpoint that halve prune has written")
    previous = previous_record(pruned)
    teacher = find_teacher(pruned, request)

    made: list[Learner] = []

    def prepare(student: LoadedModel, _rows: TrainingRows) -> Callable[[], Learner]:
        masks = find_pruned(student.model, record=pruned)

        def make() -> Learner:
            made[:] = [_learner(request, masks, pruned)]
            return made[0]

        return make

    def record(student: LoadedModel, entry: Mapping[str, Any]) -> dict[str, Any]:
        if request.save_adapter is not None and is_first_process():
            _save_adapter(made[0], request.save_adapter)
        return trained_record(previous, entry, masks_after(student, previous))

    lesson = Lesson(
        command=COMMAND,
        kind=COMMAND,
        method="fixed mask",
        what=request.train,
        began=source,
        teacher=teacher,
        dense=teacher if teacher is not None and was_pruned(pruned, teacher) else None,
        request=request,
        prepare=prepare,
        record=record,
        notes=lambda: made[0].notes,
    )
    return carry_out(lesson, out, watch)


def _learner(request: Finetuning, masks: FixedMasks, pruned: Path) -> Learner:
    if request.train not in ADAPTERS:
        return FixedMaskLearner(masks, request.train)
    from halve.learning.lora import adapter_learner

    return adapter_learner(
        request.train, masks.parameters, request.rank, request.alpha, seed=request.text.seed, base=str(pruned)
    )


def _save_adapter(learner: Learner, directory: Path) -> None:
    from halve.learning.lora import AdapterLearner

    if isinstance(learner, AdapterLearner):
        # Files of the same training, stopped before its checkpoint was complete, are written again.
        learner.save_adapter(directory, learner.effect, again=True)


def find_teacher(pruned: Path, request: Training) -> Source | None:
    """Find the files of the model to learn from; None where none is wanted.

    Raises:
        InputError: it is not there, or is not the model that was pruned and was not named.
    """
    if request.teacher == NONE:
        return None
    try:
        found = find_dense(pruned, request.teacher, trust_remote_code=request.machine.trust_remote_code)
    except InputError as error:
        raise InputError(
            str(error).replace(f"(--dense {NO_DENSE})", f"(teacher = '{NONE}')").replace("--dense", "teacher =")
        ) from error
    if found is None:
        raise InputError(
            f"{pruned} was made from a model in memory: say where the dense model is (teacher), or learn from the text "
            f"alone (teacher = '{NONE}')"
        )
    if request.teacher is None and not was_pruned(pruned, found):
        raise InputError(
            f"{found.name} is not the model that was pruned, or was changed since: put that one back, or name the "
            "model to learn from (teacher)"
        )
    return found
