"""What the objective makes of a matrix: targets from the dense model, a shrunk Gram matrix."""

from dataclasses import replace

import pytest
import torch

import layer_oracles as oracle
from halve.maths.gram import GramAccumulator
from halve.solve.dense_target import dense_target
from halve.solve.matrix import prune_weights
from halve.solve.objective import Objective
from halve.solve.outcome import Status
from halve.solve.shrinkage import shrink
from pruned_matrices import check_pruned, prune, several, two_streams


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "auto"])
def test_matching_the_dense_model_brings_outputs_closer_to_it(method):
    x, noisy, stats = two_streams()
    weight, _ = oracle.layer(12, 32, seed=16)
    matched = Objective(shrinkage=0.0, match_dense=1.0, match_ridge=1e-3)
    errors = []
    for objective in (Objective(shrinkage=0.0), replace(matched, match_dense=0.5), matched):
        outcome = prune(weight, stats, method, objective=objective)
        assert outcome.status is Status.OK
        check_pruned(outcome, weight)
        errors.append(float((noisy @ outcome.weight.double().mT - x @ weight.double().mT).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_the_loss_that_is_reported_is_against_the_target_on_the_given_gram():
    _, _, stats = two_streams()
    weights = [weight * 0.1 for weight in several()[0]]
    objective = Objective(shrinkage=0.3, match_dense=1.0)
    for weight, outcome in zip(weights, prune_weights(weights, stats, "2:4", objective=objective), strict=True):
        target = dense_target(weight, stats, 1.0, 0.1)
        true = oracle.relative_loss(outcome.weight, target, stats.gram)
        assert outcome.facts["relative_loss"] == pytest.approx(true, rel=1e-3)
        assert outcome.facts["shrinkage"] == 0.3
    plain = prune(weights[0], stats, objective=Objective(match_dense=1.0))
    assert "shrinkage" not in plain.facts


def test_a_shrunk_gram_is_what_method_and_refit_see():
    _, _, stats = two_streams()
    weight, _ = oracle.layer(12, 32, seed=17)
    for method in ("auto", "sparsegpt"):
        got = prune(weight, stats, method, objective=Objective(0.2, 0.0))
        expected = prune(weight, shrink(stats.gram, 0.2), method)
        assert torch.equal(got.weight, expected.weight)
        assert got.facts["relative_loss"] != expected.facts["relative_loss"]
    diagonal = prune(weight, stats, "auto", objective=Objective(1.0, 0.0))
    torch.testing.assert_close(diagonal.weight, prune(weight, stats, "wanda", "none").weight, rtol=2e-3, atol=0.0)


def test_only_auto_chooses_its_shrinkage_unasked():
    x = oracle.correlated_inputs(40, 32, seed=18).float()
    accumulator = GramAccumulator(32, halves=True)
    accumulator.add(x)
    stats, weight = accumulator.finish(), oracle.layer(12, 32, seed=18)[0]
    assert prune(weight, stats, "auto").facts["shrinkage"] > 0.0
    for method in ("prox-admm", "wanda"):
        assert "shrinkage" not in prune(weight, stats, method).facts
        assert prune(weight, stats, method, objective=Objective("auto")).facts["shrinkage"] > 0.0
    assert "shrinkage" not in prune(weight, replace(stats, halves=None), "auto").facts
