from itertools import combinations

import pytest
import torch

import layer_oracles as oracle
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.methods.wanda import WandaOptions, solve


def wanda(weight, gram, pattern="2:4"):
    return solve(weight, Statistics(gram, 10), Pattern(pattern), WandaOptions()).weight


def test_is_the_best_mask_of_a_diagonal_gram_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 8, generator=generator)
    gram = torch.diag(torch.rand(8, generator=generator) ** 4)
    losses = {}
    for first in combinations(range(4), 2):
        for second in combinations(range(4, 8), 2):
            kept = torch.zeros(1, 8)
            kept[0, [*first, *second]] = 1.0
            losses[first + second] = float(oracle.row_losses(weight * kept, weight, gram))
    best = min(losses, key=losses.get)
    assert wanda(weight, gram)[0].nonzero().flatten().tolist() == list(best)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_kept_weights_are_bit_identical(pattern):
    weight, gram = oracle.layer(4, 16, seed=1)
    weight = weight.bfloat16()
    pruned = wanda(weight, gram, pattern)
    kept = pruned != 0
    assert int(kept.sum()) == 32
    assert torch.equal(pruned[kept], weight[kept])


def test_unstructured_compares_within_a_row():
    weight, gram = oracle.layer(4, 16, seed=2)
    scores = weight.double().abs() * gram.double().diagonal().sqrt()
    for row, kept in zip(scores, wanda(weight, gram, "50%") != 0, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(row.topk(8).indices.tolist())


def test_only_the_diagonal_matters():
    weight, gram = oracle.layer(4, 16, seed=3)
    assert torch.equal(wanda(weight, gram), wanda(weight, torch.diag(gram.diagonal())))
