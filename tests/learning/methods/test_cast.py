"""CAST against a loop of its own, and what it says before it starts."""

import pytest
import torch

from halve.learning.learner import Step
from halve.learning.methods.cast import Cast, CASTOptions
from halve.maths.pattern import Pattern
from learned import Mixed, attached, batches, kept_by_hand, rate_at, targets, train


def learner_of(model, **options):
    return Cast(targets(model), Pattern("2:4"), CASTOptions(**options))


def spread(scales, length):
    """Repeat two scales a row over the halves of rows of ``length``, or one over all of it."""
    half = length // 4 // 2 * 4
    columns = [0 if column < half or scales.shape[-1] == 1 else 1 for column in range(length)]
    return scales[..., columns]


def reference(total, every, lam, rate):
    model, teacher, data = Mixed(torch.float64), Mixed(torch.float64, seed=7), batches(total)
    lies = {each.name: each.inputs_last for each in targets(model)}
    trained = {each.name: each.tensor for each in targets(model)}
    trained |= {name: each for name, each in model.named_parameters() if each.ndim <= 1}
    for name, turned in lies.items():
        matrix = turned(trained[name])
        trained[f"scale {name}"] = torch.ones(*matrix.shape[:-1], 2, dtype=torch.float64)
    first = {name: torch.zeros_like(each) for name, each in trained.items()}
    second = {name: torch.zeros_like(each) for name, each in trained.items()}
    masks = {}
    for number in range(total):
        if number % every == 0:
            for name, turned in lies.items():
                scores = turned(trained[name].detach()).abs()
                masks[name] = turned(kept_by_hand(scores.flatten(0, -2), 2, 4).reshape(scores.shape))
        leaves = {name: each.detach().clone().requires_grad_() for name, each in trained.items()}
        used = {name: each for name, each in leaves.items() if not name.startswith("scale")}
        for name, turned in lies.items():
            matrix = turned(leaves[name])
            used[name] = turned(matrix * spread(leaves[f"scale {name}"], matrix.shape[-1]))
        wanted = teacher(data[number]).detach()
        loss = (torch.func.functional_call(model, used, (data[number],)) - wanted).square().mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        alpha = number / total
        with torch.no_grad():
            for name, weight in trained.items():
                first[name] = 0.9 * first[name] + 0.1 * gradients[name]
                if name in masks:
                    mu = first[name].clone()
                    pruned = torch.logical_not(masks[name])
                    mu[pruned] = (1 - alpha) * mu[pruned] + alpha * lam * weight[pruned].sign()
                    squared = mu
                else:
                    mu, squared = first[name] / (1 - 0.9 ** (number + 1)), gradients[name]
                second[name] = 0.95 * second[name] + 0.05 * squared**2
                root = (second[name] / (1 - 0.95 ** (number + 1))).sqrt() + 1e-8
                weight.sub_(rate_at(Step(number, total), rate) * mu / root)
    for name, turned in lies.items():
        matrix = turned(trained[name])
        folded = turned(matrix * spread(trained.pop(f"scale {name}"), matrix.shape[-1]))
        trained[name] = folded * masks[name]
    return {name: each.detach() for name, each in trained.items()}


def test_it_trains_as_a_loop_by_hand_does_and_folds_the_scales():
    model = Mixed(torch.float64)
    learner = learner_of(model, every=4, lam=1e-3)
    train(model, learner, attached(learner, model, 0.02, 0.1), 12, rate=0.02)
    scales = model.first.parametrizations.weight[0].scales
    assert float((scales.detach() - 1).abs().max()) > 0.01
    learner.finish()
    for name, weight in reference(12, 4, 1e-3, 0.02).items():
        assert torch.allclose(model.get_parameter(name), weight, rtol=1e-6, atol=1e-9), name


def test_what_is_pruned_arrives_at_zero_where_the_rates_reach_that_far():
    model = Mixed()
    learner = learner_of(model, lam=1e-2)  # of the size of the gradients, which is that of the loss here
    total, rate = 200, 0.01
    assert learner.doubts([rate_at(Step(number, total), rate) for number in range(total)]) is None
    optimiser = attached(learner, model, rate)
    left = []
    train(model, learner, optimiser, total, rate=rate, watch=lambda _: left.append(learner.facts()["left"]))
    assert left[0] > 0.2
    assert left[-1] < 0.02


def test_rates_that_do_not_reach_are_doubted_before_anything_is_trained():
    model = Mixed()
    learner = learner_of(model)
    said = learner.doubts([1e-4] * 10)
    assert "by 0.00045 at most in 10 steps" in said
    assert "larger in 3 of 3 matrices (0.2" in said
    assert "in experts)" in said


def test_the_optimiser_goes_on_from_what_it_saved():
    model = Mixed()
    learner = learner_of(model)
    optimiser = attached(learner, model)
    train(model, learner, optimiser, 3)
    again = learner.optimiser([each for each in model.parameters() if each.requires_grad], 0.5, 0.0)
    again.load_state_dict(optimiser.state_dict())
    for one, other in zip(optimiser.state.values(), again.state.values(), strict=True):
        assert one.keys() == other.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert again.param_groups[0]["lr"] == optimiser.param_groups[0]["lr"]


@pytest.mark.parametrize("pattern", ["2:4", "1:16"])
def test_halves_part_at_the_border_of_a_group(pattern):
    model = Mixed()
    learner = Cast(targets(model), Pattern(pattern), CASTOptions())
    learner.attach(model)
    for target in targets(model):
        scales = target.owner.parametrizations[target.leaf][0].scales
        with torch.no_grad():
            scales.copy_(torch.arange(1.0, scales.numel() + 1).reshape(scales.shape))
            stored = target.inputs_last(target.owner.parametrizations[target.leaf].original)
            ratio = Pattern(pattern).groups(target.inputs_last(target.tensor) / stored)
        assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4)
