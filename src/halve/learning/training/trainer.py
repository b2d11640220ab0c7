"""transformers' Trainer, taught three things: a loss against a teacher, a learner's hooks, and when a state is whole.

Everything else is the Trainer's: gradient accumulation, mixed precision, schedules, logging, one process or many.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halve.checkpoint.durable import writing
from halve.errors import HalveError, one_line
from halve.learning.learner import Learner, Step
from halve.learning.training.heads import Speaker
from halve.learning.training.losses import Scores, Target, loss_sums
from halve.learning.training.state import TrainingFiles
from halve.learning.training.text import TrainingRows
from halve.text.rows import IGNORED, Rows

HELD_OUT = "eval_loss"
"""The name, in the Trainer's logs, of the loss on the held-out text."""
Inputs = dict[str, Tensor]


class NotFiniteError(HalveError):
    """The loss is NaN or infinite: the learning rate is too high, or the model is broken."""


@dataclass(frozen=True)
class Point:
    """What is known at one step of a training.

    Attributes:
        step: optimiser steps done.
        tokens: trained on so far.
        loss: mean over the steps since the last point; None where the point is of the held-out text.
        kl: held-out, to the teacher, in nats a token; None without a teacher, or where the point is of the loss.
        perplexity: of the held-out text; None where the point is of the loss.
        learning_rate: of the last step; None where the point is of the held-out text.
    """

    step: int
    tokens: int
    loss: float | None = None
    kl: float | None = None
    perplexity: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Milestones:
    """The steps at which something happens, counted in steps done.

    Attributes:
        looks: at the held-out text; 0 is before the first.
        saves: of a state to go on from.
    """

    looks: frozenset[int]
    saves: frozenset[int] = frozenset()

    @classmethod
    def of(cls, steps: int, evaluations: int, save_every: int | None) -> "Milestones":
        """Spread them over a training of so many steps; the last one has both."""
        looks = {math.ceil(steps * number / evaluations) for number in range(evaluations + 1)}
        saves = looks - {0} if save_every is None else {*range(save_every, steps + 1, save_every), steps}
        return cls(frozenset(looks), frozenset(saves))


class RowSet(Dataset[Inputs]):
    """The sequences of a training, in order."""

    def __init__(self, rows: Rows, order: Tensor) -> None:
        self._rows = rows
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Inputs:
        row = int(self._order[index])
        return {
            "input_ids": self._rows.ids[row],
            "position_ids": self._rows.positions[row],
            "labels": self._rows.labels[row],
        }


