"""One training, from its rows to trained weights: the learning rate is found, then the Trainer does the rest."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from halve.device import own_settings
from halve.errors import HalveError, InputError
from halve.learning.learner import Learner
from halve.learning.options import AUTO, Shape, Training
from halve.learning.training.heads import Speaker
from halve.learning.training.losses import Scores, loss_sums
from halve.learning.training.needs import Needs, activation_bytes, measured_needs
from halve.learning.training.state import TrainingFiles
from halve.learning.training.text import TrainingRows
from halve.learning.training.trainer import HELD_OUT, MaskTrainer, Milestones, NotFiniteError, Point
from halve.learning.training.watching import Watch
from halve.text.rows import IGNORED, Rows

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""The learning rates that are tried where none is given, each until the next is no better."""
_TRIAL = 0.05
"""Share of the steps that each of them is tried for."""
_FEWEST, _MOST = 4, 100
"""Steps of a trial, at least and at most."""
_JUDGES = 16
"""Held-out sequences that judge a trial, at most."""
_LOGGED = 100
"""How often the loss is logged, over a training."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training came to.

    Attributes:
        steps: that were taken.
        planned: that would have been, had the training not ended early.
        best: the step whose weights stay.
        learning_rate: at the peak.
        tried: the held-out loss that each learning rate came to in its trial, infinite where it diverged.
        curve: what is known of every step.
    """

    steps: int
    planned: int
    best: int
    learning_rate: float
    tried: dict[float, float]
    curve: tuple[Point, ...]


