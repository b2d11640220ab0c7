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
from halve.learning.heads import Speaker
from halve.learning.learner import Learner
from halve.learning.options import AUTO, Training, parse_count
from halve.learning.trainer import MaskTrainer, Moments, Point
from halve.learning.training_state import TrainingFiles
from halve.learning.training_text import TrainingRows
from halve.text.rows import Rows

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
class Shape:
    """How sequences are shared out over steps, forward passes and processes.

    Attributes:
        steps: of the optimiser.
        rows: sequences of a forward pass in one process.
        passes: forward passes of a step in one process.
        processes: that train together.
    """

    steps: int
    rows: int
    passes: int
    processes: int

    @property
    def sequences(self) -> int:
        """Sequences of the whole training."""
        return self.steps * self.rows * self.passes * self.processes

    @classmethod
    def of(cls, training: Training, processes: int = 1) -> "Shape":
        """Return what the options come to.

        Raises:
            InputError: a step has fewer sequences than there are processes.
        """
        length = training.text.seq_len
        step = parse_count("batch_tokens", training.schedule.batch_tokens) // length
        if step < processes or step % processes:
            raise InputError(
                f"a step of {step} sequences cannot be shared out over {processes} processes: give batch_tokens = "
                f"{max(1, step // processes) * processes * length}"
            )
        most = max(1, parse_count("forward_tokens", training.schedule.forward_tokens) // length)
        each = step // processes
        rows = max(size for size in range(1, min(most, each) + 1) if each % size == 0)
        return cls(steps=training.text.wanted // (step * length), rows=rows, passes=each // rows, processes=processes)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training came to.

    Attributes:
        steps: that were taken.
        best: the step whose weights stay.
        learning_rate: at the peak.
        tried: the held-out loss that each learning rate came to in its trial, infinite where it diverged.
        curve: what is known of every step.
    """

    steps: int
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
        tell: called with every `Point`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        rows: TrainingRows,
        training: Training,
        shape: Shape,
        files: TrainingFiles | None = None,
        tell: Callable[[Point], None] | None = None,
    ) -> None:
        self._model = student
        self._rows = rows
        self._training = training
        self._shape = shape
        self._files = files
        self._tell = tell
        probe = rows.rows.ids[:1, :16].to(training.machine.target)
        with own_settings(student):
            self._student = Speaker(student, probe, apart=rows.apart)
        self._teacher = None if teacher is None else Speaker(teacher, probe, apart=rows.apart)
        self.notes = tuple(each.note for each in (self._student, self._teacher) if each is not None and each.note)

    def run(self, make: Callable[[], Learner], default_rate: float | None = None) -> Trained:
        """Train, or go on where a stopped training left off, and leave the best weights in the student.

        Args:
            make: returns a learner that is attached to nothing yet.
            default_rate: the learning rate where none is given; None tries several.

        Raises:
            HalveError: the loss is not finite, with every learning rate.
        """
        with (
            own_settings(self._model),
            _checkpointed(self._model, wanted=self._training.schedule.gradient_checkpointing),
        ):
            rate, tried = self._rate(make, default_rate)
            learner = make()
            trainer = self._trainer(learner, rate, self._rows, self._shape, self._files, self._moments, self._tell)
            state = None if self._files is None else self._files.newest()
            trainer.train(resume_from_checkpoint=None if state is None else str(state))
            best = trainer.load_best()
            learner.finish()
        self._model.eval()
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        return Trained(
            steps=trainer.state.global_step, best=best, learning_rate=rate, tried=tried, curve=tuple(trainer.curve)
        )

    @property
    def _moments(self) -> Moments:
        schedule = self._training.schedule
        return Moments.of(self._shape.steps, schedule.evaluations, schedule.save_every)

    def _rate(self, make: Callable[[], Learner], default: float | None) -> tuple[float, dict[float, float]]:
        """Return the learning rate that was given, that is kept, or that does best in short trials."""
        asked = self._training.schedule.learning_rate
        if asked != AUTO:
            return float(asked), {}
        if default is not None:
            return default, {}
        kept = None if self._files is None else self._files.fact("rates")
        tried = {} if kept is None else {float(rate): _number(loss) for rate, loss in kept}
        for rate in RATES:
            if rate in tried:
                continue
            tried[rate] = self._try(make, rate)
            if self._files is not None:
                self._files.keep_fact("rates", [[rate, _plain(loss)] for rate, loss in tried.items()])
            if len(tried) > 1 and not tried[rate] < min(loss for other, loss in tried.items() if other != rate):
                break
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
        before = {name: value.detach().cpu().clone() for name, value in self._model.named_parameters()}
        learner = make()
        try:
            trainer = self._trainer(learner, rate, rows, shape, None, Moments(frozenset({steps})), None)
            trainer.train()
            return min(_number(loss) for loss in trainer.held_out_losses().values())
        except HalveError:  # it diverged
            return math.inf
        finally:
            learner.finish()
            _put_back(self._model, before)

    def _trainer(
        self,
        learner: Learner,
        rate: float,
        rows: TrainingRows,
        shape: Shape,
        files: TrainingFiles | None,
        moments: Moments,
        tell: Callable[[Point], None] | None,
    ) -> MaskTrainer:
        training = self._training
        schedule = training.schedule
        parameters = list(learner.attach(self._model))
        trained = {id(each) for each in parameters}
        for parameter in self._model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        with _work(files) as place:
            arguments = _arguments(training, shape, rate, place)
            return MaskTrainer(
                self._student,
                self._teacher,
                learner,
                parameters,
                rows,
                training.target,
                training.machine.precision,
                schedule.weight_decay,
                schedule.last_rate,
                files,
                arguments,
                moments,
                patience=schedule.patience if files is not None else None,
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
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextmanager
def _work(files: TrainingFiles | None) -> Iterator[Path]:
    """Give the Trainer a directory; it writes nothing into it where no states are kept."""
    if files is not None:
        yield files.home
        return
    with TemporaryDirectory(prefix="halve-") as name:
        yield Path(name)


def _arguments(training: Training, shape: Shape, rate: float, place: Path) -> Any:
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
        bf16=machine.precision == torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=training.text.seed,
        data_seed=training.text.seed,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=max(1, shape.steps // _LOGGED),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=list(schedule.log_to) or "none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        average_tokens_across_devices=True,
    )
    if found.n_gpu > 1:  # several GPUs in one process would be nn.DataParallel
        found._n_gpu = 1  # noqa: SLF001 - there is no public way
    return found


@torch.no_grad()
def _put_back(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(before[name])
        parameter.grad = None


def processes() -> int:
    """Return how many processes train together, as ``torchrun`` and ``accelerate launch`` say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def curve_json(points: tuple[Point, ...]) -> list[dict[str, Any]]:
    """Return a curve as plain JSON values, without what is not known."""
    return [{name: _plain(value) for name, value in asdict(point).items() if value is not None} for point in points]


def _number(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else float(value)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
