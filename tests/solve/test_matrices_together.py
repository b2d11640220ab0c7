"""Matrices with the same inputs, solved as one where that changes nothing."""

from dataclasses import replace

import pytest
import torch

import layer_oracles as oracle
from halve.maths.pattern import Pattern
from halve.solve import methods
from halve.solve.matrix import prune_weight, prune_weights
from halve.solve.outcome import Status
from pruned_matrices import FAST, METHODS, check_pruned, prune, same_up_to_rounding, several, with_gradient

REFITS = ("none", "cg", "gd", "swap")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_several_matrices_get_what_each_alone_would_get(method, dtype):
    weights, stats = several(dtype=dtype)
    for pattern in ("2:4", "4:8") if method == "auto" else ("2:4",):
        options = FAST.get(method, {})
        together = prune_weights(weights, stats, pattern, method, **options, **with_gradient(method, weights, stats))
        assert len(together) == 3
        for weight, outcome in zip(weights, together, strict=True):
            alone = prune(weight, stats, method, pattern=pattern)
            check_pruned(outcome, weight, *map(int, pattern.split(":")))
            assert outcome.weight.is_contiguous()
            if methods.METHODS[method].independent_rows(Pattern(pattern)):
                assert same_up_to_rounding(outcome.weight, alone.weight)
            else:
                assert torch.equal(outcome.weight, alone.weight)
            assert (outcome.status, outcome.method, outcome.reason) == (Status.OK, alone.method, "")
            true = oracle.relative_loss(outcome.weight, weight, stats.gram)
            assert outcome.facts["relative_loss"] == pytest.approx(true, rel=1e-4)
            # A refit's rows may stop a step earlier or later in company, which costs less than 0.1 % of the loss.
            for fact in ("relative_loss", "relative_loss_before_refit"):
                assert outcome.facts[fact] == pytest.approx(alone.facts[fact], rel=1e-3)
            assert outcome.facts["tokens"] == 77
            assert set(outcome.facts) == set(alone.facts)


@pytest.mark.parametrize("refit", REFITS)
def test_every_refit_serves_several_matrices(refit):
    weights, stats = several(seed=14)
    for weight, outcome in zip(weights, prune_weights(weights, stats, "2:4", "wanda", refit), strict=True):
        alone = prune_weight(weight, stats, "2:4", "wanda", refit)
        assert same_up_to_rounding(outcome.weight, alone.weight)
        true = oracle.relative_loss(outcome.weight, weight, stats.gram)
        assert outcome.facts["relative_loss"] == pytest.approx(true, rel=1e-4)


def watched(monkeypatch, method):
    """Return a list to which the rows of every matrix are added that a method is given from now on."""
    heights = []
    real = methods.METHODS[method]

    def solve(weight, stats, pattern, options):
        heights.append(len(weight))
        return real.solve(weight, stats, pattern, options)

    monkeypatch.setitem(methods.METHODS, method, replace(real, solve=solve))
    return heights


@pytest.mark.parametrize("method", METHODS)
def test_matrices_are_solved_as_one_only_where_that_shares_something(monkeypatch, method):
    weights, stats = several()
    heights = watched(monkeypatch, method)
    for refit in ("cg", "none"):
        heights.clear()
        options = {**FAST.get(method, {}), **with_gradient(method, weights, stats)}
        prune_weights(weights, stats, "2:4", method, refit, **options)
        alone = {"ria", "alps", "pruner-zero"} | ({"magnitude", "wanda"} if refit == "none" else set())
        assert heights == ([8, 2, 9] if method in alone else [19])


@pytest.mark.parametrize(("method", "parts"), [("wanda", [3, 3, 2, 2, 3, 3, 3]), ("sparsegpt", [19])])
def test_rows_that_share_nothing_are_solved_a_few_at_a_time(monkeypatch, method, parts):
    weights, stats = several()
    expected = prune_weights(weights, stats, "2:4", method, "none")
    heights = watched(monkeypatch, method)
    monkeypatch.setattr("halve.maths.linalg._AT_ONCE", 3 * weights[0].shape[1])
    for one, other in zip(prune_weights(weights, stats, "2:4", method, "none"), expected, strict=True):
        assert same_up_to_rounding(one.weight, other.weight)
        assert one.facts["relative_loss"] == pytest.approx(other.facts["relative_loss"], rel=1e-5)
    assert heights == parts


def test_the_time_of_a_common_solution_is_shared_by_the_rows():
    weights, stats = several()
    seconds = [outcome.facts["seconds"] for outcome in prune_weights(weights, stats)]
    assert seconds[0] / 8 == pytest.approx(seconds[1] / 2) == pytest.approx(seconds[2] / 9)


def test_a_time_limit_is_shared_by_matrices_that_are_solved_one_by_one(monkeypatch):
    weights, stats = several()
    limits = []

    def note(weight, stats, pattern, options):
        limits.append(options.time_limit)
        return methods.METHODS["magnitude"].solve(weight, stats, pattern, None)

    monkeypatch.setitem(methods.METHODS, "auto", replace(methods.METHODS["auto"], solve=note))
    prune_weights(weights, stats, "4:8", "auto", "none", time_limit=19.0)
    assert limits == pytest.approx([8.0, 2.0, 9.0])
    prune_weights(weights, stats, "2:4", "auto", "none", time_limit=19.0)
    assert limits[3:] == [19.0]
