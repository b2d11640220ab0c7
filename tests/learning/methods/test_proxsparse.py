"""ProxSparse against AdamW by hand, the operator by brute force, and what its controller promises."""

import pytest
import torch

import oracles
from halve.learning.learner import Step
from halve.learning.methods.proxsparse import ProxSparse, ProxSparseOptions
from halve.maths.pattern import Pattern
from learned import Mixed, attached, batches, bits, kept_by_hand, targets, train


def learner_of(model, pattern="2:4", **options):
    return ProxSparse(targets(model), Pattern(pattern), ProxSparseOptions(**options))


def test_a_step_is_adamw_and_then_the_operator_with_lambda_not_times_the_rate():
    model, plain = Mixed(torch.float64), Mixed(torch.float64)
    learner = learner_of(model, lam=0.8)
    optimiser = attached(learner, model, 0.01, decay=0.1)
    tokens = batches(1)[0]
    loss = plain(tokens).square().sum()
    names = [each.name for each in targets(plain)]
    gradients = dict(zip(names, torch.autograd.grad(loss, [plain.get_parameter(n) for n in names]), strict=True))
    learner.begin_step(Step(0, 4))
    optimiser.zero_grad()
    model(tokens).square().sum().backward()
    learner.before_update(Step(0, 4))
    optimiser.step()
    learner.after_update(Step(0, 4), optimiser)
    changed = 0
    for target in targets(model):
        weight, gradient = plain.get_parameter(target.name).detach(), gradients[target.name]
        moved = weight * (1 - 0.01 * 0.1) - 0.01 * gradient / (gradient.abs() + 1e-8)  # the first step of AdamW
        groups = target.inputs_last(moved).reshape(-1, 4)
        lam = torch.full((len(groups),), 0.8, dtype=torch.float64)
        found = target.inputs_last(target.tensor.detach()).reshape(-1, 4)
        best, _ = oracles.brute_force_prox(groups.abs(), lam, 2, levels=7)
        ours = oracles.prox_objective(found, groups, 0.8, 2)
        assert bool((ours <= oracles.prox_objective(best, groups.abs(), 0.8, 2) + 1e-9).all())
        changed += int((found != groups).sum())
    assert changed > 100


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("total", [12, 40, 120])
def test_the_share_of_groups_reaches_one_at_the_end_and_not_at_once(pattern, total):
    model = Mixed()
    learner = learner_of(model, pattern)
    shares = []
    train(model, learner, attached(learner, model), total, watch=lambda _: shares.append(learner.facts()["share"]))
    assert shares[-1] == 1.0
    assert shares[total // 4] < 0.8
    assert total < 40 or shares[total // 2] > 0.1


def test_a_given_lambda_stays():
    model = Mixed()
    learner = learner_of(model, lam=0.25)
    train(model, learner, attached(learner, model), 5)
    assert learner.facts()["lambda"] == 0.25


def test_the_mask_goes_onto_the_original_weights_as_published():
    model, dense = Mixed(), Mixed()
    learner = learner_of(model)
    train(model, learner, attached(learner, model), 6)
    trained = {each.name: each.inputs_last(each.tensor.detach().clone()) for each in targets(model)}
    learner.finish()
    for target, other in zip(targets(model), targets(dense), strict=True):
        matrix = trained[target.name].flatten(0, -2)
        mask = kept_by_hand(matrix.abs(), 2, 4).reshape(trained[target.name].shape)
        original = target.inputs_last(other.tensor)
        assert torch.equal(target.inputs_last(target.tensor), torch.where(mask, original, 0.0))
        assert not torch.equal(matrix, original.flatten(0, -2))
    for name, each in bits(model).items():
        if name not in trained:  # norms and biases were not trained: nothing would tell of it
            assert torch.equal(each, bits(dense)[name]), name


def test_the_trained_weights_are_kept_on_request():
    model, dense = Mixed(), Mixed()
    learner = learner_of(model, keep="trained")
    train(model, learner, attached(learner, model), 6)
    trained = {each.name: each.tensor.detach().clone() for each in targets(model)}
    learner.finish()
    for target in targets(model):
        kept = target.tensor != 0
        assert torch.equal(target.tensor[kept], trained[target.name][kept])
    assert not torch.equal(model.norm.weight, dense.norm.weight)