def stacked(rows: list[Inputs]) -> Inputs:
    """Put rows into one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class MaskTrainer(Trainer):
    """A Trainer that trains what a `Learner` says.

    Args:
        student: the model that is trained.
        teacher: the model that it learns from; None learns from the text alone.
        learner: attached to the student's model already.
        rows: the text.
        target: what the loss asks for.
        precision: of products in forward and backward passes.
        decay: weight decay of matrices.
        last_rate: share of the peak that the learning rate ends at.
        files: where states go; None keeps none.
        args: the Trainer's own.
        milestones: the steps at which the held-out text is looked at, and those at which a state is kept.
        patience: looks without improvement after which the training ends.
        tell: called with every `Point`.
    """

    def __init__(
        self,
        student: Speaker,
        teacher: Speaker | None,
        learner: Learner,
        parameters: list[nn.Parameter],
        rows: TrainingRows,
        target: Target,
        precision: torch.dtype,
        decay: float,
        last_rate: float,
        files: TrainingFiles | None,
        args: TrainingArguments,
        milestones: Milestones,
        *,
        patience: int | None = None,
        tell: Callable[[Point], None] | None = None,
    ) -> None:
        self.learner = learner
        self._student = student
        self._teacher = teacher
        self._parameters = parameters
        self._held_out = rows.held_out
        self._target = target
        self._precision = precision
        self._decay = decay
        self._last_rate = last_rate
        self._files = files
        self._row_tokens = rows.rows.ids.shape[1]
        self._tell = tell
        self._rows_in_order = RowSet(rows.rows, rows.order)
        self._names = {id(each): name for name, each in student.model.named_parameters()}
        self._best: tuple[int, dict[str, Tensor], dict[str, Tensor]] | None = None  # where no files are kept
        self._anchor: int | None = None
        self._patience = patience
        self._looks = len(milestones.looks)
        super().__init__(
            model=student.model,
            args=args,
            data_collator=stacked,
            train_dataset=self._rows_in_order,
            callbacks=[_Hooks(self, milestones)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the labels of a whole step

    # What the Trainer asks of a subclass

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the learner's optimiser."""
        if self.optimizer is None:
            self.optimizer = self.learner.optimiser(self._parameters, self.args.learning_rate, self._decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Return a schedule that rises in a line to the peak and falls along a cosine; no step is at 0."""
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            assert chosen is not None  # noqa: S101 - the Trainer makes it first
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, self._share_of_rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _share_of_rate(self, step: int) -> float:
        warm, last = self.args.warmup_steps, self._last_rate
        if step < warm:
            return (step + 1) / (warm + 1)
        done = (step - warm) / max(1, self.args.max_steps - warm)
        return last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    def planned_rates(self) -> list[float]:
        """Return the learning rate of every step."""
        return [self.args.learning_rate * self._share_of_rate(step) for step in range(self.args.max_steps)]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Return the sequences in the order that was chosen."""
        return SequentialSampler(self._rows_in_order)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one forward pass, so scaled that those of a step add up to the mean over its tokens."""
        loss, _ = self._loss(model, inputs)
        if not self._finite_everywhere(loss):
            raise NotFiniteError(
                f"the loss is not finite after {self.state.global_step} steps: give a smaller learning_rate, and "
                "another directory"
            )
        if num_items_in_batch is None:
            raise HalveError("the Trainer of this version of transformers does not count the labels of a step")
        scaled = loss * self.accelerator.num_processes / num_items_in_batch
        penalty = self.learner.penalty()
        if penalty is not None:
            scaled = scaled + penalty / self.current_gradient_accumulation_steps
        return (scaled, None) if return_outputs else scaled

    def _finite_everywhere(self, loss: Tensor) -> bool:
        """Whether the loss is finite in every process, so that all stop together and none waits for another."""
        finite = loss.detach().isfinite()
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce(finite.float(), "sum") == self.accelerator.num_processes
        return bool(finite)

    def _loss(self, model: nn.Module, batch: Inputs) -> tuple[Tensor, Tensor]:
        judge = None if self._teacher is None else self._teacher.scores(batch)
        labels = batch["labels"][:, 1:]
        labels = labels[labels != IGNORED]
        sums: list[Tensor] = []

        def use(scores: Scores) -> Tensor:
            loss, found = loss_sums(scores, judge, labels, self._target, self._precision)
            sums.append(found)
            return loss

        with self._lowered():
            loss = self._student.say(model, batch, use)
        return loss, sums[0]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the held-out text, as the model would be if the training ended now, and log it."""
        del eval_dataset, ignore_keys
        with self.learner.ended():
            found = self.measure()
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def measure(self) -> dict[str, float]:
        """Measure the held-out text with the model as it computes now.

        Returns:
            dict[str, float]: in nats a token, the loss, the cross-entropy, and with a teacher the KL.
        """
        plain = self._student.model
        model = self.model_wrapped if self.is_in_train and self.model_wrapped is not None else plain
        was_training = plain.training
        plain.eval()
        batch = self.args.per_device_train_batch_size
        rank, world = self.args.process_index, self.args.world_size
        total = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        rows = self._held_out
        with torch.no_grad():
            for start in range(0, len(rows), batch * world):  # every process runs as often, some on nothing new
                mine = slice(start + rank * batch, start + (rank + 1) * batch)
                ids, positions, labels = rows.ids[mine], rows.positions[mine], rows.labels[mine]
                if not len(ids):
                    ids, positions = rows.ids[:1], rows.positions[:1]
                    labels = torch.full_like(rows.labels[:1], IGNORED)
                inputs = {"input_ids": ids, "position_ids": positions, "labels": labels}
                inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
                loss, sums = self._loss(model, inputs)
                count = (labels[:, 1:] != IGNORED).sum().to(total)
                total += torch.stack((loss.to(total), sums[0].to(total), sums[1].to(total), count))
        plain.train(was_training)
        loss, kl, ce, count = self.accelerator.reduce(total).tolist()
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss on the held-out text is not finite after {self.state.global_step} steps: give a smaller "
                "learning_rate, and another directory"
            )
        found = {HELD_OUT: loss / count, "eval_ce": ce / count}
        if self._teacher is not None:
            found["eval_kl"] = kl / count
        return found

    def _lowered(self) -> AbstractContextManager[Any]:
        """Multiply in the precision that was asked for.

        Not left to accelerate, which does it for the first training of a process, and not for those after a trial.
        """
        if self._precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.args.device.type, self._precision)

    # States that a stopped training goes on from

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write what is trained, and what the learner needs beside it; nothing else is needed to go on."""
        if self._files is not None and output_dir is not None and self.args.should_save:
            self._files.write_trained(Path(output_dir), self.trained(), self.learner.state())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a state, and mark it as whole when all of it is on the disk."""
        if self._files is None:
            return
        state = self._files.home / f"checkpoint-{self.state.global_step}"
        with _writing_state(state):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._files.mark(state)
        self._anchor = self._best_step()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put back what `_save` wrote."""
        if self._files is not None:
            state = self._files.read_trained(Path(resume_from_checkpoint), self.trained())
            self.learner.load_state(state)

    def go_on(self, state: Path | None) -> None:
        """Train, from a state if there is one; a training that had ended with it is only put back."""
        if state is None:
            self.train()
            return
        kept = TrainerState.load_from_json(str(state / "trainer_state.json"))
        before, self.state = self.state, kept
        self._anchor = self._best_step()
        if kept.global_step >= kept.max_steps or self.has_waited():
            self._load_from_checkpoint(str(state))
            return
        self.state = before
        self.train(resume_from_checkpoint=str(state))

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters that are trained, by their names in the model."""
        return {self._names.get(id(each), f"trained.{number}"): each for number, each in enumerate(self._parameters)}

    def point(self, entry: Mapping[str, float], step: int) -> Point:
        """Return what an entry of the Trainer's log says."""
        tokens = step * self._row_tokens * self.args.train_batch_size * self.args.gradient_accumulation_steps
        tokens *= self.args.world_size
        ce = entry.get("eval_ce")
        return Point(
            step=step,
            tokens=tokens,
            loss=entry.get("loss"),
            kl=entry.get("eval_kl"),
            perplexity=None if ce is None else math.exp(min(ce, 700.0)),
            learning_rate=entry.get("learning_rate"),
        )

    @property
    def curve(self) -> list[Point]:
        """What was logged so far, in order."""
        wanted = [entry for entry in self.state.log_history if "loss" in entry or HELD_OUT in entry]
        return [self.point(entry, int(entry["step"])) for entry in wanted]

    def held_out_losses(self) -> dict[int, float]:
        """Return the loss on the held-out text at every step at which it was looked at."""
        return {int(entry["step"]): entry[HELD_OUT] for entry in self.state.log_history if HELD_OUT in entry}

    def _best_step(self) -> int:
        """Return the first of the steps that the held-out text likes best so far."""
        losses = self.held_out_losses()
        return min(losses, key=lambda step: (losses[step], step))

    def has_waited(self) -> bool:
        """Whether so many looks at the held-out text in a row brought nothing better that the training ends."""
        best = self._best_step()
        return self._patience is not None and sum(step > best for step in self.held_out_losses()) >= self._patience

    def keep_best(self) -> None:
        """Keep the trained parameters if the held-out text never liked any better."""
        step = self._best_step()
        if step != max(self.held_out_losses()):
            return
        if self._files is None and self._looks > 1:
            own = {name: value.detach().clone() for name, value in self.learner.state().items()}
            self._best = (step, {name: value.detach().clone() for name, value in self.trained().items()}, own)
        elif self._files is not None and self.args.should_save:
            self._files.write_best(step, self.trained(), self.learner.state(), self._anchor)

    def load_best(self) -> int:
        """Put back the weights that the held-out text liked best, and return the step that they are of."""
        best = self._best_step()
        self.accelerator.wait_for_everyone()  # the first process has written them
        if best != self.state.global_step:
            if self._files is not None:
                self.learner.load_state(self._files.read_best(best, self.trained()))
            elif self._best is not None:
                for name, parameter in self.trained().items():
                    parameter.data.copy_(self._best[1][name])
                self.learner.load_state(self._best[2])
        self.accelerator.wait_for_everyone()  # all have read them, before they are removed
        return best


