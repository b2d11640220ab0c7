"""MaskLLM against loops over groups, plain autograd, and a problem whose best mask is known."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from halve.errors import PatternError
from halve.learning.learner import Step
from halve.learning.methods.maskllm import MaskLLM, MaskLLMOptions, all_masks
from halve.maths.pattern import Pattern
from learned import Mixed, attached, targets, train


def logits_of(model):
    return {each.name: each.owner.parametrizations[each.leaf][0].logits for each in targets(model)}


def attach(model, pattern="2:4", prior=None, **options):
    learner = MaskLLM(targets(model), Pattern(pattern), MaskLLMOptions(**options), prior=prior)
    learner.attach(model)
    return learner


def gumbels(mixture):
    """The noise of a step by the inverse of its distribution function, from the waiting times of the same seed."""
    generator = torch.Generator().manual_seed(mixture.seed)
    waits = torch.empty(mixture.logits.shape, dtype=mixture.logits.dtype).exponential_(generator=generator)
    return -torch.log(waits)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "1:2", "1:32"])
def test_every_mask_of_a_group_once(pattern):
    parsed = Pattern(pattern)
    masks = all_masks(parsed)
    assert len({tuple(each) for each in masks.tolist()}) == math.comb(parsed.group, parsed.keep) == len(masks)
    assert bool((masks.sum(1) == parsed.keep).all())


@pytest.mark.parametrize(("pattern", "count"), [("4:9", 126), ("8:16", 12870)])
def test_patterns_with_too_many_masks_are_refused(pattern, count):
    with pytest.raises(PatternError, match=f"has {count} masks"):
        all_masks(Pattern(pattern))


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_the_model_multiplies_with_the_mixture_of_the_step(pattern):
    model = Mixed(torch.float64)
    learner = attach(model, pattern)
    size, keep = Pattern(pattern).group, Pattern(pattern).keep
    for number in (0, 3, 9):
        learner.begin_step(Step(number, 10))
        scale, temperature = 100 + 400 * number / 10, 4 - 3.95 * number / 10
        for target in targets(model):
            mixture = target.owner.parametrizations[target.leaf][0]
            weight = target.inputs_last(target.owner.parametrizations[target.leaf].original)
            flat, noise, logits = weight.reshape(-1).tolist(), gumbels(mixture).tolist(), mixture.logits.tolist()
            expected = []
            for group in range(len(flat) // size):
                exponents = [(scale * p + g) / temperature for p, g in zip(logits[group], noise[group], strict=True)]
                powers = [math.exp(each - max(exponents)) for each in exponents]
                mask = [0.0] * size
                for power, kept in zip(powers, combinations(range(size), keep), strict=True):
                    for entry in kept:
                        mask[entry] += power / sum(powers)
                expected += [w * m for w, m in zip(flat[group * size : (group + 1) * size], mask, strict=True)]
            found = target.inputs_last(target.tensor).detach().reshape(-1)
            assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_gradients_of_logits_are_those_of_autograd_through_the_formula():
    """Loss and reward together: the reward grows with what the mask retains, so its sign is minus in the loss."""
    model = Mixed(torch.float64)
    learner = attach(model, keep_large=0.3)
    learner.begin_step(Step(2, 8))
    tokens = torch.arange(8)[None]
    (model(tokens).square().mean() + learner.penalty()).backward()
    found = {name: logits.grad.clone() for name, logits in logits_of(model).items()}

    plain, leaves = Mixed(torch.float64), {}
    effective, reward = {}, 0.0
    masks = torch.tensor([[float(e in kept) for e in range(4)] for kept in combinations(range(4), 2)]).double()
    for target in targets(model):
        mixture = target.owner.parametrizations[target.leaf][0]
        leaves[target.name] = mixture.logits.detach().clone().requires_grad_()
        exponents = (leaves[target.name] * 200 + gumbels(mixture)) / (4 - 3.95 * 0.25)
        weight = target.inputs_last(target.owner.parametrizations[target.leaf].original.detach())
        product = weight * (exponents.softmax(1) @ masks).reshape(weight.shape)
        effective[target.name] = target.inputs_last(product)
        reward = reward + product.square().sum()
    loss = torch.func.functional_call(plain, effective, (tokens,)).square().mean() - 0.3 * 0.75 * reward
    assert float(reward.detach()) > 0
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-14), name


def test_a_prior_raises_the_logits_of_masks_like_its_own():
    model, plain = Mixed(torch.float64), Mixed(torch.float64)
    prior = {each.name: each.inputs_last(Pattern("2:4").project(each.inputs_last(each.tensor.detach())))
             for each in targets(model)}  # fmt: skip
    with torch.no_grad():
        prior["first.weight"][0, :4] = torch.tensor([0.0, 0.0, 3.0, 0.0])  # fewer than N are no less a prior
    attach(model, prior=prior, prior_strength=3.0, init_std=0.01)
    attach(plain)
    for target in targets(plain):
        kept = target.inputs_last(prior[target.name]).reshape(-1, 4).tolist()
        lifted = (logits_of(model)[target.name] - logits_of(plain)[target.name]).tolist()
        for group, values in enumerate(kept):
            likes = [sum(values[e] != 0 for e in mask) for mask in combinations(range(4), 2)]
            expected = [0.03 * (like - sum(likes) / 6) for like in likes]
            assert lifted[group] == pytest.approx(expected, abs=1e-12)
            if sum(value != 0 for value in values) == 2:
                assert sum(likes) / 6 == 1


def test_noise_differs_by_step_and_target_and_repeats_with_the_seed():
    def seeds(seed, steps=2):
        model = Mixed()
        learner = attach(model, seed=seed)
        found = []
        for number in range(steps):
            learner.begin_step(Step(number, 5))
            found.append([each.owner.parametrizations[each.leaf][0].seed for each in targets(model)])
        return found

    assert seeds(0) == seeds(0) != seeds(1)
    assert len({each for step in seeds(0) for each in step}) == 6


def test_weights_stay_as_they_were_and_the_kept_ones_keep_their_bits():
    model, dense = Mixed(), Mixed()
    learner = MaskLLM(targets(model), Pattern("2:4"), MaskLLMOptions())
    optimiser = attached(learner, model)
    train(model, learner, optimiser, 3)
    best = {name: logits.detach().clone() for name, logits in logits_of(model).items()}
    learner.finish()
    for target, other in zip(targets(model), targets(dense), strict=True):
        found = target.inputs_last(target.tensor).reshape(-1, 4)
        original = target.inputs_last(other.tensor).reshape(-1, 4).tolist()
        for group, logits in enumerate(best[target.name].tolist()):
            kept = list(combinations(range(4), 2))[logits.index(max(logits))]
            expected = [v if e in kept else 0.0 for e, v in enumerate(original[group])]
            assert found[group].tolist() == expected


def test_rates_that_cannot_change_a_mask_are_doubted():
    model = Mixed()
    learner = MaskLLM(targets(model), Pattern("2:4"), MaskLLMOptions())
    assert "by 0.004 in 4 steps" in learner.doubts([5e-4] * 4)
    assert "about 0.01 apart" in learner.doubts([5e-4] * 4)
    assert learner.doubts([5e-4] * 11) is None
    prior = {each.name: torch.zeros_like(each.tensor) for each in targets(model)}
    learner = MaskLLM(targets(model), Pattern("2:4"), MaskLLMOptions(), prior=prior)
    assert "about 0.03 apart" in learner.doubts([5e-4] * 11)
    assert learner.doubts([5e-4] * 31) is None


def test_memory_is_one_and_a_half_floats_a_weight_and_nothing_is_kept_for_the_gradient_but_the_product():
    model = nn.Sequential(nn.Linear(256, 128, bias=False))
    names = {"0.weight": "out_in"}
    learner = MaskLLM(targets(model, names), Pattern("2:4"), MaskLLMOptions())
    (logits,) = learner.attach(model)
    weights = 256 * 128
    assert logits.numel() / weights == 1.5
    learner.begin_step(Step(0, 4))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 256)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).sum() + learner.penalty()
    known = [logits, x, model[0].parametrizations.weight.original]
    extra = sum(kept.values()) - sum(kept.get(each.untyped_storage().data_ptr(), 0) for each in known)
    assert extra <= 4 * weights + 4096  # W ⊙ M, which the product itself needs; C(4, 2) masks are the rest
    loss.backward()
    optimiser = learner.optimiser([logits], 5e-4, 0.1)
    optimiser.step()
    moments = [each for each in optimiser.state[logits].values() if each.numel() > 1]
    assert sum(each.numel() for each in moments) / weights == 3.0


def test_it_finds_the_mask_of_a_sparse_teacher():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 8, bias=False))
    student = nn.Sequential(nn.Linear(16, 8, bias=False))
    with torch.no_grad():
        student[0].weight.copy_(torch.randn(8, 16))
        mask = Pattern("2:4").keep_mask(torch.rand(8, 16))  # nothing to do with the magnitudes
        teacher[0].weight.copy_(student[0].weight * mask)
    learner = MaskLLM(targets(student, {"0.weight": "out_in"}), Pattern("2:4"), MaskLLMOptions())
    optimiser = attached(learner, student, 5e-2)
    generator = torch.Generator().manual_seed(3)
    total = 200
    for number in range(total):
        learner.begin_step(Step(number, total))
        x = torch.randn(64, 16, generator=generator)
        loss = (student(x) - teacher(x).detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert learner.facts()["certainty"] > 0.99
    learner.finish()
    assert bool((learner.masks()["0.weight"] == mask).float().mean() > 0.97)
    assert not parametrize.is_parametrized(student[0])
