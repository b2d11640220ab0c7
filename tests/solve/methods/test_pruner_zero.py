import pytest
import torch

from gradient_oracles import kept, regression
from halve.maths.gram import Gradient, Statistics
from halve.maths.pattern import Pattern
from halve.solve.matrix import prune_weights
from halve.solve.methods.pruner_zero import PrunerZeroOptions, solve


def layer(seed=0):
    """A layer in float32, and the published score of it in float64, one weight at a time."""
    weight, x, gradients = regression(6, 16, samples=5, tokens=7, seed=seed)
    aggregated = sum((100.0 * g) ** 2 for g in gradients).sqrt()
    least, most = min(aggregated.flatten().tolist()), max(aggregated.flatten().tolist())
    scores = torch.tensor(
        [
            [abs(w) * abs(w) * (g - least) / (most - least) for w, g in zip(*rows, strict=True)]
            for rows in zip(weight.tolist(), aggregated.tolist(), strict=True)
        ]
    )
    flat = x.flatten(0, 1)
    return weight.float(), (flat.mT @ flat / 35).float(), Gradient((aggregated / 100.0).float(), 5), scores


@pytest.mark.parametrize(("pattern", "keep", "group"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("50%", 8, 16)])
def test_keeps_what_the_published_score_keeps(pattern, keep, group):
    for seed in range(5):
        weight, gram, gradient, scores = layer(seed)
        stats = Statistics(gram, 35, gradient=gradient)
        pruned = solve(weight, stats, Pattern(pattern), PrunerZeroOptions()).weight
        expected = kept(scores, keep, group)
        assert torch.equal(pruned != 0, expected)
        assert torch.equal(pruned[expected], weight[expected])
        assert not torch.equal(expected, kept(weight.abs(), keep, group))


def test_the_extremes_are_those_of_the_whole_matrix_and_of_no_other():
    """An offset of the gradients changes nothing, if it is the same everywhere in the matrix, whatever another has."""
    weight, gram, gradient, scores = layer()
    other = Gradient(gradient.root * 3.0 + 8.0, 5)
    outcomes = prune_weights(
        [weight, weight], gram, "2:4", "pruner-zero", "none", tokens=35, gradients=[gradient, other]
    )
    assert [torch.equal(outcome.weight != 0, kept(scores, 2, 4)) for outcome in outcomes] == [True, True]
    tilted = Gradient(gradient.root + torch.arange(6.0)[:, None], 5)
    changed = solve(weight, Statistics(gram, 35, gradient=tilted), Pattern("2:4"), PrunerZeroOptions()).weight
    assert not torch.equal(changed != 0, kept(scores, 2, 4))


def test_gradients_that_are_all_alike_leave_magnitude():
    weight, gram, _, _ = layer()
    stats = Statistics(gram, 35, gradient=Gradient(torch.full((6, 16), 0.3), 5))
    pruned = solve(weight, stats, Pattern("2:4"), PrunerZeroOptions()).weight
    assert torch.equal(pruned, Pattern("2:4").project(weight))
