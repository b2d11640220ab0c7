import pytest
import torch

from gradient_oracles import kept, regression
from halve.errors import InputError
from halve.maths.gram import Gradient, Statistics
from halve.maths.pattern import Pattern
from halve.solve.matrix import prune_weight, prune_weights
from halve.solve.methods.gblm import GBLMOptions, solve
from halve.solve.methods.wanda import WandaOptions
from halve.solve.methods.wanda import solve as wanda


def layer(seed=0):
    """A layer in float32, and what the published formula says of it in float64, from the inputs themselves."""
    weight, x, gradients = regression(6, 16, samples=5, tokens=7, seed=seed)
    norms = torch.stack([x[..., j].square().sum((0, 1)) / 5 for j in range(16)]).sqrt()
    aggregated = sum((100.0 * g) ** 2 for g in gradients).sqrt()
    scores = weight.abs() * norms + weight.abs() * aggregated
    flat = x.flatten(0, 1)
    root = sum(g**2 for g in gradients).sqrt()
    return weight.float(), (flat.mT @ flat / 35).float(), Gradient(root.float(), 5), scores


@pytest.mark.parametrize(("pattern", "keep", "group"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("50%", 8, 16)])
def test_keeps_what_the_published_score_keeps(pattern, keep, group):
    for seed in range(5):
        weight, gram, gradient, scores = layer(seed)
        stats = Statistics(gram, 35, gradient=gradient)
        pruned = solve(weight, stats, Pattern(pattern), GBLMOptions()).weight
        expected = kept(scores, keep, group)
        assert torch.equal(pruned != 0, expected)
        assert torch.equal(pruned[expected], weight[expected])
        assert not torch.equal(expected, wanda(weight, stats, Pattern(pattern), WandaOptions()).weight != 0)


def test_without_the_gradient_it_is_wanda():
    weight, gram, gradient, _ = layer()
    stats = Statistics(gram, 35, gradient=gradient)
    pruned = solve(weight, stats, Pattern("2:4"), GBLMOptions(gradient_scale=0.0)).weight
    assert torch.equal(pruned, wanda(weight, stats, Pattern("2:4"), WandaOptions()).weight)


def test_prune_weight_takes_the_gradient_and_knows_the_scale_of_the_inputs():
    weight, gram, gradient, scores = layer()
    outcome = prune_weight(weight, gram, "2:4", "gblm", "none", tokens=35, gradient=gradient)
    assert torch.equal(outcome.weight != 0, kept(scores, 2, 4))
    tall = prune_weight(weight, gram * 1e6, "2:4", "gblm", "none", tokens=35, gradient=gradient)
    assert not torch.equal(tall.weight != 0, outcome.weight != 0)
    huge = Gradient(gradient.root * 2.0**40, 5)  # as large as H's roots beyond the range that is solved in
    scaled = prune_weight(weight, gram * 2.0**80, "2:4", "gblm", "none", tokens=35, gradient=huge)
    assert torch.equal(scaled.weight, outcome.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "method gblm needs the gradient of every matrix"),
        ({"gradient": torch.ones(6, 16)}, "takes its gradient as halve.Gradient, got Tensor"),
        (
            {"gradient": Gradient(torch.ones(6, 15), 5)},
            r"root of the gradient must be floating point of shape \(6, 16\)",
        ),
        ({"gradient": Gradient(-torch.ones(6, 16), 5)}, "root of the gradient has a negative entry"),
        ({"gradient": Gradient(torch.full((6, 16), torch.inf), 5)}, "root of the gradient has NaN or infinity"),
        ({"gradient": Gradient(torch.ones(6, 16), 0)}, "samples of the gradient must be a whole number"),
        (
            {"gradient": Gradient(torch.ones(6, 16), 5, torch.ones(16, 6))},
            "tuned of the gradient must be floating point",
        ),
        ({"gradient": Gradient(torch.ones(6, 16), 5), "tokens": None}, "weighs inputs and gradients by the sample"),
        ({"gradient": Gradient(torch.ones(6, 16), 5), "method": "wanda"}, "method wanda does not weigh gradients"),
        ({"gradient": Gradient(torch.ones(6, 16), 5), "gradient_scale": -1}, "gradient_scale of gblm must be"),
    ],
)
def test_what_cannot_be_weighed_is_refused(arguments, message):
    weight, gram, _, _ = layer()
    asked = {"method": "gblm", "tokens": 35, **arguments}
    with pytest.raises(InputError, match=message):
        prune_weight(weight, gram, "2:4", refit="none", **asked)


def test_gradients_of_matrices_solved_as_one_must_be_of_the_same_samples():
    weight, gram, gradient, scores = layer()
    halves = [weight[:2], weight[2:]]
    gradients = [Gradient(gradient.root[:2], 5), Gradient(gradient.root[2:], 5)]
    outcomes = prune_weights(halves, gram, "2:4", "gblm", "none", tokens=35, gradients=gradients)
    assert torch.equal(torch.cat([outcome.weight for outcome in outcomes]) != 0, kept(scores, 2, 4))
    gradients[1] = Gradient(gradient.root[2:], 4)
    with pytest.raises(InputError, match="must be of the same samples"):
        prune_weights(halves, gram, "2:4", "gblm", "none", tokens=35, gradients=gradients)
