import time
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch

import layer_oracles as oracle
from halve.errors import FactorisationError, InputError, PatternError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve import exact_swaps as swap
from halve.solve.exact_swaps import SwapOptions, refine
from halve.solve.methods import wanda


def problem(rows=5, d_in=16, seed=0, pattern="2:4"):
    original, gram = oracle.layer(rows, d_in, seed=seed)
    start = wanda.solve(original, Statistics(gram, 10), Pattern(pattern), wanda.WandaOptions()).weight
    return start, original, gram


def best_loss(row, gram, mask):
    best = oracle.best_on_mask(row[None], gram, mask[None])
    return float(oracle.row_losses(best, row[None], gram))


def neighbours(mask, size):
    """Every mask that exchanges one kept and one pruned entry of a group."""
    for start in range(0, len(mask), size):
        places = range(start, start + size)
        for out, into in product(places, places):
            if mask[out] and not mask[into]:
                other = mask.clone()
                other[out], other[into] = False, True
                yield other


@pytest.mark.parametrize(("pattern", "size"), [("2:4", 4), ("1:4", 4), ("3:4", 4), ("4:8", 8)])
def test_ends_where_no_exchange_helps(pattern, size):
    start, original, gram = problem(pattern=pattern)
    refined, facts = refine(start, original, gram, Pattern(pattern), 200, 0.0)
    assert Pattern(pattern).satisfied_by(refined)
    assert facts["swaps"] > 0
    for row, given, out in zip(original, start, refined, strict=True):
        loss = float(oracle.row_losses(out[None], row[None], gram))
        assert loss == pytest.approx(best_loss(row, gram, out != 0), rel=2e-3)
        assert loss < best_loss(row, gram, given != 0) * 1.001
        around = min(best_loss(row, gram, mask) for mask in neighbours(out != 0, size))
        assert around > loss * 0.999


def test_takes_the_best_exchange_first_and_predicts_it_exactly():
    start, original, gram = problem(rows=4, seed=1)
    refined, facts = refine(start, original, gram, Pattern("2:4"), 1, 0.0)
    assert facts["swap_rounds"] == 1
    assert facts["refit_unconverged_rows"] > 0
    for row, given, out in zip(original, start, refined, strict=True):
        best = min(best_loss(row, gram, mask) for mask in neighbours(given != 0, 4))
        best = min(best, best_loss(row, gram, given != 0))
        assert float(oracle.row_losses(out[None], row[None], gram)) == pytest.approx(best, rel=2e-3)


def test_close_to_the_best_of_all_masks():
    start, original, gram = problem(rows=6, d_in=12, seed=2)
    refined, _ = refine(start, original, gram, Pattern("2:4"), 200, 0.0)
    ratios = []
    for row, out in zip(original, refined, strict=True):
        losses = []
        for chosen in product(combinations(range(4), 2), repeat=3):
            mask = torch.zeros(12, dtype=torch.bool)
            mask[[4 * group + place for group, places in enumerate(chosen) for place in places]] = True
            losses.append(best_loss(row, gram, mask))
        ratios.append(float(oracle.row_losses(out[None], row[None], gram)) / min(losses))
    assert min(ratios) > 0.998
    assert sorted(ratios)[len(ratios) // 2] < 1.05


def test_rows_do_not_depend_on_their_company(monkeypatch):
    start, original, gram = problem(rows=9, d_in=32, seed=3)
    expected, facts = refine(start, original, gram, Pattern("2:4"), 200, 1e-5)
    monkeypatch.setitem(swap._BYTES_AT_ONCE, "cpu", 1)
    monkeypatch.setattr(swap, "_REPACK_SHARE", 0.0)
    alone, other = refine(start, original, gram, Pattern("2:4"), 200, 1e-5)
    assert facts["swaps"] == other["swaps"]
    assert torch.equal(expected != 0, alone != 0)
    assert torch.allclose(expected, alone, atol=1e-5)


def test_never_worse_than_given_and_in_its_dtype():
    start, original, gram = problem(rows=8, d_in=32, seed=4)
    original = original.bfloat16()
    refined, _ = refine(start.bfloat16(), original, gram, Pattern("2:4"), 200, 1e-5)
    assert refined.dtype == torch.bfloat16
    before = oracle.row_losses(start.bfloat16(), original, gram)
    assert bool((oracle.row_losses(refined, original, gram) <= before * (1 + 1e-6)).all())
    assert not bool(torch.signbit(refined[refined == 0]).any())


def test_dependent_and_dead_features_are_survived():
    start, original, gram = problem(rows=4, d_in=16, seed=5)
    gram = torch.ones(16, 16)
    gram[3], gram[:, 3] = 0.0, 0.0
    refined, _ = refine(start, original, gram, Pattern("2:4"), 200, 1e-5)
    assert bool(torch.isfinite(refined).all())
    assert Pattern("2:4").satisfied_by(refined)
    with pytest.raises(FactorisationError, match="8 kept features is not positive definite"):
        refine(start, original, 2 * torch.eye(16) - torch.ones(16, 16), Pattern("2:4"), 200, 1e-5)


def test_unstructured_patterns_are_refused():
    start, original, gram = problem()
    with pytest.raises(PatternError, match="50% has none"):
        refine(start, original, gram, Pattern("50%"), 200, 1e-5)


@pytest.mark.parametrize(("option", "value"), [("max_swaps", 0), ("max_swaps", 1.5), ("tolerance", -1.0)])
def test_bad_options_are_refused(option, value):
    with pytest.raises(InputError, match=f"refit_{option} must be"):
        SwapOptions(**{option: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deadline_in_the_past_leaves_the_very_bytes(dtype):
    for seed in range(6):
        start, original, gram = problem(rows=40, d_in=32, seed=seed)
        start, original = start.to(dtype), original.to(dtype)
        refined, facts = refine(start, original, gram, Pattern("2:4"), 200, 1e-5, deadline=time.perf_counter() - 1.0)
        assert torch.equal(refined, start)
        assert facts["swaps"] == facts["swap_rounds"] == facts["refit_unconverged_rows"] == 0.0
        assert facts["refit_kept_rows"] == 40.0


def test_a_generous_deadline_changes_nothing():
    start, original, gram = problem(rows=9, d_in=32, seed=6)
    expected, facts = refine(start, original, gram, Pattern("2:4"), 200, 1e-5)
    refined, other = refine(start, original, gram, Pattern("2:4"), 200, 1e-5, deadline=time.perf_counter() + 1000.0)
    assert other == facts
    assert torch.equal(refined != 0, expected != 0)
    torch.testing.assert_close(refined, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_time", [1, 3])
def test_with_a_deadline_the_rows_that_lose_most_come_first(monkeypatch, in_time):
    start, original, gram = problem(rows=7, d_in=32, seed=7)
    readings = iter(range(100))
    monkeypatch.setitem(swap._BYTES_AT_ONCE, "cpu", 1)  # one row at a time
    monkeypatch.setattr(swap, "time", SimpleNamespace(perf_counter=lambda: float(next(readings))))
    refined, facts = refine(start, original, gram, Pattern("2:4"), 200, 1e-5, deadline=in_time - 0.5)
    changed = ((refined - start).abs() > 1e-5).any(1)
    worst = oracle.row_losses(start, original, gram).argsort(descending=True)[:in_time]
    assert set(changed.nonzero().flatten().tolist()) == set(worst.tolist())
    assert facts["swaps"] > 0
    untimed, _ = refine(start, original, gram, Pattern("2:4"), 200, 1e-5)
    torch.testing.assert_close(refined[changed], untimed[changed], rtol=1e-5, atol=1e-6)
