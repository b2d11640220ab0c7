"""Positions that layers see, against what goes through them."""

import pytest
import torch
from torch import nn

from halve.forecast.foreseen import foresee
from halve.forecast.rates import Rates
from halve.forecast.resolution import layer_positions
from halve.run.request import Request
from models import convnext, resnet, vit

RATES = Rates(400e12, 40e12, 10e12, 2.5e12, 2e9, 1e9)


@pytest.mark.parametrize("make", [resnet, convnext, vit])
def test_every_layer_is_told_what_it_multiplies(make):
    model, seen = make(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda _l, _a, output, name=name: seen.update({name: output[0]}))
    with torch.no_grad():
        model(pixel_values=torch.randn(1, model.config.num_channels, 16, 16))
    found = layer_positions(model, 16, 16)
    assert found.keys() == seen.keys()
    for name, output in seen.items():
        layer = model.get_submodule(name)
        channels = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        assert found[name] * channels == output.numel()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_model_that_does_not_run_without_weights_tells_nothing():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, pixel_values):
            return self.layer(pixel_values) if float(pixel_values.sum()) > 0 else pixel_values

    assert layer_positions(Looking(), 4, 4) == {}


def test_stages_of_pictures_that_became_smaller_take_less():
    model = convnext()
    asked = Request.of({"calibration": torch.randn(8, 1, 16, 16), "method": "wanda", "refit": "none", "device": "cpu"})
    found = foresee(model, None, asked, rates=RATES)
    assert [max(each.positions for each in block.bundles) for block in found.shapes.blocks] == [1.0, 0.25]
    assert any("in every layer as those that it sees" in note for note in found.notes)
    assert found.shapes.heads == 0  # nothing attends
