"""Convolutions as matrices: patches, views, and which classes are taken for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from halve.model import layers
from halve.model.layers import (
    as_stored,
    block_weight_count,
    inputs_last,
    is_convolution,
    matrix_view,
    patches,
    patches_in_parts,
    write_matrix,
)

sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw):
    """A convolution of float64 with a fitting input."""
    groups = draw(st.sampled_from([1, 2, 3]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.just("valid"), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("same")))
    stride = (1, 1) if padding == "same" else draw(sizes)
    layer = nn.Conv2d(
        groups * draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 3)),
        draw(sizes),
        stride,
        padding,
        draw(sizes),
        groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    batch = () if draw(st.integers(0, 4)) == 0 else (draw(st.integers(1, 3)),)
    x = torch.randn(*batch, layer.in_channels, draw(st.integers(7, 10)), draw(st.integers(7, 10)), dtype=torch.float64)
    if batch and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    return layer, x


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of even kernels, from PyTorch itself
@settings(max_examples=150, deadline=None)
@given(convolutions(), st.integers(0, 2**31))
def test_patches_times_the_matrix_are_what_the_convolution_gives(made, seed):
    torch.manual_seed(seed)
    layer, x = made
    with torch.no_grad():
        expected = layer(x)
    rows = layer.out_channels // layer.groups
    products = []
    for group, part in enumerate(patches(x, layer)):
        matrix = matrix_view(layer.weight.data, group if layer.groups > 1 else None, "conv", rows)
        assert matrix.shape == (rows, part.shape[-1])
        products.append(part @ matrix.T)
    found = torch.cat(products, -1) + (0.0 if layer.bias is None else layer.bias.data)
    torch.testing.assert_close(found.movedim(-1, 1), expected if expected.ndim == 4 else expected.unsqueeze(0))


def test_the_order_of_patches_is_that_of_unfold_tap_by_tap():
    layer = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=1)
    x = torch.randn(2, 4, 6, 7)
    found = patches(x, layer)[0].flatten(1, 2)
    other = (
        nn.functional.unfold(x, (3, 2), padding=1, stride=(2, 1)).unflatten(1, (4, 6)).permute(0, 3, 2, 1).flatten(2)
    )
    assert torch.equal(found, other)


def test_parts_are_the_patches_of_all_samples(monkeypatch):
    layer, x = nn.Conv2d(4, 8, 3, groups=2), torch.randn(5, 4, 6, 6)
    monkeypatch.setattr(layers, "_PATCHES", 2 * 9 * 4 * 36)
    parts = list(patches_in_parts(x, layer))
    assert [part.shape[1] for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts, 1), patches(x, layer))
    monkeypatch.setattr(layers, "_PATCHES", 1)
    assert [part.shape[1] for part in patches_in_parts(x, layer)] == [1] * 5


@pytest.mark.parametrize("layout", ["out_in", "in_out", "conv"])
def test_what_has_the_inputs_last_can_be_put_back(layout):
    tensor = torch.randn(6, 4, 3, 2) if layout == "conv" else torch.randn(6, 4)
    last = inputs_last(tensor, layout)
    assert last.shape[-1] == (6 if layout == "in_out" else 4)
    assert last.data_ptr() == tensor.data_ptr()
    assert torch.equal(as_stored(last, layout), tensor)


@pytest.mark.parametrize(("layout", "expert"), [("out_in", 1), ("in_out", 2), ("conv", None), ("conv", 1)])
def test_a_matrix_that_is_written_is_read_again_and_nothing_else_is_touched(layout, expert):
    parameter = torch.randn(6, 4, 3, 2) if layout == "conv" else torch.randn(3, 6, 4)
    before = parameter.clone()
    rows = 3 if expert is not None else 6
    matrix = torch.randn_like(matrix_view(parameter, expert, layout, rows))
    write_matrix(parameter, expert, layout, matrix)
    assert torch.equal(matrix_view(parameter, expert, layout, rows), matrix)
    changed = (parameter != before).flatten(1).all(1)
    wanted = {("conv", 1): [3, 4, 5], ("conv", None): list(range(6))}.get((layout, expert), [expert])
    assert changed.nonzero().flatten().tolist() == wanted
    assert torch.equal(parameter[~changed], before[~changed])


class Standardised(nn.Conv2d):
    """What changes its weight before it multiplies: zeros do not stay zero."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Inside(nn.Conv2d):
    """The same, one call further in."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Named(nn.Conv2d):
    """A class that adds nothing to how it multiplies."""


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.Conv2d(8, 8, 3), True),
        (Named(8, 8, 3), True),
        (Standardised(8, 8, 3), False),
        (Inside(8, 8, 3), False),
        (nn.Conv1d(8, 8, 3), False),
        (nn.ConvTranspose2d(8, 8, 3), False),
        (nn.Linear(8, 8), False),
    ],
)
def test_only_what_multiplies_by_its_weight_as_it_is_counts_as_a_convolution(module, found):
    assert is_convolution(module) == found


def test_weights_of_convolutions_count_but_for_depthwise_ones():
    block = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 7, groups=16), nn.Linear(16, 4), nn.BatchNorm2d(4))
    assert block_weight_count(block) == 8 * 16 * 9 + 64
    assert block_weight_count(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))) == 0
