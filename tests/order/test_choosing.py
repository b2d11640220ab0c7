"""Orders against brute force over all of them, and the estimate against the groups written out."""

from itertools import combinations

import pytest
import torch

from halve.maths.pattern import Pattern
from halve.order.choosing import _sums_of_smaller, assign, choose_order, estimated_loss, spread


def saliency(units, width, rows, seed=0):
    return torch.randn(units, width, rows, generator=torch.Generator().manual_seed(seed)).square()


def lost(channels, order, keep, group):
    """What pruning costs, group by group and row by row."""
    total = 0.0
    for unit, places in zip(channels.double().tolist(), order.tolist(), strict=True):
        for first in range(0, len(places), group):
            members = [unit[channel] for channel in places[first : first + group]]
            total += sum(sum(sorted(row)[: group - keep]) for row in zip(*members, strict=True))
    return total


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "4:8"])
def test_the_estimate_is_what_the_groups_lose(text):
    pattern = Pattern(text)
    channels = saliency(2, 16, 5)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(unit)) for unit in range(2)])
    wanted = lost(channels, order, *pattern.budget(16))
    assert estimated_loss(channels, pattern, order) == pytest.approx(wanted, rel=1e-6)


def test_orders_come_close_to_the_best_of_all():
    pattern = Pattern("2:4")
    gained = possible = 0.0
    for seed in range(6):
        channels = saliency(1, 8, 6, seed=seed)
        halves = (group for group in combinations(range(8), 4) if 0 in group)
        every = [torch.tensor([[*group, *sorted(set(range(8)) - set(group))]]) for group in halves]
        given, best = estimated_loss(channels, pattern), min(lost(channels, order, 2, 4) for order in every)
        found = estimated_loss(channels, pattern, choose_order(channels, pattern, torch.Generator().manual_seed(0)))
        assert best <= found * (1 + 1e-6)
        gained, possible = gained + given - found, possible + given - best
    assert gained > 0.7 * possible


@pytest.mark.parametrize("text", ["2:4", "1:4", "2:8", "1:2"])
def test_an_order_is_one_and_lowers_the_loss(text):
    channels = saliency(3, 64, 40, seed=1) * torch.linspace(0.2, 3.0, 64)[None, :, None]
    order = choose_order(channels, Pattern(text), torch.Generator().manual_seed(0))
    assert torch.equal(order.sort(1).values, torch.arange(64).expand(3, -1))
    assert estimated_loss(channels, Pattern(text), order) < 0.97 * estimated_loss(channels, Pattern(text))
    assert torch.equal(order, choose_order(channels, Pattern(text), torch.Generator().manual_seed(0)))


def test_channels_that_lose_nothing_stay_where_they_are():
    channels = saliency(1, 32, 10)
    channels[:, ::4] = 0.0
    channels[:, 1::4] = 0.0
    order = choose_order(channels, Pattern("2:4"), torch.Generator().manual_seed(0))
    assert torch.equal(order, torch.arange(32).view(1, -1))


@pytest.mark.parametrize("places", [48, 100])
def test_sums_of_the_smaller_are_near_the_exact_ones(places):
    thresholds, channels = saliency(2, places, 300, seed=5), saliency(2, places, 300, seed=6)
    exact = torch.minimum(thresholds.unsqueeze(2), channels.unsqueeze(1)).sum(-1)
    found = _sums_of_smaller(thresholds, channels)
    assert float((found - exact).abs().max() / exact.mean()) < (0.2 if places > 64 else 1e-5)
    centred, wanted = found - found.mean(), exact - exact.mean()
    assert float((centred * wanted).sum() / (centred.norm() * wanted.norm())) > 0.98


def test_no_exchange_of_two_is_left():
    costs = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(0))
    places = assign(costs)
    assert torch.equal(places.sort(1).values, torch.arange(20).expand(2, -1))
    placed = costs.gather(2, places.unsqueeze(1).expand(-1, 20, -1))
    now = placed.diagonal(dim1=1, dim2=2)
    assert float((now.unsqueeze(1) + now.unsqueeze(2) - placed - placed.mT).max()) < 1e-5
    assert float(now.sum()) < float(costs.diagonal(dim1=1, dim2=2).sum())


def test_the_most_important_channels_come_to_different_groups():
    groups = spread(torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]), 4)
    assert groups.tolist() == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
