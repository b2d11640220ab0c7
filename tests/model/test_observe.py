import pytest
import torch
from torch import nn

from halve.model.observe import observe
from models import Attention


def test_layers_that_were_called_are_listed_with_their_tokens():
    model = nn.Sequential(Attention(), Attention())
    observed = observe(model, list(model), [lambda: model(torch.randn(2, 5, 8))])
    assert observed.called == {"0.up.weight": 10, "1.up.weight": 10}
    assert {"0.attention.out_proj.weight", "1.attention.out_proj.weight"} <= observed.bypassed


class UsesBoth(nn.Module):
    """Calls one layer, multiplies with the weight of another, and does both with a third."""

    def __init__(self):
        super().__init__()
        self.called, self.used, self.both = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.both(self.called(x) @ self.used.weight.T) + torch.einsum("btd,od->bto", x, self.both.weight)


class Convolutions(nn.Module):
    """Calls one convolution twice, another never, and multiplies with the weight of a third."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.used = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return nn.functional.conv2d(self.twice(self.twice(x)), self.used.weight)


@pytest.mark.parametrize(
    ("block", "x", "called", "bypassed", "repeated"),
    [
        (UsesBoth(), torch.randn(2, 5, 8), {"0.called.weight": 10}, {"0.used.weight", "0.both.weight"}, set()),
        (Convolutions(), torch.randn(2, 8, 4, 5), {"0.twice.weight": 80}, {"0.used.weight"}, {"0.twice.weight"}),
    ],
)
def test_a_weight_that_is_multiplied_with_outside_of_its_layer_does_not_count_as_called(
    block, x, called, bypassed, repeated
):
    model = nn.Sequential(block)
    observed = observe(model, [block], [lambda: model(x)])
    assert observed.called == called
    assert observed.bypassed == bypassed
    assert observed.repeated == repeated
