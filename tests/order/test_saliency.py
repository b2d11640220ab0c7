"""Saliencies against float64, and how they are laid out by units."""

import pytest
import torch

from halve.errors import HalveError
from halve.model.layers import matrix_view
from halve.order.saliency import by_unit, saliencies


def test_saliencies_are_the_geometric_mean_of_two_costs():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 12, generator=generator), torch.randn(100, 12, generator=generator)
    gram = inputs.T @ inputs / 100
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(12, dtype=torch.float64)
    scale = (gram.double().diagonal() / torch.linalg.inv(damped).diagonal()).sqrt()
    wanted = weight.double().square() * scale
    torch.testing.assert_close(saliencies(weight, gram).double(), wanted / wanted.max(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_saliencies_do_not_overflow(size):
    weight = size * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found = saliencies(weight, torch.eye(8))
    assert bool(found.isfinite().all())
    assert float(found.max()) == 1.0


def test_a_gram_matrix_of_zeros_is_refused():
    with pytest.raises(HalveError, match="mean diagonal"):
        saliencies(torch.ones(2, 4), torch.zeros(4, 4))


def test_columns_are_laid_out_by_unit():
    matrix = torch.arange(2 * 12.0).view(2, 12)  # 2 units of 2 heads of 3 channels
    laid = by_unit(matrix, units=2, repeats=2)
    assert laid.shape == (2, 3, 4)
    assert laid[1, 2].tolist() == [8.0, 20.0, 11.0, 23.0]


def test_a_channel_has_its_saliencies_at_every_tap():
    kernel = torch.arange(2 * 4 * 3 * 3.0).view(2, 4, 3, 3)
    laid = by_unit(matrix_view(kernel, None, "conv"), units=2, repeats=1, taps=9)
    assert laid.shape == (2, 2, 18)
    for unit in range(2):
        for channel in range(2):
            wanted = kernel[:, 2 * unit + channel].flatten().tolist()
            assert sorted(laid[unit, channel].tolist()) == sorted(wanted)