class Course:
    """A student, a teacher and rows, for which learners can be trained.

    Args:
        student: float32 and on its device.
        teacher: on the same device; None learns from the text alone.
        rows: as many sequences as ``shape`` says.
        training: what was asked for.
        shape: of the training.
        files: of a training that can go on; None keeps nothing.
        watch: hears of every `Point`, and of every learning rate that is tried.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        rows: TrainingRows,
        training: Training,
        shape: Shape,
        files: TrainingFiles | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._model = student
        self._rows = rows
        self._training = training
        self._shape = shape
        self._files = files
        self._watch = watch or Watch()
        probe = rows.rows.ids[:1, :16].to(training.machine.target)
        with own_settings(student):
            self._student = Speaker(student, probe, apart=rows.apart)
        self._teacher = None
        if teacher is not None:
            with own_settings(teacher.eval()):
                self._teacher = Speaker(teacher, probe, apart=rows.apart)
        self.notes: tuple[str, ...] = tuple(
            each.note for each in (self._student, self._teacher) if each is not None and each.note
        )

    def run(self, make: Callable[[], Learner], default_rate: float | None = None) -> Trained:
        """Train, or go on where a stopped training left off, and leave the best weights in the student.

        Args:
            make: returns a learner that is attached to nothing yet.
            default_rate: the learning rate where none is given; None tries several.

        Raises:
            HalveError: the loss is not finite, with every learning rate.
        """
        teacher = self._model if self._teacher is None else self._teacher.model
        with (
            own_settings(self._model),
            own_settings(teacher),
            _checkpointed(self._model, wanted=self._training.schedule.gradient_checkpointing),
        ):
            rate, tried = self._rate(make, default_rate)
            learner = make()
            tell = self._watch.point
            trainer = self._trainer(learner, rate, self._rows, self._shape, self._files, self._milestones, tell)
            doubt = learner.doubts(trainer.planned_rates())
            self.notes += (doubt,) if doubt else ()
            state = None if self._files is None else self._files.newest()
            trainer.go_on(state)
            best = trainer.load_best()
            learner.look_back(lambda: trainer.measure()[HELD_OUT])
            learner.finish()
        self._model.eval()
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        return Trained(
            steps=trainer.state.global_step,
            planned=self._shape.steps,
            best=best,
            learning_rate=rate,
            tried=tried,
            curve=tuple(trainer.curve),
        )

    def needs(self, make: Callable[[], Learner], output: int) -> Needs:
        """Return what `run` will take of memory and disk, from a forward pass of one sequence.

        Args:
            make: as for `run`.
            output: bytes of the checkpoint that is going to be written.
        """
        before = _copied(self._model)
        learner = make()
        row = self._rows.rows
        batch = {"input_ids": row.ids[:1], "position_ids": row.positions[:1], "labels": row.labels[:1]}
        place = next(self._model.parameters()).device
        batch = {name: value.to(place) for name, value in batch.items()}
        target, precision = self._training.target, self._training.machine.precision
        checkpointing = self._training.schedule.gradient_checkpointing
        with own_settings(self._model), _checkpointed(self._model, wanted=checkpointing):
            trained = self._attach(learner)
            self._model.train()
            with torch.autocast(place.type, precision, enabled=precision != torch.float32):
                labels = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORED]
                logits: list[int] = []

                def use(said: Scores) -> Tensor:
                    logits.append(said.vocabulary * len(labels))
                    return loss_sums(said, None, labels, target, precision)[0]

                kept = activation_bytes(lambda: self._student.say(self._model, batch, use))
            self._model.eval()
            own = sum(each.nbytes for each in learner.state().values())
            learner.detach()
        _put_back(self._model, before)
        teacher = None if self._teacher is None else self._teacher.model
        device = self._training.machine.target
        return measured_needs(self._model, teacher, trained, own, logits[0], kept, self._shape, output, device)

    def _attach(self, learner: Learner) -> list[nn.Parameter]:
        """Attach a learner to the student, and let only what it trains require gradients."""
        parameters = list(learner.attach(self._model))
        trained = {id(each) for each in parameters}
        for parameter in self._model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return parameters

    @property
    def _milestones(self) -> Milestones:
        schedule = self._training.schedule
        return Milestones.of(self._shape.steps, schedule.evaluations, schedule.save_every)

    def _rate(self, make: Callable[[], Learner], default: float | None) -> tuple[float, dict[float, float]]:
        """Return the learning rate that was given, that is kept, or that does best in short trials."""
        asked = self._training.schedule.learning_rate
        if asked != AUTO:
            return float(asked), {}
        if default is not None:
            return default, {}
        kept = None if self._files is None else self._files.fact("rates")
        tried = {} if kept is None else {float(rate): _number(loss) for rate, loss in kept}
        best_before = math.inf
        for number, rate in enumerate(RATES):
            if rate not in tried:
                tried[rate] = self._try(make, rate)
                if self._files is not None:
                    self._files.keep_fact("rates", [[rate, _plain(loss)] for rate, loss in tried.items()])
            self._watch.trial(rate, tried[rate])
            if number and not tried[rate] < best_before:
                break
            best_before = min(best_before, tried[rate])
        best = min(tried, key=lambda rate: tried[rate])
        if not math.isfinite(tried[best]):
            raise HalveError(
                f"the loss is not finite with any learning rate down to {best:g}: the model or the text is broken, or "
                "give a smaller learning_rate"
            )
        return best, tried

    def _try(self, make: Callable[[], Learner], rate: float) -> float:
        """Return the held-out loss after a short training with a learning rate; the student is put back."""
        steps = min(_MOST, max(_FEWEST, round(_TRIAL * self._shape.steps)), self._shape.steps)
        shape = Shape(steps=steps, rows=self._shape.rows, passes=self._shape.passes, processes=self._shape.processes)
        held = self._rows.held_out
        judges = Rows(held.ids[:_JUDGES], held.positions[:_JUDGES], held.labels[:_JUDGES])
        rows = TrainingRows(self._rows.rows, self._rows.order[: shape.sequences], judges, (), {}, self._rows.apart)
        before = _copied(self._model)
        learner = make()
        try:
            trainer = self._trainer(learner, rate, rows, shape, None, Milestones(frozenset({steps})), None)
            trainer.train()
            return min(_number(loss) for loss in trainer.held_out_losses().values())
        except NotFiniteError:  # it diverged
            return math.inf
        finally:
            learner.detach()
            _put_back(self._model, before)

    def _trainer(
        self,
        learner: Learner,
        rate: float,
        rows: TrainingRows,
        shape: Shape,
        files: TrainingFiles | None,
        moments: Milestones,
        tell: Callable[[Point], None] | None,
    ) -> MaskTrainer:
        training = self._training
        schedule = training.schedule
        parameters = self._attach(learner)
        if files is not None and "tensorboard" in schedule.log_to:  # what it writes is to outlast the states
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(files.out.with_name(f"{files.out.name}-logs")))
        with _work(files) as place:
            arguments = _arguments(training, shape, rate, place, tracked=files is not None)
            return MaskTrainer(
                self._student,
                self._teacher,
                learner,
                parameters,
                rows,
                training.target,
                training.machine.precision,
                schedule.weight_decay or 0.0,
                schedule.last_rate,
                files,
                arguments,
                moments,
                patience=schedule.patience,
                tell=tell,
            )


@contextmanager
def _checkpointed(model: Any, *, wanted: bool) -> Iterator[None]:
    """Let a model compute its activations twice, for a while."""
    if not wanted:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(f"{type(model).__name__} has no gradient checkpointing: leave gradient_checkpointing out")
    # transformers calls it so from 5.24 on.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


@contextmanager
def _work(files: TrainingFiles | None) -> Iterator[Path]:
    """Give the Trainer a directory; it writes nothing into it where no states are kept."""
    if files is not None:
        yield files.home
        return
    with TemporaryDirectory(prefix="halve-") as name:
        yield Path(name)


def _arguments(training: Training, shape: Shape, rate: float, place: Path, *, tracked: bool) -> Any:
    """Return what the Trainer is told; a trial of a learning rate is told to no tracker."""
    from transformers import TrainingArguments

    schedule, machine = training.schedule, training.machine
    device = machine.target
    if device.type == "cuda" and (device.index or 0) != 0:
        raise InputError(
            f"device = {device} is not the first GPU, and the Trainer takes the first that it sees: set "
            f"CUDA_VISIBLE_DEVICES={device.index} and give device = 'cuda'"
        )
    found = TrainingArguments(
        output_dir=str(place),
        per_device_train_batch_size=shape.rows,
        gradient_accumulation_steps=shape.passes,
        max_steps=shape.steps,
        learning_rate=rate,
        warmup_steps=round(schedule.warmup * shape.steps),
        max_grad_norm=schedule.clip,
        use_cpu=device.type == "cpu",
        seed=training.text.seed,
        data_seed=training.text.seed,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=max(1, shape.steps // _LOGGED),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=(list(schedule.log_to) if tracked else []) or "none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        average_tokens_across_devices=True,
    )
    # The trainer lowers products by itself; without this, `accelerate launch --mixed_precision` would do so once more.
    found.mixed_precision = "no"
    if found.n_gpu > 1:  # several GPUs in one process would be nn.DataParallel
        found._n_gpu = 1  # noqa: SLF001 - there is no public way
    return found


def _copied(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters()}


@torch.no_grad()
def _put_back(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(before[name])
        parameter.grad = None


def curve_json(points: tuple[Point, ...]) -> list[dict[str, Any]]:
    """Return a curve as plain JSON values, without what is not known."""
    return [{name: _plain(value) for name, value in asdict(point).items() if value is not None} for point in points]


def _number(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else float(value)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
