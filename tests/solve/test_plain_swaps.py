import pytest
import torch

import halve.solve.plain_swaps
import layer_oracles as oracle
from halve.maths.pattern import Pattern
from halve.solve.plain_swaps import exchange


def problem(seed=0, rows=6, d=24):
    original, gram = oracle.layer(rows, d, seed=seed)
    features = gram.diagonal().sqrt()
    return original * features, gram / features / features[:, None]


def test_makes_the_best_exchanges_until_none_helps():
    target, gram = problem()
    start = Pattern("2:4").project(target)
    weight, mask, done = exchange(start, target, gram, Pattern("2:4"), limit=100, restore=False)
    expected = oracle.exchanged(start, target, gram)
    assert torch.equal(weight != 0, expected != 0)
    assert torch.allclose(weight.double(), expected, atol=1e-4)
    assert torch.equal(mask, weight != 0)
    assert done.total > done.rounds > 1
    assert done.unfinished == 0


def test_restored_weights_have_their_old_values():
    target, gram = problem(seed=1)
    weight, mask, _ = exchange(Pattern("2:4").project(target), target, gram, Pattern("2:4"), limit=100, restore=True)
    assert torch.equal(weight, target * mask)


@pytest.mark.parametrize("restore", [False, True])
def test_limit_and_descent(restore):
    target, gram = problem(seed=2)
    start = Pattern("1:4").project(target)
    losses = [float(oracle.row_losses(start, target, gram).sum())]
    for limit in (1, 2, 100):
        weight, _, done = exchange(start, target, gram, Pattern("1:4"), limit=limit, restore=restore)
        assert done.rounds <= limit
        assert (done.unfinished > 0) == (limit == 1)
        assert Pattern("1:4").satisfied_by(weight)
        losses.append(float(oracle.row_losses(weight, target, gram).sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < losses[0]


def test_finds_the_optimum_of_a_diagonal_gram():
    target, _ = problem(seed=3)
    start = torch.where(torch.arange(24) % 4 < 2, target, 0.0)
    weight, _, _ = exchange(start, target, torch.eye(24), Pattern("2:4"), limit=100, restore=False)
    assert torch.allclose(weight, Pattern("2:4").project(target), atol=1e-6)


def test_dead_features_never_enter():
    target, gram = problem(seed=4)
    gram[3], gram[:, 3] = 0.0, 0.0
    target[:, 3] *= 1e-5  # what unit-diagonal scaling leaves of a dead feature
    weight, mask, _ = exchange(Pattern("2:4").project(target), target, gram, Pattern("2:4"), limit=100, restore=False)
    assert bool(torch.isfinite(weight).all())
    assert not bool(mask[:, 3].any())


def test_rows_do_not_depend_on_their_company(monkeypatch):
    target, gram = problem(seed=5)
    start = Pattern("2:4").project(target)
    expected, _, done = exchange(start, target, gram, Pattern("2:4"), limit=100, restore=False)
    monkeypatch.setattr(halve.solve.plain_swaps, "_BYTES_AT_ONCE", 1)
    alone, _, other = exchange(start, target, gram, Pattern("2:4"), limit=100, restore=False)
    assert torch.allclose(expected, alone, atol=1e-6)
    assert done == other
