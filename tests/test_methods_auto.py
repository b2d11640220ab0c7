import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError
from halve.gram import Statistics
from halve.matrix import prune_weight
from halve.methods import METHODS
from halve.methods.auto import EFFORTS, AutoOptions, solve
from halve.pattern import Pattern


def prune(weight, gram, pattern="2:4", **options):
    return solve(weight, Statistics(gram, 10), Pattern(pattern), AutoOptions(**options))


@pytest.mark.parametrize(
    ("pattern", "method"), [("2:4", "prox-admm"), ("1:4", "prox-admm"), ("4:8", "alps"), ("50%", "alps")]
)
@pytest.mark.parametrize("effort", EFFORTS)
def test_the_method_follows_the_pattern(pattern, method, effort):
    weight, gram = oracle.layer(6, 32, seed=0)
    outcome = prune(weight, gram, pattern, effort=effort)
    assert outcome.method == method
    assert Pattern(pattern).satisfied_by(outcome.weight)
    assert ("swaps" in outcome.facts) == (effort == "best" and pattern != "50%")


def test_more_effort_is_better_and_best_beats_every_method():
    weight, gram = oracle.layer(48, 128, seed=1)
    losses = [
        prune_weight(weight, gram, effort=effort, refit_tolerance=1e-7).facts["relative_loss"] for effort in EFFORTS
    ]
    assert losses[0] > losses[1] > losses[2]
    for name in METHODS:
        other = prune_weight(weight, gram, method=name, refit_tolerance=1e-7).facts["relative_loss"]
        assert losses[2] <= other * (1 + 1e-6), name
        if name in {"magnitude", "wanda", "ria", "sparse-swaps", "sparsegpt"}:
            assert losses[0] < other, name


def test_is_what_prune_weight_does_by_default():
    weight, gram = oracle.layer(8, 32, seed=2)
    assert torch.equal(prune_weight(weight, gram).weight, prune_weight(weight, gram, method="prox-admm").weight)


def test_an_unknown_effort_is_refused():
    with pytest.raises(InputError, match="effort must be one of fast, balanced, best, got 'great'"):
        AutoOptions(effort="great")
