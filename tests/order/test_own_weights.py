"""Channels that must not move although they could: of weights computed of others, and of matrices pruned before."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import halve
from halve.maths.pattern import Pattern


class Normed(nn.Module):
    """An MLP, one of whose weights is computed of others, beside a plain one."""

    def __init__(self, norm):
        super().__init__()
        self.up, self.down = norm(nn.Linear(16, 32)), nn.Linear(32, 16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x))) + self.narrow(torch.relu(self.wide(x)))


class Shared(nn.Module):
    """Two layers read the same channels behind a norm."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(16, 32), nn.LayerNorm(32)
        self.large, self.small, self.last = nn.Linear(32, 16), nn.Linear(32, 8), nn.Linear(8, 16)

    def forward(self, x):
        hidden = self.norm(torch.relu(self.up(x)))
        return x + self.large(hidden) + self.last(torch.tanh(self.small(hidden)))


class Stack(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 24, 16, generator=generator)} for _ in range(4)]


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_weight_that_is_computed_of_others_stays_in_its_order(norm):
    report = halve.prune(Stack(lambda: Normed(norm)), calibration=batches(), least_prunable=0.0).report
    assert {order.fold.consumer for order in report.orders} == {"narrow.weight"}


def test_a_matrix_that_was_pruned_before_keeps_its_pattern():
    model = Stack(Shared)
    asked = {"calibration": batches(), "least_prunable": 0.0}
    orders = halve.prune(Stack(Shared), **asked).report.orders
    assert {order.fold.consumer for order in orders} == {"large.weight", "last.weight"}
    halve.prune(model, permute="none", skip=["*.up.*", "*.large.*"], **asked)
    report = halve.prune(model, skip=["*.small.*", "*.last.*"], **asked).report
    assert report.orders == ()
    for block in model.blocks:
        assert Pattern.parse("2:4").satisfied_by(block.small.weight)
        assert Pattern.parse("2:4").satisfied_by(block.large.weight)