class _Hooks(TrainerCallback):
    """Calls the learner at its places, says when to look at the held-out text and when to save."""

    def __init__(self, trainer: MaskTrainer, milestones: Milestones) -> None:
        self._trainer = trainer
        self._milestones = milestones

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0 and 0 in self._milestones.looks:
            self._trainer.evaluate()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.learner.begin_step(self._step(state))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.learner.before_update(self._step(state))

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        optimiser = self._trainer.optimizer
        assert optimiser is not None  # noqa: S101 - it has just stepped
        self._trainer.learner.after_update(self._step(state), getattr(optimiser, "optimizer", optimiser))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_evaluate = state.global_step in self._milestones.looks
        control.should_save = state.global_step in self._milestones.saves
        # The mean since the last log is no part of a state: one that goes on has to begin a new one as well.
        control.should_log = control.should_log or control.should_save

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.keep_best()
        if self._trainer.has_waited():
            control.should_training_stop = True
            control.should_save = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = kwargs.get("logs") or {}
        if self._trainer._tell is not None and ("loss" in entry or HELD_OUT in entry):  # noqa: SLF001 - one class in two
            self._trainer._tell(self._trainer.point(entry, state.global_step))  # noqa: SLF001

    @staticmethod
    def _step(state: TrainerState) -> Step:
        return Step(state.global_step, state.max_steps)


@contextmanager
def _writing_state(state: Path) -> Iterator[None]:
    """Say in one sentence that a state could not be written, whoever writes it.

    Raises:
        HalveError: instead of an OSError, or of what `torch.save` makes of one.
    """
    with writing(state):
        try:
            yield
        except RuntimeError as error:  # torch.save keeps no errno
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise HalveError(f"writing {state} failed ({one_line(error)}): free some space and call again") from error
