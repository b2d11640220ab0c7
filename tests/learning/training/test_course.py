"""One training in memory: what a step is, how the learning rate is found, and which weights stay."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from courses import LENGTH, Heard, Plain, course, learner, made_rows
from halve.errors import HalveError, InputError
from halve.learning.learner import Learner
from halve.learning.training.course import RATES
from halve.learning.training.trainer import Milestones
from halve.text.rows import IGNORED
from kept_models import pruned_decoder, zeros
from models import decoder


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_steps_are_those_of_the_mean_over_all_tokens_of_a_batch(share):
    """By hand, in one pass a step over unevenly filled rows, with torch's own losses."""
    student, teacher, rows = decoder("llama"), decoder("llama", seed=1), made_rows()
    rows = replace(rows, held_out=rows.rows)  # what is trained on gets better, so that the last step's weights stay
    mine = copy.deepcopy(student).requires_grad_(True)
    options = {"ce_share": share, "last_rate": 1.0, "evaluations": 1}
    assert course(student, teacher, rows, **options).run(lambda: learner(student, Plain)).best == 4
    for step in range(4):
        at = slice(8 * step, 8 * step + 8)
        wanted = rows.rows.labels[at, 1:] != IGNORED
        said = mine(rows.rows.ids[at]).logits[:, :-1][wanted].log_softmax(-1)
        with torch.no_grad():
            judge = teacher(rows.rows.ids[at]).logits[:, :-1][wanted].log_softmax(-1)
        ce = -said.gather(1, rows.rows.ids[at, 1:][wanted][:, None]).mean()
        kl = (judge.exp() * (judge - said)).sum(-1).mean()
        (share * ce + (1 - share) * kl).backward()
        with torch.no_grad():
            for parameter in mine.parameters():
                parameter.sub_(1e-2 * parameter.grad)
                parameter.grad = None
    for one, other in zip(student.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_accumulated_passes_are_one():
    found = []
    for forward in (8 * LENGTH, 2 * LENGTH):
        model = decoder("llama")
        course(model, decoder("llama", seed=1), forward_tokens=forward, evaluations=1).run(
            lambda m=model: learner(m, Plain)
        )
        found.append(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_mask_is_kept_and_the_student_comes_nearer():
    student, heard = pruned_decoder(), Heard()
    before = zeros(student)
    done = course(student, decoder("llama"), watch=heard, evaluations=4).run(lambda: learner(student))
    looks = [point for point in done.curve if point.kl is not None]
    assert [point.step for point in looks] == [0, 1, 2, 3, 4]
    assert looks[-1].kl < looks[0].kl
    assert (done.steps, done.planned, done.tried) == (4, 4, {})
    assert heard.points == list(done.curve)
    assert heard.points[-1].tokens == 256
    assert not any(parameter.requires_grad for parameter in student.parameters())
    for name, parameter in student.named_parameters():
        if name in before:
            assert not bool((parameter[before[name]] != 0).any()), name


def test_the_best_weights_are_put_back():
    student = decoder("llama")
    start = copy.deepcopy(student)
    done = course(student, start, learning_rate=0.1, evaluations=4).run(lambda: learner(student, Plain))
    assert done.best == 0  # it was its own teacher
    assert done.steps == 4
    for one, other in zip(student.parameters(), start.parameters(), strict=True):
        assert torch.equal(one, other)


def test_patience_ends_a_training():
    student = decoder("llama")
    run = course(student, copy.deepcopy(student), learning_rate=0.1, evaluations=4, patience=2)
    done = run.run(lambda: learner(student, Plain))
    assert (done.best, done.steps, done.planned) == (0, 2, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_learning_rate_that_does_best_is_taken_and_trials_leave_no_trace(dtype):
    student, teacher = pruned_decoder(), decoder("llama")
    start = [parameter.detach().clone() for parameter in student.parameters()]
    run = course(student, teacher, learning_rate="auto", evaluations=1, forward_dtype=dtype)
    rate, tried = run._rate(lambda: learner(student), None)
    for one, other in zip(student.parameters(), start, strict=True):
        assert torch.equal(one, other)
        assert one.grad is None
    assert list(tried) == list(RATES[: len(tried)])
    assert rate == min(tried, key=tried.get)
    assert len(tried) == len(RATES) or tried[RATES[len(tried) - 1]] >= min(tried.values())
    done = run.run(lambda: learner(student))
    assert (done.learning_rate, done.tried) == (rate, tried)
    given = pruned_decoder()
    course(given, teacher, learning_rate=rate, evaluations=1, forward_dtype=dtype).run(lambda: learner(given))
    for one, other in zip(student.parameters(), given.parameters(), strict=True):
        assert torch.equal(one, other)


class Explosive(Plain):
    """Diverges above a learning rate."""

    limit = 5e-4

    def optimiser(self, parameters, rate, decay):
        self.parameters, self.bad = list(parameters), rate > self.limit
        return super().optimiser(self.parameters, rate, decay)

    def after_update(self, step, optimiser):
        if self.bad:
            self.parameters[0].data.fill_(math.nan)


def test_a_rate_that_diverges_is_dropped():
    student = decoder("llama")
    heard = Heard()
    run = course(student, decoder("llama", seed=1), watch=heard, learning_rate="auto")
    done = run.run(lambda: learner(student, Explosive))
    assert heard.trials == done.tried
    assert done.tried[1e-3] == math.inf
    assert list(done.tried) == [1e-4, 3e-4, 1e-3]
    assert done.learning_rate in {1e-4, 3e-4}


def test_a_loss_that_is_not_finite_is_one_sentence(monkeypatch):
    student = decoder("llama")
    with pytest.raises(HalveError, match="the loss is not finite after 1 steps: give a smaller learning_rate"):
        course(student, learning_rate=1e-2, evaluations=1).run(lambda: learner(student, Explosive))
    monkeypatch.setattr(Explosive, "limit", 0.0)
    student = decoder("llama")
    with pytest.raises(HalveError, match="the loss is not finite with any learning rate"):
        course(student, learning_rate="auto").run(lambda: learner(student, Explosive))


def test_a_teacher_has_no_dropout_and_a_broken_learner_is_not_taken_for_a_high_rate():
    teacher, seen = decoder("gpt2"), []
    teacher.train()
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, _given, _out: seen.append(module.training))
    student = decoder("gpt2")
    course(student, teacher, evaluations=1).run(lambda: learner(student, Plain))
    assert seen
    assert not any(seen)

    class Broken(Plain):
        def after_update(self, step, optimiser):
            raise InputError("it is broken")

    with pytest.raises(InputError, match="it is broken"):
        course(student, teacher, learning_rate="auto").run(lambda: learner(student, Broken))


def test_weights_and_moments_are_float32_where_products_are_not():
    student, seen = pruned_decoder().eval(), set()

    class Watched(Plain):
        def optimiser(self, parameters, rate, decay):
            return Learner.optimiser(self, parameters, rate, decay)

        def after_update(self, step, optimiser):
            for parameter, state in optimiser.state.items():
                seen.update({parameter.dtype, parameter.grad.dtype, state["exp_avg"].dtype})

    products = set()
    student.model.layers[0].mlp.up_proj.register_forward_hook(lambda _m, _given, out: products.add(out.dtype))
    teacher = decoder("llama").to(torch.bfloat16)
    done = course(student, teacher, forward_dtype="bfloat16").run(lambda: learner(student, Watched))
    assert seen == {torch.float32}
    assert torch.bfloat16 in products
    assert done.curve[-1].kl < done.curve[0].kl


def test_needs_leave_the_student_as_it_was_and_count_what_is_trained():
    student = pruned_decoder()
    before = [parameter.detach().clone() for parameter in student.parameters()]
    run = course(student, decoder("llama"))
    needs = run.needs(lambda: learner(student), 1000)
    spared = sum(each.numel() for each in (student.get_input_embeddings().weight, student.lm_head.weight))
    trained = sum(each.numel() for each in student.parameters()) - spared
    assert needs.memory["gradients"] == 4 * trained
    assert needs.memory["moments"] == 8 * trained
    assert needs.memory["the student"] == needs.memory["the teacher"] == sum(each.nbytes for each in before)
    assert needs.disk["the checkpoint"] == 1000
    for one, other in zip(student.parameters(), before, strict=True):
        assert torch.equal(one, other)


def test_activations_are_kept_twice_for_twice_the_rows_and_less_with_checkpointing():
    student = pruned_decoder()
    kept = [
        course(student, **options).needs(lambda: learner(student), 0).memory["activations"]
        for options in ({}, {"forward_tokens": 8 * LENGTH}, {"gradient_checkpointing": True})
    ]
    assert kept[1] == 2 * kept[0]
    assert kept[2] < kept[0]


def test_gradient_checkpointing_gives_the_same_weights():
    found = []
    for wanted in (False, True):
        model = pruned_decoder()
        course(model, decoder("llama"), gradient_checkpointing=wanted).run(lambda m=model: learner(m))
        assert not model.is_activation_checkpointing
        found.append(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_moments_are_spread_and_the_last_step_has_both():
    assert Milestones.of(10, 4, None) == Milestones(frozenset({0, 3, 5, 8, 10}), frozenset({3, 5, 8, 10}))
    assert Milestones.of(10, 2, 4).saves == {4, 8, 10}
    assert Milestones.of(2, 10, None).looks == {0, 1, 2}


def test_the_second_gpu_is_refused_with_a_way_out(monkeypatch):
    run = course(decoder("llama"))
    machine = run._training.machine
    monkeypatch.setitem(vars(machine), "target", torch.device("cuda:1"))
    with pytest.raises(InputError, match="set CUDA_VISIBLE_DEVICES=1"):
        run._trainer(learner(run._model, Plain), 1.0, run._rows, run._shape, None, run._milestones, None)
