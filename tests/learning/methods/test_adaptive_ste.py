"""AST against a loop of its own: masks entry by entry, gradients at the masked weights, AdamW by its formula."""

import pytest
import torch

from halve.learning.learner import Step
from halve.learning.methods.adaptive_ste import AST, ASTOptions
from halve.maths.pattern import Pattern
from learned import Mixed, attached, batches, diagonals, kept_by_hand, rate_at, targets, train


def reference(total, every, decay, ramp, moments, rate):
    """Train a model as the method says, without any of its code; return the weights under their last masks."""
    model, teacher, data = Mixed(torch.float64), Mixed(torch.float64, seed=7), batches(total)
    trained = {each.name: each.tensor for each in targets(model)}
    trained |= {name: each for name, each in model.named_parameters() if each.ndim <= 1}
    lies = {each.name: each.inputs_last for each in targets(model)}
    first = {name: torch.zeros_like(each) for name, each in trained.items()}
    second = {name: torch.zeros_like(each) for name, each in trained.items()}
    masks = {}
    for number in range(total):
        if number % every == 0:
            for name, turned in lies.items():
                scores = turned(trained[name].detach()).abs()
                scores = scores * moments[name].double().sqrt() if name in moments else scores
                masks[name] = turned(kept_by_hand(scores.flatten(0, -2), 2, 4).reshape(scores.shape)).double()
        leaves = {name: (each.detach() * masks.get(name, 1.0)).requires_grad_() for name, each in trained.items()}
        wanted = teacher(data[number]).detach()
        loss = (torch.func.functional_call(model, leaves, (data[number],)) - wanted).square().mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        strength = decay * min(1.0, number / total / ramp)
        step_rate = rate_at(Step(number, total), rate)
        with torch.no_grad():
            for name, weight in trained.items():
                gradient = gradients[name]
                if name in masks:
                    gradient = gradient + strength * weight * (1.0 - masks[name])
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.95 * second[name] + 0.05 * gradient**2
                root = (second[name] / (1 - 0.95 ** (number + 1))).sqrt() + 1e-8
                weight.sub_(step_rate * first[name] / (1 - 0.9 ** (number + 1)) / root)
    return {name: each.detach() * masks.get(name, 1.0) for name, each in trained.items()}


@pytest.mark.parametrize("metric", ["inputs", "magnitude"])
def test_it_trains_as_a_loop_by_hand_does(metric):
    model = Mixed(torch.float64)
    moments = diagonals(model)
    learner = AST(
        targets(model), Pattern("2:4"), ASTOptions(every=4, decay=0.02, ramp=0.4, metric=metric), diagonals=moments
    )
    train(model, learner, attached(learner, model, 0.02), 12, rate=0.02)
    assert learner.facts()["changed"] > 0
    learner.finish()
    expected = reference(12, 4, 0.02, 0.4, moments if metric == "inputs" else {}, 0.02)
    for name, weight in expected.items():
        assert torch.allclose(model.get_parameter(name), weight, rtol=1e-6, atol=1e-9), name


def test_what_is_pruned_decays_and_what_is_kept_does_not():
    """Where ``~`` inverts a mask of whole numbers, kept weights decay, and pruned ones grow."""
    model = Mixed()
    learner = AST(targets(model), Pattern("2:4"), ASTOptions(decay=0.1, ramp=0.25))
    learner.attach(model)
    learner.begin_step(Step(0, 8))
    for number, strength in ((0, 0.0), (1, 0.05), (2, 0.1), (7, 0.1)):
        for name, target in learner.targets.items():
            weight = target.owner.parametrizations[target.leaf].original
            weight.grad = torch.zeros_like(weight)
            learner.before_update(Step(number, 8))
            mask = learner.choose()[name]
            assert not bool(weight.grad[mask].any())
            assert torch.allclose(weight.grad[~mask], strength * weight[~mask])
            weight.grad = None


def test_pruned_weights_get_the_gradient_of_the_product():
    model = Mixed(torch.float64)
    learner = AST(targets(model), Pattern("2:4"), ASTOptions(metric="magnitude"))
    learner.attach(model)
    learner.begin_step(Step(0, 4))
    model(batches(1)[0]).square().sum().backward()
    for target in targets(model):
        weight = target.owner.parametrizations[target.leaf].original
        pruned = ~learner.choose()[target.name]
        assert float((weight.grad[pruned] != 0).double().mean()) > 0.5
