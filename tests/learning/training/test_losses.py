"""The loss and its gradients against plain autograd in float64, whole logits and no chunks."""

import pytest
import torch

from halve.errors import InputError
from halve.learning.training import losses
from halve.learning.training.losses import Scores, Target, loss_sums

TOKENS, WIDTH, VOCABULARY = 13, 6, 17


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def chunks(monkeypatch):
    """Five tokens a chunk, so that the last one is smaller."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * VOCABULARY)


def scores(kind, seed):
    """Return a student's or a teacher's scores: with a head, a head and a bias, or as logits."""
    if kind == "logits":
        return Scores(2.0 * numbers(TOKENS, VOCABULARY, seed=seed))
    bias = numbers(VOCABULARY, seed=seed + 2) if kind == "bias" else None
    return Scores(numbers(TOKENS, WIDTH, seed=seed), numbers(VOCABULARY, WIDTH, seed=seed + 1), bias)


def reference(student, teacher, labels, target):
    """Return the loss, KL and cross-entropy by probabilities, one token after the other, and what gradients are of."""
    leaves = [
        None if each is None else each.double().requires_grad_()
        for each in (student.states, student.weight, student.bias)
    ]

    def probabilities(states, weight, bias, heat):
        logits = states if weight is None else states @ weight.T + (0.0 if bias is None else bias)
        odds = torch.exp((logits - logits.max()) / heat)
        return odds / odds.sum()

    given = [None if each is None else each.double() for each in (teacher.states, teacher.weight, teacher.bias)]
    loss = kl = ce = torch.zeros((), dtype=torch.float64)
    for place, label in enumerate(labels.tolist()):
        told = {heat: probabilities(leaves[0][place], *leaves[1:], heat) for heat in (1.0, target.temperature)}
        asked = {heat: probabilities(given[0][place], *given[1:], heat) for heat in (1.0, target.temperature)}
        divergence = {heat: (asked[heat] * torch.log(asked[heat] / told[heat])).sum() for heat in told}
        kl, ce = kl + divergence[1.0], ce - torch.log(told[1.0][label])
        share = target.ce_share
        loss = loss + (1 - share) * target.temperature**2 * divergence[target.temperature]
        loss = loss - share * torch.log(told[1.0][label])
    return loss, kl, ce, leaves


@pytest.mark.parametrize("target", [Target(), Target(0.3), Target(1.0), Target(0.0, 2.0), Target(0.4, 0.5)], ids=str)
@pytest.mark.parametrize("kind", ["head", "bias", "logits"])
def test_the_loss_and_its_gradients_are_those_of_autograd(chunks, kind, target):
    student, teacher = scores(kind, 0), scores("head" if kind == "logits" else kind, 50)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(9))
    leaves = [None if each is None else each.clone().requires_grad_() for each in vars(student).values()]
    loss, sums = loss_sums(Scores(*leaves), teacher, labels, target, torch.float32)
    (3.0 * loss).backward()
    wanted, kl, ce, of = reference(student, teacher, labels, target)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert sums.tolist() == pytest.approx([kl.item(), ce.item()], rel=1e-5)  # at temperature 1 whatever is asked
    assert not sums.requires_grad
    for mine, theirs in zip(leaves, of, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine.grad, (3.0 * theirs.grad).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [Target(), Target(0.25, 2.0)], ids=str)
def test_without_a_teacher_it_is_the_cross_entropy_whatever_was_asked(chunks, asked):
    student = scores("bias", 0)
    labels = torch.arange(TOKENS) % VOCABULARY
    states = student.states.clone().requires_grad_()
    loss, sums = loss_sums(Scores(states, student.weight, student.bias), None, labels, asked, torch.float32)
    loss.backward()
    leaf = student.states.double().requires_grad_()
    logits = leaf @ student.weight.double().T + student.bias.double()
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert sums.tolist() == pytest.approx([0.0, wanted.item()], rel=1e-5)
    torch.testing.assert_close(states.grad, leaf.grad.float(), rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_the_states_the_same_one(chunks):
    student, teacher, labels = scores("head", 0), scores("head", 50), torch.zeros(TOKENS, dtype=torch.int64)
    grads = []
    for frozen in (True, False):
        states, weight = student.states.clone().requires_grad_(), student.weight.clone().requires_grad_(not frozen)
        loss_sums(Scores(states, weight), teacher, labels, Target(), torch.float32)[0].backward()
        assert (weight.grad is None) == frozen
        grads.append(states.grad)
    assert torch.equal(*grads)


def test_a_tied_head_adds_its_gradient_to_the_embeddings(chunks):
    table, labels = numbers(VOCABULARY, WIDTH).requires_grad_(), torch.arange(TOKENS) % VOCABULARY
    teacher = scores("head", 50)
    loss_sums(Scores(2.0 * table[labels], table), teacher, labels, Target(0.5), torch.float32)[0].backward()
    leaf = table.detach().double().requires_grad_()
    said = (2.0 * leaf[labels] @ leaf.T).log_softmax(-1)
    asked = (teacher.states.double() @ teacher.weight.double().T).softmax(-1)
    kl = (asked * (asked.log() - said)).sum()
    (0.5 * kl - 0.5 * said[torch.arange(TOKENS), labels].sum()).backward()
    torch.testing.assert_close(table.grad, leaf.grad.float(), rtol=1e-4, atol=1e-5)


def test_equal_models_are_zero_apart():
    student = scores("head", 0)
    states = student.states.clone().requires_grad_()
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    loss, _ = loss_sums(Scores(states, student.weight), student, labels, Target(), torch.float32)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert states.grad.abs().max() < 1e-5


def test_products_are_in_the_dtype_that_is_asked_for_and_sums_in_float32(chunks):
    student, teacher, labels = scores("head", 0), scores("head", 50), torch.zeros(TOKENS, dtype=torch.int64)
    weight = student.weight.clone().requires_grad_()
    loss, sums = loss_sums(Scores(student.states, weight), teacher, labels, Target(0.5), torch.bfloat16)
    loss.backward()
    exact = loss_sums(student, teacher, labels, Target(0.5), torch.float32)[0]
    assert loss.dtype == sums.dtype == weight.grad.dtype == torch.float32
    assert 0.0 < abs(loss.item() / exact.item() - 1.0) < 0.02


def test_no_tokens_are_no_loss():
    student = Scores(torch.zeros(0, WIDTH, requires_grad=True), numbers(VOCABULARY, WIDTH))
    loss, sums = loss_sums(student, student, torch.zeros(0, dtype=torch.int64), Target(), torch.float32)
    loss.backward()
    assert (loss.item(), sums.tolist()) == (0.0, [0.0, 0.0])


def test_other_vocabularies_and_targets_are_refused():
    student = scores("head", 0)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    with pytest.raises(InputError, match="the teacher has 5 logits a token and the student 17"):
        loss_sums(student, Scores(numbers(TOKENS, 5)), labels, Target(), torch.float32)
    for wrong in ({"ce_share": 1.5}, {"ce_share": True}, {"temperature": 0.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Target(**wrong)
