"""Random matrices in a pattern, and what it means that two have the same bits."""

import pytest
import torch

from halve.maths.pattern import Pattern, apply_mask
from halve.runtime.packed_matrix import DTYPES

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


PATTERNS = ("2:4", "1:2", "1:4", "3:4", "4:8", "2:8", "5:12", "16:32", "50%", "90.5%")


def pruned(d_out, d_in, pattern, dtype=torch.bfloat16, seed=0, empty=0.2):
    """A random matrix in the pattern; that share of its kept weights is zero too."""
    generator = torch.Generator().manual_seed(seed)
    weight = Pattern(pattern).project(torch.randn(d_out, d_in, generator=generator))
    return apply_mask(weight, torch.rand(d_out, d_in, generator=generator) >= empty).to(dtype)


def bits(tensor):
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
SMALLEST = {torch.bfloat16: 1e-38, torch.float16: 2**-25, torch.float32: 1e-38}


def assert_close(got, x, weight, bias=None):
    """Hold `got` to float64, within what summing in float32 in any order and rounding once may miss."""
    x, weight = x.double(), weight.double()
    exact, magnitude = x @ weight.T, x.abs() @ weight.T.abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    summed = (weight.shape[1] + 1) * 2**-24 * magnitude
    allowed = summed + UNIT[got.dtype] * (exact.abs() + summed) + SMALLEST[got.dtype]
    assert ((got.double() - exact).abs() <= allowed).all()
