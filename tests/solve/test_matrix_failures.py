"""What happens where a method, a refit or the objective fails, and who says so."""

from dataclasses import replace

import pytest
import torch

import layer_oracles as oracle
from halve.errors import FactorisationError
from halve.maths import linalg
from halve.maths.gram import Statistics
from halve.solve import methods
from halve.solve import objective as objective_module
from halve.solve import refit as refits
from halve.solve.matrix import prune_weights
from halve.solve.objective import Objective
from halve.solve.outcome import Outcome, Status
from pruned_matrices import METHODS, check_pruned, prune, several, two_streams


@pytest.mark.parametrize("method", [name for name in METHODS if methods.METHODS[name].needs_statistics])
def test_zero_gram_fails_or_falls_back_and_says_so(method):
    weight, gram = oracle.layer(4, 16, seed=9)
    failed = prune(weight, 0 * gram, method)
    assert failed.status is Status.FAILED
    assert torch.equal(failed.weight, weight)
    assert failed.method == method
    assert f"method {method} failed: the Gram matrix is zero" in failed.reason
    fallen = prune(weight, 0 * gram, method, fallback="magnitude")
    assert fallen.status is Status.FELL_BACK
    assert fallen.method == "magnitude"
    assert "used magnitude instead" in fallen.reason
    assert torch.equal(fallen.weight, prune(weight, None, "magnitude", "none").weight)
    both = prune(weight, 0 * gram, method, fallback="wanda")
    assert both.status is Status.FAILED
    assert "fallback wanda failed too" in both.reason
    assert torch.equal(both.weight, weight)


def test_zero_gram_fails_the_refit_of_magnitude_pruning():
    weight, gram = oracle.layer(4, 16, seed=9)
    outcome = prune(weight, 0 * gram, "magnitude", "cg")
    assert outcome.status is Status.FAILED
    assert "refit cg failed: the Gram matrix is zero" in outcome.reason
    assert prune(weight, 0 * gram, "magnitude", "none").status is Status.OK
    fallen = prune(weight, 0 * gram, "magnitude", "cg", fallback="magnitude")
    assert fallen.status is Status.FELL_BACK
    check_pruned(fallen, weight)


@pytest.mark.parametrize("fallback", ["magnitude", "wanda"])
def test_failed_factorisation_fails_or_falls_back(monkeypatch, fallback):
    monkeypatch.setattr(linalg, "_cholesky", lambda matrix: None)
    monkeypatch.setattr(linalg, "_cholesky_by_eigenvalues", lambda matrix, damping: None)
    weight, gram = oracle.layer(4, 16, seed=10)
    failed = prune(weight, gram, "sparsegpt")
    assert failed.status is Status.FAILED
    assert torch.equal(failed.weight, weight)
    assert "method sparsegpt failed" in failed.reason
    fallen = prune(weight, gram, "sparsegpt", fallback=fallback)
    assert fallen.status is Status.FELL_BACK
    assert fallen.method == fallback
    assert f"used {fallback} instead" in fallen.reason
    assert torch.equal(fallen.weight, prune(weight, gram, fallback).weight)
    assert fallen.facts["relative_loss"] < fallen.facts["relative_loss_before_refit"]


def test_a_refit_that_fails_leaves_the_mask_where_a_fallback_is_allowed(monkeypatch):
    def broken(*_arguments, **_options):
        raise FactorisationError("no luck")

    monkeypatch.setitem(refits.REFITS, "swap", replace(refits.REFITS["swap"], solve=broken))
    weight, gram = oracle.layer(4, 16, seed=3)
    failed = prune(weight, gram, refit="swap")
    assert failed.status is Status.FAILED
    assert failed.reason == "refit swap failed: no luck"
    fallen = prune(weight, gram, refit="swap", fallback="magnitude")
    plain = prune(weight, gram, refit="none")
    assert fallen.status is Status.FELL_BACK
    assert fallen.reason == "refit swap failed: no luck; the weights are those of method wanda"
    assert torch.equal(fallen.weight, plain.weight)
    assert fallen.facts["relative_loss"] == plain.facts["relative_loss"]


def test_a_target_that_cannot_be_had_leaves_the_weights_alone(monkeypatch):
    def broken(*_arguments):
        raise FactorisationError("no luck")

    monkeypatch.setattr(objective_module, "dense_target", broken)
    _, _, stats = two_streams()
    weights, _ = several()
    for weight, outcome in zip(weights, prune_weights(weights, stats, objective=Objective(0.0, 1.0)), strict=True):
        assert outcome.status is Status.FAILED
        assert outcome.method == "auto"
        assert "match_dense failed: " in outcome.reason
        assert torch.equal(outcome.weight, weight)


@pytest.mark.parametrize(("bad", "reason"), [(float("nan"), "not finite"), (1.0, "not 2:4")])
def test_a_wrong_result_is_caught(monkeypatch, bad, reason):
    def broken(weight, stats, pattern, options):
        return Outcome(torch.full_like(weight, bad), Status.OK, "wanda")

    row = replace(methods.METHODS["wanda"], solve=broken)
    monkeypatch.setitem(methods.METHODS, "wanda", row)
    weight, gram = oracle.layer(4, 16, seed=11)
    outcome = prune(weight, gram, refit="none")
    assert outcome.status is Status.FAILED
    assert reason in outcome.reason
    assert torch.equal(outcome.weight, weight)


@pytest.mark.parametrize("method", ["auto", "alps"])
def test_failure_leaves_each_matrix_its_own_weights(method):
    weights, stats = several()
    dead = Statistics(0 * stats.gram, 77)
    for weight, outcome in zip(weights, prune_weights(weights, dead, "2:4", method), strict=True):
        assert outcome.status is Status.FAILED
        assert torch.equal(outcome.weight, weight)
        assert "the Gram matrix is zero" in outcome.reason
    for weight, outcome in zip(weights, prune_weights(weights, dead, "2:4", method, fallback="magnitude"), strict=True):
        assert outcome.status is Status.FELL_BACK
        assert torch.equal(outcome.weight, prune(weight, None, "magnitude", "none").weight)


def test_a_wrong_result_of_one_matrix_is_not_held_against_the_others(monkeypatch):
    def broken(weight, stats, pattern, options):
        pruned = methods.METHODS["magnitude"].solve(weight, stats, pattern, None).weight
        pruned[8] = 1.0  # the first row of the second matrix
        return Outcome(pruned, Status.OK, "sparsegpt")

    monkeypatch.setitem(methods.METHODS, "sparsegpt", replace(methods.METHODS["sparsegpt"], solve=broken))
    weights, stats = several()
    outcomes = prune_weights(weights, stats, "2:4", "sparsegpt", "none")
    assert [outcome.status for outcome in outcomes] == [Status.OK, Status.FAILED, Status.OK]
    assert "not 2:4" in outcomes[1].reason
    assert torch.equal(outcomes[1].weight, weights[1])
