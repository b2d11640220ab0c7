import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halve.errors import InputError, PatternError
from halve.maths import kernels
from halve.maths.pattern import Pattern
from halve.maths.proximal import prox, regulariser
from oracles import brute_force_prox, elementary, prox_objective
from proximal_groups import ADVERSARIAL, face_boundaries

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = list(TOLERANCE)
OTHER_PATTERNS = {"1:2": 9, "1:4": 7, "2:3": 9, "3:4": 7, "2:5": 6, "3:5": 6, "3:6": 5, "2:8": 3, "4:8": 3, "6:8": 3}


needs_kernel = pytest.mark.skipif(not kernels.available(), reason=kernels.describe())
BACKENDS = ["reference", pytest.param("native", marks=needs_kernel)]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
PATTERNS = ["2:4", "1:4", "3:4", "2:6"]
CASES = [("2:4", "reference"), pytest.param("2:4", "native", marks=needs_kernel)] + [
    (pattern, "reference") for pattern in PATTERNS[1:]
]
each_case = pytest.mark.parametrize(("pattern", "backend"), CASES)


def solve(z: Tensor, lam: Tensor, pattern: str = "2:4", backend: str = "reference") -> Tensor:
    """Apply prox to groups (g, M) that each have their own lam, one call a distinct lam."""
    out = torch.empty_like(z)
    for value in lam.unique():
        rows = lam == value
        out[rows] = prox(z[rows], float(value), pattern, backend=backend)
    return out


def excess(w: Tensor, z: Tensor, lam: Tensor, keep: int, lowest: Tensor) -> Tensor:
    """Objective of w above the oracle's, relative to the oracle's; 0 where both are 0."""
    value = prox_objective(w, z, lam, keep)
    return torch.where(value == lowest, 0.0, (value - lowest) / lowest)


