import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halve.errors import InputError
from halve.maths import grid
from halve.maths.grid import LARGEST, LOWEST, nearest, recovered, rounded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
every_width = pytest.mark.parametrize("bits", [8, 4])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every_width
def test_each_integer_is_the_nearest_there_is(bits):
    weights = random(40, 16)
    integers, scales = nearest(weights, bits)
    grid = torch.arange(LOWEST[bits], LARGEST[bits] + 1).double()
    for row in range(40):
        points = grid * float(scales[row])
        best = (weights[row].double().unsqueeze(-1) - points).abs().min(-1).values
        off = (integers[row].double() * float(scales[row]) - weights[row].double()).abs()
        torch.testing.assert_close(off, best, rtol=1e-5, atol=1e-7)


def test_four_bits_are_never_further_off_than_with_the_plain_scale():
    weights = random(200, 32, seed=1)
    integers, scales = nearest(weights, 4)
    off = (integers * scales.unsqueeze(-1).float() - weights).square().sum(-1)
    plain = (weights.abs().amax(-1, keepdim=True) / 7).half().float()
    without = ((weights / plain).round() * plain - weights).square().sum(-1)
    assert (off <= without * (1 + 1e-3)).all()
    assert off.mean() < 0.9 * without.mean()


def test_important_weights_are_rounded_less():
    weights, importance = random(300, 32, seed=2), random(300, 32, seed=3).exp()

    def loss(integers, scales):
        return (importance * (integers * scales.unsqueeze(-1).float() - weights).square()).sum(-1).mean()

    assert loss(*nearest(weights, 4, importance)) < 0.95 * loss(*nearest(weights, 4))


@every_width
def test_zeros_have_no_scale_and_huge_weights_are_refused(bits):
    integers, scales = nearest(torch.zeros(2, 8), bits)
    assert not integers.any()
    assert not scales.any()
    assert not rounded(torch.ones(2, 8), torch.zeros(2, dtype=torch.float16), bits).any()
    with pytest.raises(InputError, match=r"not finite, or too large to be quantised: their scale is beyond float16"):
        nearest(torch.full((1, 8), 1e9), bits)


@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-5, 1e-3, 0.1, 10.0]),
    largest=st.integers(1, 8),
)
def test_what_was_made_of_integers_is_recovered_to_the_bit(seed, dtype, size, largest):
    generator = torch.Generator().manual_seed(seed)
    scales = (size * (0.5 + torch.rand(20, generator=generator))).half()
    integers = torch.randint(-largest, min(largest, 7) + 1, (20, 32), generator=generator, dtype=torch.int8)
    weights = (integers.float() * scales.unsqueeze(-1).float()).to(dtype)
    found, of_rows, known = recovered(weights)
    assert known.all()
    assert torch.equal((found.float() * of_rows.unsqueeze(-1).float()).to(dtype), weights)
    again = recovered((found.float() * of_rows.unsqueeze(-1).float()).to(dtype))
    assert torch.equal(again[0], found)
    assert torch.equal(again[1], of_rows)


def test_where_no_row_lies_on_a_grid_only_zeros_do():
    weights = random(200, 32).bfloat16()
    weights[5] = 0.0
    *_, known = recovered(weights)
    assert known.nonzero().flatten().tolist() == [5]


def test_many_rows_off_the_grid_do_not_hide_those_on_it():
    integers = torch.randint(-8, 8, (500, 32), generator=torch.Generator().manual_seed(0))
    weights = torch.cat([random(2000, 32), integers * torch.tensor(0.01).half().float()]).bfloat16()
    *_, known = recovered(weights)
    assert known[2000:].all()
    assert not known[:2000].any()


def test_a_row_off_the_grid_is_told_from_the_others():
    scale = torch.tensor(0.01).half().float()
    rows = torch.tensor(list(itertools.islice(itertools.cycle(range(-8, 8)), 32))).float().repeat(100, 1)
    weights = (rows * scale).bfloat16()
    weights[70, 3] *= 1.1
    *_, known = recovered(weights)
    assert (~known).nonzero().flatten().tolist() == [70]


@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([3e-4, 1e-3, 0.1, 10.0, 1000.0]),
    largest=st.integers(1, 8),
    noise=st.sampled_from([0.0, 1e-4, 2e-3]),
)
def test_intervals_leave_what_trying_every_scale_finds(seed, dtype, size, largest, noise):
    generator = torch.Generator().manual_seed(seed)
    scales = (size * (0.5 + torch.rand(40, generator=generator))).half()
    integers = torch.randint(-largest, min(largest, 7) + 1, (40, 1 + seed % 32), generator=generator)
    weights = integers.float() * scales.unsqueeze(-1).float()
    weights = (weights * (1 + noise * torch.randn(weights.shape, generator=generator))).to(dtype)
    weights = weights[(weights != 0).any(-1) & (weights.abs().amax(-1) >= 2**-10)]
    asked = weights, weights.float(), weights.float().abs().amax(-1)
    for found, expected in zip(grid._among_intervals(*asked), grid._among_all(*asked), strict=True):
        assert torch.equal(found, expected)
