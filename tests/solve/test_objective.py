import math
from dataclasses import replace

import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError
from halve.maths.gram import GramAccumulator, Statistics
from halve.maths.pattern import Pattern
from halve.solve.defaults import Defaults
from halve.solve.dense_target import dense_target
from halve.solve.objective import Objective
from halve.solve.shrinkage import choose_shrinkage, shrink

BY_AUTO = Defaults(choose_shrinkage=True, match_dense=0.25)


def problem(tokens=60):
    x = oracle.correlated_inputs(tokens, 32, seed=0).float()
    noisy = x + 0.2 * x.roll(1, dims=1)
    accumulator = GramAccumulator(32, halves=True)
    accumulator.add(noisy, x)
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(1)), accumulator.finish()


@pytest.mark.parametrize("value", ["much", "0.1", -0.1, 1.1, math.nan, math.inf, True, [0.1]])
def test_a_bad_shrinkage_is_refused(value):
    with pytest.raises(InputError, match="shrinkage must be auto or a number from 0 to 1, got "):
        Objective(shrinkage=value)


@pytest.mark.parametrize("value", ["1", "auto", -0.1, 1.1, math.nan, True])
def test_a_bad_blend_is_refused(value):
    with pytest.raises(InputError, match="match_dense must be a number from 0 to 1, got "):
        Objective(match_dense=value)


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, "1", None, True])
def test_a_bad_ridge_is_refused(value):
    with pytest.raises(InputError, match="match_ridge must be a finite number above 0, got "):
        Objective(match_ridge=value)


@pytest.mark.parametrize("value", [None, "auto", 0, 1, 0.0, 0.5, 1.0])
def test_good_values_are_kept(value):
    assert Objective(value, 1, 1e-9).shrinkage == value


@pytest.mark.parametrize(
    ("shrinkage", "auto", "named"),
    [(None, True, False), ("auto", True, True), (0.0, False, False), (0.3, False, False), (1, False, False)],
)
def test_who_has_the_shrinkage_chosen(shrinkage, auto, named):
    objective = Objective(shrinkage)
    assert objective.chooses_shrinkage(BY_AUTO) is auto
    assert objective.chooses_shrinkage(Defaults()) is named


def test_nothing_asked_for_changes_nothing():
    weight, stats = problem()
    target, gram, facts = Objective().apply(weight, stats, Pattern("2:4"), Defaults())
    assert target is weight
    assert gram is stats.gram
    assert facts == {}
    target, gram, facts = Objective(0, 0).apply(weight, stats, Pattern("2:4"), BY_AUTO)
    assert target is weight
    assert gram is stats.gram
    assert facts == {}


@pytest.mark.parametrize(
    ("asked", "auto", "named", "insists"),
    [(None, 0.25, 0.0, False), (0.0, 0.0, 0.0, False), (0.6, 0.6, 0.6, True), (1, 1, 1, True)],
)
def test_who_aims_at_the_dense_model(asked, auto, named, insists):
    weight, stats = problem()
    objective = Objective(0.0, asked)
    assert objective.insists_on_dense is insists
    for defaults, blend in ((BY_AUTO, auto), (Defaults(), named)):
        assert objective.blend(defaults) == blend
        target, _, facts = objective.apply(weight, stats, Pattern("2:4"), defaults)
        assert facts.get("match_dense", 0.0) == blend
        assert torch.equal(target, dense_target(weight, stats, blend, 0.1))
    alone = replace(stats, cross=None)
    target, _, facts = Objective(0.0).apply(weight, alone, Pattern("2:4"), BY_AUTO)
    assert target is weight
    assert facts == {}


def test_a_number_is_taken_and_auto_is_chosen():
    weight, stats = problem()
    _, gram, facts = Objective(0.3).apply(weight, stats, Pattern("2:4"), BY_AUTO)
    assert facts["shrinkage"] == 0.3
    assert torch.equal(gram, shrink(stats.gram, 0.3))
    chosen = choose_shrinkage(weight, stats, Pattern("2:4"))
    assert chosen > 0.0
    for objective, defaults in ((Objective(match_dense=0), BY_AUTO), (Objective("auto"), Defaults())):
        _, gram, facts = objective.apply(weight, stats, Pattern("2:4"), defaults)
        assert facts == {"shrinkage": chosen}
        assert torch.equal(gram, shrink(stats.gram, chosen))
    alone = Statistics(stats.gram, stats.tokens)
    assert Objective("auto").apply(weight, alone, Pattern("2:4"), Defaults())[2] == {}


def test_targets_follow_blend_and_ridge_and_are_what_the_shrinkage_is_chosen_for(monkeypatch):
    weight, stats = problem()
    judged = []

    def choose(target, stats, pattern):
        judged.append(target)
        return 0.25

    monkeypatch.setattr("halve.solve.objective.choose_shrinkage", choose)
    target, gram, facts = Objective("auto", 0.5, 0.2).apply(weight, stats, Pattern("2:4"), Defaults())
    assert torch.equal(target, dense_target(weight, stats, 0.5, 0.2))
    assert not torch.equal(target, weight)
    assert judged[0] is target
    assert facts == {"shrinkage": 0.25, "match_dense": 0.5}
    assert torch.equal(gram, shrink(stats.gram, 0.25))
