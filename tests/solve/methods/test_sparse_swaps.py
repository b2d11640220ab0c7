import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError, PatternError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.methods import wanda
from halve.solve.methods.sparse_swaps import SparseSwapsOptions, solve
from halve.solve.outcome import Status


def prune(weight, gram, pattern="2:4", **options):
    return solve(weight, Statistics(gram, 10), Pattern(pattern), SparseSwapsOptions(**options))


def test_makes_the_best_swaps_from_wanda_until_none_helps():
    weight, gram = oracle.layer(5, 24, seed=0)
    masks = wanda.solve(weight, Statistics(gram, 10), Pattern("2:4"), wanda.WandaOptions()).weight != 0
    swaps = []
    for row, mask in zip(weight.double(), masks, strict=True):
        loss, count = float(oracle.row_losses((row * mask)[None], row[None], gram)), 0
        while True:
            best, enters, leaves = oracle.best_swap(row, mask, gram.double())
            if best > loss * (1 - 1e-6):
                break
            loss, mask[enters], mask[leaves], count = best, True, False, count + 1
        swaps.append(count)
    outcome = prune(weight, gram)
    assert torch.equal(outcome.weight != 0, masks)
    assert torch.equal(outcome.weight, weight * masks)
    assert outcome.facts["swaps"] == sum(swaps) > 5
    assert outcome.facts["iterations"] == max(swaps)


def test_the_limit_is_one_on_the_swaps_of_a_row():
    weight, gram = oracle.layer(8, 32, seed=1)
    outcome = prune(weight, gram, max_swaps=2)
    assert outcome.status is Status.MAX_ITER
    assert "rows still improved after 2 swaps" in outcome.reason
    assert outcome.facts["iterations"] == 2
    assert outcome.facts["swaps"] <= 16
    assert prune(weight, gram).status is Status.OK


def test_unstructured_patterns_are_refused():
    with pytest.raises(PatternError, match="sparse-swaps prunes to N:M, not to 50%"):
        prune(torch.ones(2, 8), torch.eye(8), "50%")


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_bad_options_are_refused(value):
    with pytest.raises(InputError, match="max_swaps of sparse-swaps must be"):
        SparseSwapsOptions(max_swaps=value)
