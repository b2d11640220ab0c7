"""How far tensors are from others."""

import torch

from halve.order.trial import unlike


def test_nothing_but_zeros_is_like_zeros():
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert unlike([zeros], [zeros]) == 0.0
    assert unlike([1e-3 * ones], [zeros]) == float("inf")
    assert unlike([1.5 * ones], [ones]) == 0.5
