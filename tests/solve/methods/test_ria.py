import torch

import layer_oracles as oracle
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.methods.ria import RIAOptions, solve


def test_keeps_the_largest_scores():
    weight, gram = oracle.layer(6, 16, seed=0)
    w, h = weight.double().abs(), gram.double().diagonal()
    scores = (w / w.sum(0, keepdim=True) + w / w.sum(1, keepdim=True)) * h**0.25
    pruned = solve(weight, Statistics(gram, 10), Pattern("2:4"), RIAOptions()).weight
    for row, kept in zip(scores, pruned, strict=True):
        for start in range(0, 16, 4):
            best = set(row[start : start + 4].topk(2).indices.tolist())
            assert set(kept[start : start + 4].nonzero().flatten().tolist()) == best
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_an_empty_row_or_column_does_no_harm():
    weight, gram = oracle.layer(6, 16, seed=1)
    weight[2], weight[:, 5] = 0.0, 0.0
    assert bool(torch.isfinite(solve(weight, Statistics(gram, 10), Pattern("2:4"), RIAOptions()).weight).all())
