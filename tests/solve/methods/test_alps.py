import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.methods import sparsegpt
from halve.solve.methods.alps import ALPSOptions, solve
from halve.solve.outcome import Status


def prune(weight, gram, pattern="2:4", **options):
    return solve(weight, Statistics(gram, 10), Pattern(pattern), ALPSOptions(**options))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_is_the_published_algorithm(seed):
    weight, gram = oracle.layer(6, 32, seed=seed)
    expected = oracle.alps(weight, gram)
    outcome = prune(weight, gram)
    assert outcome.status is Status.OK
    assert torch.equal(outcome.weight != 0, expected != 0)
    assert torch.allclose(outcome.weight.double(), expected, atol=1e-3 * float(expected.abs().max()))


def test_better_than_sparsegpt_on_the_same_mask_terms():
    weight, gram = oracle.layer(32, 96, seed=3)
    greedy = sparsegpt.solve(weight, Statistics(gram, 10), Pattern("2:4"), sparsegpt.SparseGPTOptions()).weight
    losses = [
        oracle.relative_loss(oracle.best_on_mask(weight, gram, pruned != 0), weight, gram)
        for pruned in (prune(weight, gram).weight, greedy)
    ]
    assert losses[0] < 0.95 * losses[1]


def test_facts_and_the_limit():
    weight, gram = oracle.layer(8, 32, seed=4)
    outcome = prune(weight, gram, max_iterations=4)
    assert outcome.status is Status.MAX_ITER
    assert "still changed after 4 iterations" in outcome.reason
    assert outcome.facts["iterations"] == 4
    assert outcome.facts["rho"] == pytest.approx(0.13)
    assert ((outcome.weight.view(8, 8, 4) != 0).sum(-1) == 2).all()


def test_a_matrix_in_the_pattern_stays():
    weight, gram = oracle.layer(8, 32, seed=5)
    weight[:, 2::4], weight[:, 3::4] = 0.0, 0.0
    assert torch.allclose(prune(weight, gram).weight, weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("option", "value"), [("rho", 0.0), ("damping", float("nan")), ("max_iterations", 0)])
def test_bad_options_are_refused(option, value):
    with pytest.raises(InputError, match=f"{option} of alps must be"):
        ALPSOptions(**{option: value})