@cache
def bulk() -> tuple[Tensor, Tensor, Tensor]:
    """float32 values over lam 1e-4..1e4 and scales 1e-6..1e6, three in four where lam times scale decides the face."""
    generator = torch.Generator().manual_seed(20250118)
    blocks, size = 104, 1000

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    lam = 10 ** uniform(-4, 4, blocks, 1)
    scale = torch.cat(
        [10 ** uniform(-6, 6, blocks // 4, 1), 10 ** uniform(-3, 0.5, 3 * blocks // 4, 1) / lam[blocks // 4 :]]
    )
    z = torch.randn(blocks, size, 4, generator=generator, dtype=torch.float64)
    z[1::4] = uniform(-1, 1, *z[1::4].shape)
    z[2::4] = z[2::4].sign() * 10 ** uniform(-6, 0, *z[2::4].shape)  # entries of one group orders of magnitude apart
    z[3::4] = (z[3::4] * 3).round() / 3  # ties and zeros
    z = (z * scale[..., None]).reshape(-1, 4).float().double()
    lam = lam.repeat(1, size).reshape(-1)
    return z, lam, brute_force_prox(z, lam, 2, levels=7)[1]


@both_backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_objective_is_never_above_brute_force(dtype, backend):
    z, lam, lowest = bulk()
    assert len(z) >= 100_000
    w = solve(z.to(dtype), lam, backend=backend)
    assert excess(w, z, lam, 2, lowest).max() <= TOLERANCE[dtype]
    assert (w != 0).sum(-1).unique().tolist() == [0, 1, 2, 3, 4]


def test_brute_force_is_not_blind():
    z, lam, lowest = bulk()
    below = excess(solve(z, lam), z, lam, 2, lowest) < -1e-9
    assert below.double().mean() < 1e-3


@both_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [1e-4, 0.3, 1.0, 3.0])
def test_adversarial_groups(lam, dtype, backend):
    z = torch.cat([torch.tensor(ADVERSARIAL, dtype=torch.float64), face_boundaries()]) / lam
    z = torch.cat([z, z.roll(1, -1)]).float().double()
    strength = torch.full((len(z),), lam, dtype=torch.float64)
    _, lowest = brute_force_prox(z, strength, 2, levels=9)
    w = prox(z.to(dtype), lam, backend=backend)
    assert torch.isfinite(w).all()
    assert excess(w, z, strength, 2, lowest).max() <= TOLERANCE[dtype]


# lam, and a group in which a small Newton step on face 4 was once taken for a stationary point in float32
SMALL_STEPS = [
    (0.1, [3.706647753715515, 3.659251034259796, 5.753786563873291, 5.411409735679626]),
    (0.1, [3.390647768974304, 5.878675580024719, 3.463623821735382, 5.028820633888245]),
    (0.3, [1.2701604763666789, 1.8893925348917644, 1.8649999300638834, 1.2623212734858196]),
    (0.3, [-1.7311958471934, -1.1467087268829346, -1.1621074875195821, 1.9188759724299114]),
    (0.3, [2.0696194966634116, 1.6977504889170330, 2.1925459305445352, 1.6794951756795247]),
    (0.6, [0.6288896997769674, 0.9082724650700887, 0.6377001603444418, 0.9576682249704996]),
    (1.0, [0.3389778733253479, 0.5148298740386963, 0.5674203634262085, 0.33528804779052734]),
    (1.1, [0.5203724900645168, 0.2779874476519498, 0.4447266730395230, 0.2706244831194049]),
]


@both_backends
@pytest.mark.parametrize(("lam", "group"), SMALL_STEPS)
def test_small_newton_steps_are_not_taken_for_stationary_points(lam, group, backend):
    z = torch.tensor(group) * (1 + torch.linspace(-1e-4, 1e-4, 4001, dtype=torch.float64))[:, None]
    z = z.float()
    exact = prox_objective(prox(z.double(), lam, backend="reference"), z, lam, 2)
    assert ((prox_objective(prox(z, lam, backend=backend), z, lam, 2) - exact) <= 1e-6 * exact).all()


@both_backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_faces_that_tie(dtype, backend):
    # where a1^2 + a2^2 = 1 three non-zeros are exactly as good as two: scan across that border at lam = 1
    a = torch.tensor([0.8, 0.6, 0.4], dtype=torch.float64)
    edge = torch.stack(
        [a[0] + a[1] * a[2], a[1] + a[0] * a[2], a[2] + a[0] * a[1], torch.zeros((), dtype=torch.float64)]
    )
    z = edge * (1 + torch.linspace(-1e-2, 1e-2, 81, dtype=torch.float64))[:, None]
    z = z.float().double()
    lam = torch.ones(len(z), dtype=torch.float64)
    _, lowest = brute_force_prox(z, lam, 2, levels=13)
    w = prox(z.to(dtype), 1.0, backend=backend)
    assert excess(w, z, lam, 2, lowest).max() <= TOLERANCE[dtype]
    assert sorted(set((w != 0).sum(-1).tolist())) == [2, 3]


@pytest.mark.parametrize("share", [pytest.param(5, id="fifth"), pytest.param(1, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", OTHER_PATTERNS)
def test_other_patterns_match_brute_force(pattern, share):
    parsed = Pattern.parse(pattern)
    generator = torch.Generator().manual_seed(parsed.group * 100 + parsed.keep)
    groups = (2000 if parsed.group <= 4 else 400 if parsed.group <= 6 else 100) // share
    z = torch.randn(groups, parsed.group, generator=generator, dtype=torch.float64)
    z[groups // 2 :] **= 3
    z = z.float().double()
    lam = (10 ** (4 * torch.rand(10, generator=generator, dtype=torch.float64) - 3)).repeat_interleave(groups // 10)
    _, lowest = brute_force_prox(z, lam, parsed.keep, levels=OTHER_PATTERNS[pattern])
    for dtype in DTYPES:
        w = solve(z.to(dtype), lam, pattern).double()
        assert excess(w, z, lam, parsed.keep, lowest).max() <= TOLERANCE[dtype]
    below = excess(solve(z, lam, pattern), z, lam, parsed.keep, lowest) < -1e-9
    assert below.double().mean() <= 0.02


def test_wide_groups_are_local_minima_that_beat_projection():
    z = torch.randn(8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for pattern, lam in (("30:32", 0.5), ("3:32", 1e-3)):
        parsed = Pattern.parse(pattern)
        w = prox(z, lam, pattern)

        def value(point: Tensor, keep: int = parsed.keep, lam: float = lam) -> Tensor:
            penalty = regulariser(point, f"{keep}:32").squeeze(-1)
            return 0.5 * ((point - z) ** 2).sum(-1) + lam * penalty

        assert (value(w) <= value(parsed.project(z)) * (1 + 1e-12)).all()
        for step in (1e-3, -1e-3):
            for i in range(32):
                beside = w.clone()
                beside[:, i] += step
                assert (value(beside) >= value(w) * (1 - 1e-12)).all()


finite_entries = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 0.25, 1e-3, 1e-6, 3.0]),
)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(finite_entries, min_size=4, max_size=4), min_size=1, max_size=6),
    st.floats(-4, 4),
    st.sampled_from(["2:4", "1:4", "3:4"]),
)
def test_any_group_matches_brute_force(rows, log_lam, pattern):
    z = torch.tensor(rows, dtype=torch.float32).double()
    z = torch.where(z.abs() < 1e-6, 0.0, z)
    keep = Pattern.parse(pattern).keep
    lam = torch.full((len(z),), 10**log_lam, dtype=torch.float64)
    _, lowest = brute_force_prox(z, lam, keep, levels=5)
    for dtype in DTYPES:
        for backend in ("reference", "auto"):
            w = prox(z.to(dtype), 10**log_lam, pattern, backend=backend)
            assert excess(w, z, lam, keep, lowest).max() <= TOLERANCE[dtype]


def random_groups(pattern: str, seed: int = 0) -> Tensor:
    size = Pattern.parse(pattern).group
    return torch.randn(300, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each_case
@pytest.mark.parametrize("lam", [0.01, 0.3, 2.0])
def test_equivariance(pattern, backend, lam):
    z = random_groups(pattern)

    def solved(z: Tensor, lam: float) -> Tensor:
        return prox(z, lam, pattern, backend=backend)

    w = solved(z, lam)
    sign = torch.randn(z.shape, generator=torch.Generator().manual_seed(9)).sign().double()
    torch.testing.assert_close(solved(z * sign, lam), w * sign, rtol=0, atol=0)
    order = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(solved(z[:, order], lam), w[:, order], rtol=0, atol=0)
    keep = Pattern.parse(pattern).keep
    for c in (0.25, 4.0, 1e3):
        torch.testing.assert_close(solved(c * z, lam), c * solved(z, lam * c ** (keep - 1)), rtol=1e-9, atol=1e-9)


@each_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_shrinks_and_keeps_sign_and_order(pattern, backend, dtype):
    z = random_groups(pattern, 3).to(dtype)
    for lam in (1e-3, 0.3, 1.0):
        w = prox(z, lam, pattern, backend=backend)
        assert (w * z >= 0).all()
        assert (w.abs() <= z.abs()).all()
        by_z = w.abs().gather(-1, z.abs().argsort(-1, descending=True))
        assert (by_z.diff(dim=-1) <= 0).all()


@each_case
def test_larger_lam_never_has_a_larger_regulariser(pattern, backend):
    # of two global minimisers the one with the larger weight on r has the smaller r
    z = random_groups(pattern, 5)
    lams = (0.0, 0.01, 0.1, 0.3, 0.6, 1.0, 2.0, 5.0)
    values = torch.stack([regulariser(prox(z, lam, pattern, backend=backend), pattern) for lam in lams])
    assert (values.diff(dim=0) <= 1e-12).all()
    assert (values[0] > values[3]).all()


@each_case
def test_reaches_the_projection_for_large_lam(pattern, backend):
    z = random_groups(pattern, 6)
    w = prox(z, 1e6, pattern, backend=backend)
    torch.testing.assert_close(w, Pattern(pattern).project(z), rtol=0, atol=0)


@each_case
def test_lam_zero_returns_z(pattern, backend):
    z = random_groups(pattern)
    z[0] = -0.0
    w = prox(z, 0.0, pattern, backend=backend)
    assert torch.equal(w, z)
    assert not torch.signbit(w[0]).any()
    assert w.data_ptr() != z.data_ptr()


@each_case
@pytest.mark.parametrize("lam", [0.5, 50.0])
def test_zeros_are_positive(pattern, backend, lam):
    z = random_groups(pattern)
    z[::3] = -z[::3].abs()
    z[1::5, 1:] = -0.0
    w = prox(z, lam, pattern, backend=backend)
    assert not torch.signbit(w[w == 0]).any()
    assert (w == 0).any()


@each_case
def test_ties_keep_the_lowest_index(pattern, backend):
    parsed = Pattern.parse(pattern)
    z = torch.full((1, parsed.group), -3.0)
    expected = [-3.0] * parsed.keep + [0.0] * (parsed.group - parsed.keep)
    assert prox(z, 10.0, pattern, backend=backend).tolist() == [expected]
    if pattern == "2:4":
        z = torch.tensor([[1.0, 2.0, 2.0, 3.0], [2.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 1.0]])
        expected = [[0.0, 2.0, 0.0, 3.0], [2.0, 0.0, 2.0, 0.0], [1.0, 0.0, 2.0, 0.0]]
        assert prox(z, 10.0, backend=backend).tolist() == expected


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_in_float32(pattern, backend, dtype):
    z = torch.randn(64, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    for lam in (0.0, 0.1, 1.0):
        w = prox(z, lam, pattern, backend=backend)
        assert w.dtype == dtype
        assert torch.equal(w, prox(z.float(), lam, pattern, backend=backend).to(dtype))


@each_case
def test_shapes_views_and_chunks(pattern, backend, monkeypatch):
    z = torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(3))
    before = z.clone()
    w = prox(z, 0.5, pattern, backend=backend)
    assert torch.equal(z, before)
    assert w.shape == z.shape
    assert torch.equal(prox(z.transpose(0, 1), 0.5, pattern, backend=backend), w.transpose(0, 1))
    assert torch.equal(prox(z[..., 12:], 0.5, pattern, backend=backend), w[..., 12:])
    assert prox(z[:0], 0.5, pattern, backend=backend).shape == (0, 5, 24)
    assert regulariser(z[:0], pattern).shape == (0, 5, 24 // Pattern(pattern).group)
    monkeypatch.setattr("halve.maths.proximal._CHUNK", 7 if pattern == "2:4" else 7 * Pattern(pattern).group ** 3)
    assert torch.equal(prox(z, 0.5, pattern, backend=backend), w)


def test_no_gradient():
    assert not prox(torch.randn(2, 8, requires_grad=True), 0.5).requires_grad


@both_backends
@pytest.mark.parametrize("lam", [1e-300, 1e-44, 1e-30, 1e30, 1e44, 1e300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_strengths(lam, dtype, backend):
    scales = (1.0, 1e30, 1e-44) if dtype == torch.float32 else (1.0, 1e300, 1e-300)
    group = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64)
    z = (group * torch.tensor(scales, dtype=torch.float64)[:, None]).to(dtype)
    w = prox(z, lam, backend=backend)
    for row, scale in enumerate(scales):
        strength = lam * scale
        if strength > 1e3:
            assert torch.equal(w[row], Pattern("2:4").project(z[row]))
        elif strength < 1e-20:
            assert torch.equal(w[row], z[row])
        else:
            expected = (scale * prox(z[row].double() / scale, strength)).to(dtype)
            torch.testing.assert_close(w[row], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:4", "4:8", "7:8"])
def test_regulariser_is_the_elementary_polynomial(pattern):
    parsed = Pattern.parse(pattern)
    w = torch.randn(5, 3 * parsed.group, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    expected = elementary(w.reshape(5, 3, parsed.group), parsed.keep + 1)
    torch.testing.assert_close(regulariser(w, pattern), expected, rtol=1e-13, atol=0)
    assert regulariser(w.bfloat16(), pattern).dtype == torch.float32
    assert (regulariser(parsed.project(w), pattern) == 0).all()


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(pattern, backend, bad):
    z = torch.randn(3, 24, generator=torch.Generator().manual_seed(7))
    for at in ((0, 0), (1, 3), (2, 23)):
        broken = z.clone()
        broken[at] = bad
        for lam in (0.0, 1.0, 1e6):
            with pytest.raises(InputError, match="NaN or infinity"):
                prox(broken, lam, pattern, backend=backend)


def test_bad_input_is_named():
    z = torch.randn(2, 8)
    for lam in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="lam = "):
            prox(z, lam)
    with pytest.raises(InputError, match=r"z has dtype torch\.int64"):
        prox(torch.ones(2, 8, dtype=torch.int64), 1.0)
    with pytest.raises(InputError, match=r"weight has dtype torch\.int32"):
        regulariser(torch.ones(2, 8, dtype=torch.int32))
    for operator in (regulariser, lambda z, pattern: prox(z, 1.0, pattern)):
        with pytest.raises(PatternError, match="50% has no groups"):
            operator(z, "50%")
        with pytest.raises(PatternError, match="divisible by 4"):
            operator(z[:, :6], "2:4")
        with pytest.raises(PatternError, match="single number"):
            operator(torch.tensor(1.0), "2:4")
    with pytest.raises(InputError, match="backend 'cuda' is unknown"):
        prox(z, 1.0, backend="cuda")
    with pytest.raises(InputError, match="no kernel for 1:4"):
        prox(z, 1.0, "1:4", backend="native")
