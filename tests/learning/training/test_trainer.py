"""The Trainer and its hooks: what of transformers it leans on, and when a learner is called."""

import inspect

import pytest
import torch
from transformers import Trainer, TrainingArguments

from courses import Plain, course, made_rows
from halve.errors import HalveError
from halve.learning.learner import Step
from halve.learning.training.trainer import MaskTrainer, RowSet, _writing_state, stacked
from models import decoder


@pytest.mark.parametrize("name", ["_get_train_sampler", "_save", "_save_checkpoint", "_load_from_checkpoint"])
def test_what_is_overridden_is_called_by_the_trainer(name):
    calls = inspect.getsource(Trainer).count(f"self.{name}")
    assert calls >= 1
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == list(
        inspect.signature(getattr(MaskTrainer, name)).parameters
    )


@pytest.mark.parametrize(
    "name", ["model_accepts_loss_kwargs", "current_gradient_accumulation_steps", "_created_lr_scheduler"]
)
def test_what_is_set_or_read_is_used_by_the_trainer(name):
    assert f"self.{name}" in inspect.getsource(Trainer)


def test_one_process_uses_one_gpu():
    assert "self._n_gpu" in inspect.getsource(TrainingArguments.n_gpu.fget)


def test_the_learner_is_called_at_its_places():
    calls = []

    class Told(Plain):
        def begin_step(self, step):
            calls.append(("begin", step))

        def penalty(self):
            calls.append(("penalty", None))

        def before_update(self, step):
            assert all(each.grad is not None for each in self.given)
            calls.append(("before", step))

        def after_update(self, step, optimiser):
            assert isinstance(optimiser, torch.optim.SGD)
            calls.append(("after", step))

        def attach(self, model):
            self.given = super().attach(model)
            return self.given

        def finish(self):
            calls.append(("finish", None))

    student = decoder("llama")
    done = course(student, evaluations=1, warmup=0.5).run(Told)
    one = ["begin", "penalty", "penalty", "before", "after"]
    assert [name for name, _ in calls] == [*one * 4, "finish"]
    assert [step for name, step in calls if name == "begin"] == [Step(number, 4) for number in range(4)]
    rates = [point.learning_rate for point in done.curve if point.loss is not None]
    assert len(rates) == 4
    assert 0.0 < rates[0] < rates[1]


def test_a_penalty_counts_once_a_step():
    def moved(weight, forward):
        class Pulled(Plain):
            def attach(self, model):
                self.weight = model.lm_head.weight
                return [self.weight]

            def penalty(self):
                return weight * self.weight.sum()

        model, rows = decoder("llama"), made_rows()
        course(model, None, rows, evaluations=1, forward_tokens=forward, last_rate=1.0).run(Pulled)
        return model.lm_head.weight.detach().clone()

    whole, halves = moved(0.1, 64), moved(0.1, 16)
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(whole, moved(0.0, 64))


def test_rows_come_in_their_order():
    rows = made_rows()
    given = RowSet(rows.rows, torch.tensor([3, 3, 0]))
    assert len(given) == 3
    batch = stacked([given[index] for index in range(3)])
    assert torch.equal(batch["input_ids"], rows.rows.ids[[3, 3, 0]])
    assert batch.keys() == {"input_ids", "position_ids", "labels"}


def test_a_failed_write_is_one_sentence_and_other_errors_stay(tmp_path):
    message = "[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"
    with pytest.raises(HalveError, match=r"writing .* failed .*free some space"), _writing_state(tmp_path):
        raise RuntimeError(message)
    with pytest.raises(HalveError, match=r"writing .* failed \(gone\)"), _writing_state(tmp_path):
        raise OSError(5, "gone")
    with pytest.raises(RuntimeError, match="other"), _writing_state(tmp_path):
        raise RuntimeError("other")
