import pytest
import torch

from gradient_oracles import kept, regression
from halve.errors import InputError
from halve.maths.gram import Gradient, Statistics
from halve.maths.pattern import Pattern
from halve.solve.matrix import prune_weight
from halve.solve.methods.wanda_plus_plus import WandaPlusPlusOptions, solve


def layer(seed=0, tuned=None):
    """A layer in float32, and what the published formula says of it in float64, from the inputs themselves."""
    weight, x, gradients = regression(6, 16, samples=5, tokens=7, seed=seed)
    norms = torch.stack([x[..., j].square().sum((0, 1)) / 5 for j in range(16)]).sqrt()
    regional = (sum(g**2 for g in gradients) / 5).sqrt()
    scored = weight if tuned is None else tuned.double()
    scores = (100.0 * regional + norms) * scored.abs()
    flat = x.flatten(0, 1)
    root = sum(g**2 for g in gradients).sqrt()
    return (
        weight.float(),
        Statistics((flat.mT @ flat / 35).float(), 35, gradient=Gradient(root.float(), 5, tuned)),
        scores,
    )


@pytest.mark.parametrize(("pattern", "keep", "group"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("50%", 8, 16)])
def test_keeps_what_the_published_score_keeps(pattern, keep, group):
    for seed in range(5):
        weight, stats, scores = layer(seed)
        pruned = solve(weight, stats, Pattern(pattern), WandaPlusPlusOptions()).weight
        expected = kept(scores, keep, group)
        assert torch.equal(pruned != 0, expected)
        assert torch.equal(pruned[expected], weight[expected])


def test_tuned_weights_are_scored_and_kept_in_the_dtype_of_the_given_ones_and_judged_against_them():
    tuned = 0.05 * torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    weight, stats, scores = layer(tuned=tuned)
    outcome = prune_weight(weight.bfloat16(), stats, "2:4", "wanda++", "none", gradient=stats.gradient)
    expected = kept(scores, 2, 4)
    assert torch.equal(outcome.weight, torch.where(expected, tuned.bfloat16(), 0.0))
    assert outcome.facts["relative_loss"] > 0.5  # they have nothing to do with the dense weights
    near = prune_weight(
        weight, stats, "2:4", "wanda++", "none", gradient=Gradient(stats.gradient.root, 5, weight.clone())
    )
    assert torch.equal(
        near.weight, prune_weight(weight, stats, "2:4", "wanda++", "none", gradient=layer()[1].gradient).weight
    )
    scaled = Gradient(stats.gradient.root, 5, tuned * 2.0**100)  # solved for in float32's middle, and scaled back
    tall = prune_weight(weight * 2.0**100, stats, "2:4", "wanda++", "none", gradient=scaled).weight
    assert torch.equal(tall, torch.where(expected, tuned, 0.0) * 2.0**100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_scale": -1.0}, "gradient_scale of wanda.. must be"),
        ({"rounds": -1}, "rounds of wanda.. must be a whole number of at least 0"),
        ({"round_samples": 0}, "round_samples of wanda.. must be"),
        ({"learning_rate": 0.0}, "learning_rate of wanda.. must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        WandaPlusPlusOptions(**options)
