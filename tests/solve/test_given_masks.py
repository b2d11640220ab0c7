"""Matrices whose masks are given: nothing is chosen, and the refit stays where it is told."""

import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError
from halve.maths.gram import Statistics
from halve.solve.matrix import prune_weights
from halve.solve.outcome import Status
from pruned_matrices import several


def odd_masks(weights):
    """Keep the first and third of each group, and of the first group of each row nothing: what no method chooses."""
    masks = []
    for weight in weights:
        mask = torch.tensor([True, False, True, False]).repeat(weight.shape[1] // 4).expand(weight.shape).clone()
        mask[:, :4] = False
        masks.append(mask)
    return masks


@pytest.mark.parametrize("method", ["magnitude", "alps"])
def test_the_refit_stays_on_a_given_mask(method):
    weights, stats = several()
    masks = odd_masks(weights)
    outcomes = prune_weights(weights, stats, "2:4", method, "cg", masks=masks, refit_tolerance=1e-7)
    for weight, mask, outcome in zip(weights, masks, outcomes, strict=True):
        assert (outcome.status, outcome.method) == (Status.OK, "given")
        assert not (outcome.weight[~mask]).any()
        best = torch.zeros_like(weight, dtype=torch.float64)
        gram = stats.gram.double()
        for row, kept in enumerate(mask):
            places = kept.nonzero().flatten()
            right = gram[places] @ weight[row].double()
            best[row, places] = torch.linalg.solve(gram[places][:, places], right)
        least = oracle.relative_loss(best.float(), weight, stats.gram)
        assert outcome.facts["relative_loss"] == pytest.approx(least, rel=1e-3)
        plain = oracle.relative_loss(weight * mask, weight, stats.gram)
        assert outcome.facts["relative_loss_before_refit"] == pytest.approx(plain, rel=1e-4)
        assert least < 0.99 * plain


def test_a_refit_that_exchanges_weights_is_refused():
    weights, stats = several()
    with pytest.raises(InputError, match="refit swap exchanges kept and pruned weights, and masks are given"):
        prune_weights(weights, stats, "2:4", "magnitude", "swap", masks=odd_masks(weights))


def test_where_no_input_arrived_the_kept_weights_stay():
    weights, stats = several()
    dead = Statistics(torch.zeros_like(stats.gram), 5)
    masks = odd_masks(weights)
    given = prune_weights(weights, dead, "2:4", "magnitude", "cg", masks=masks, fallback="magnitude")
    for weight, mask, outcome in zip(weights, masks, given, strict=True):
        assert outcome.status is Status.FELL_BACK
        assert "the kept weights are as they were" in outcome.reason
        assert torch.equal(outcome.weight, weight * mask)


def test_a_mask_beyond_the_pattern_fails():
    weights, stats = several()
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    assert {each.status for each in prune_weights(weights, stats, "2:4", "magnitude", masks=masks)} == {Status.FAILED}
