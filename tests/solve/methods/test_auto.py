import math
from types import SimpleNamespace

import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.matrix import prune_weight, prune_weights
from halve.solve.methods import METHODS, auto
from halve.solve.methods.auto import EFFORTS, AutoOptions, solve
from pruned_matrices import with_gradient


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
        taken = with_gradient(name, [weight], gram)
        other = prune_weights([weight], gram, method=name, refit_tolerance=1e-7, **taken)[0].facts["relative_loss"]
        assert losses[2] <= other * (1 + 1e-6), name
        if name in {"magnitude", "wanda", "ria", "sparse-swaps", "sparsegpt"}:
            assert losses[0] < other, name


def test_fast_ends_near_the_best_weights_on_its_mask():
    weight, gram = oracle.layer(48, 128, seed=1)
    quick, exact = (prune_weight(weight, gram, effort="fast", **options) for options in ({}, {"refit_tolerance": 1e-7}))
    assert quick.facts["refit_row_iterations"] < exact.facts["refit_row_iterations"]
    assert quick.facts["relative_loss"] < 1.01 * exact.facts["relative_loss"]
    assert quick.facts["relative_loss"] < prune_weight(weight, gram, method="sparsegpt").facts["relative_loss"]


def test_is_what_prune_weight_does_by_default():
    weight, gram = oracle.layer(8, 32, seed=2)
    assert torch.equal(prune_weight(weight, gram).weight, prune_weight(weight, gram, method="prox-admm").weight)


def test_an_unknown_effort_is_refused():
    with pytest.raises(InputError, match="effort must be one of fast, balanced, best, got 'great'"):
        AutoOptions(effort="great")


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf, "5", True])
def test_a_bad_time_limit_is_refused(limit):
    with pytest.raises(InputError, match="time_limit of auto must be a finite number above 0, got "):
        AutoOptions(time_limit=limit)


class Clock:
    """Stands still but for what ``solve`` of prox-admm takes."""

    def __init__(self, monkeypatch, takes):
        self.now, self.solved = 0.0, []
        real = auto.prox_admm.solve

        def solve(weight, stats, pattern, options):
            self.solved.append(next(name for name, schedule in auto._SCHEDULES.items() if schedule is options))
            self.now += takes[self.solved[-1]]
            return real(weight, stats, pattern, options)

        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(auto, "time", clock)
        monkeypatch.setattr(auto.exact_swaps, "time", clock)
        monkeypatch.setattr(auto, "prox_admm", SimpleNamespace(solve=solve))


@pytest.mark.parametrize(
    ("effort", "limit", "efforts", "swaps"),
    [
        ("fast", 0.5, ["fast"], False),
        ("fast", 4.9, ["fast"], True),
        ("fast", 5.0, ["fast", "balanced"], True),
        ("fast", 9.9, ["fast", "balanced"], True),
        ("fast", 10.0, ["fast", "balanced", "best"], True),
        ("balanced", 8.9, ["balanced"], True),
        ("balanced", 9.0, ["balanced", "best"], True),
        ("balanced", 1e-9, ["balanced"], False),
        ("best", 6.0, ["best"], True),
        ("best", 5.9, ["best"], False),
        ("best", 1000.0, ["best"], True),
    ],
)
def test_efforts_follow_one_another_while_there_is_time(monkeypatch, effort, limit, efforts, swaps):
    clock = Clock(monkeypatch, {"fast": 1.0, "balanced": 3.0, "best": 6.0})
    weight, gram = oracle.layer(6, 32, seed=3)
    outcome = prune(weight, gram, effort=effort, time_limit=limit)
    assert clock.solved == efforts
    assert outcome.facts["efforts"] == len(efforts)
    assert ("swaps" in outcome.facts) == swaps
    assert Pattern("2:4").satisfied_by(outcome.weight)


def test_with_time_for_all_efforts_no_row_is_worse_than_by_any(monkeypatch):
    weight, gram = oracle.layer(32, 64, seed=4)
    limited = prune_weight(weight, gram, effort="fast", time_limit=1000.0, refit_tolerance=1e-7)
    losses = oracle.row_losses(limited.weight, weight, gram)
    for effort in EFFORTS[:2]:
        alone = prune_weight(weight, gram, effort=effort, refit_tolerance=1e-7)
        assert bool((losses <= oracle.row_losses(alone.weight, weight, gram) * (1 + 1e-4)).all()), effort
    # The best effort ends in swaps of its own, from another start: only without them it is a lower bound, row by row.
    monkeypatch.setattr(auto.exact_swaps, "refine", lambda weight, *_rest, **_more: (weight, {}))
    limited = prune_weight(weight, gram, effort="fast", time_limit=1000.0, refit_tolerance=1e-7)
    losses = oracle.row_losses(limited.weight, weight, gram)
    improved = torch.zeros(32, dtype=torch.bool)
    for effort in EFFORTS:
        alone = prune_weight(weight, gram, effort=effort, refit_tolerance=1e-7)
        assert bool((losses <= oracle.row_losses(alone.weight, weight, gram) * 1.02).all()), effort
        improved |= losses < oracle.row_losses(alone.weight, weight, gram) * 0.98
    assert bool(improved.any())


@pytest.mark.parametrize("pattern", ["4:8", "50%"])
def test_a_time_limit_for_other_patterns_is_for_swaps_alone(pattern):
    weight, gram = oracle.layer(8, 32, seed=5)
    expected = prune(weight, gram, pattern)
    for limit in (1e-9, 1000.0):
        outcome = prune(weight, gram, pattern, time_limit=limit)
        assert outcome.method == "alps"
        assert Pattern(pattern).satisfied_by(outcome.weight)
        assert ("swaps" in outcome.facts) == (limit == 1000.0 and pattern == "4:8")
        if "swaps" not in outcome.facts:
            assert torch.equal(outcome.weight, expected.weight)
        else:
            losses = [oracle.row_losses(each.weight, weight, gram) for each in (outcome, expected)]
            assert bool((losses[0] <= losses[1] * (1 + 1e-6)).all())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_swaps_get_what_is_left_of_the_time(monkeypatch, pattern):
    Clock(monkeypatch, {"fast": 1.0, "balanced": 3.0, "best": 6.0})
    deadlines = []

    def refine(weight, *_rest, deadline):
        deadlines.append(deadline)
        return weight, {"swaps": 0.0}

    monkeypatch.setattr(auto.exact_swaps, "refine", refine)
    weight, gram = oracle.layer(6, 32, seed=6)
    prune(weight, gram, pattern, effort="best", time_limit=8.0)
    prune(weight, gram, pattern, effort="best")
    assert deadlines == [8.0, math.inf]
