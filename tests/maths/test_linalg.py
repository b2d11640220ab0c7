import math

import pytest
import torch

from halve.errors import FactorisationError, InputError
from halve.maths import linalg
from halve.maths.linalg import damped_cholesky, full_precision, is_finite, lower_inverse

RUNGS = [(step, dtype) for step in (1.0, 10.0, 100.0) for dtype in (torch.float32, torch.float64)]


def random_psd(seed):
    """Random rank 0..d, condition number up to 1e20, scale 1e-30..1e30."""
    generator = torch.Generator().manual_seed(seed)
    d = int(torch.randint(1, 25, (1,), generator=generator))
    rank = int(torch.randint(0, d + 1, (1,), generator=generator))
    q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q[:, :rank]
    exponents = -20 * torch.rand(rank, generator=generator, dtype=torch.float64)
    exponents[:1] = 0.0
    scale = 10.0 ** float(60 * torch.rand(1, generator=generator) - 30)
    return (q * 10.0**exponents @ q.mT * scale).float()


def check_factor(factor, gram, expected_damping=None):
    """L Lᵀ = H + δ I in float64, to the rounding of the factor's precision and of float32 input."""
    if expected_damping is not None:
        assert factor.damping_used == pytest.approx(expected_damping, rel=1e-6)
    lower = factor.lower.double()
    damped = gram.double() + factor.damping_used * torch.eye(len(gram), dtype=torch.float64)
    assert factor.lower.dtype == factor.dtype
    assert bool((lower.diagonal() > 0).all())
    assert torch.equal(lower, lower.tril())
    tolerance = 1e-5 if factor.dtype == torch.float32 else 1e-7
    assert float((lower @ lower.mT - damped).abs().max()) <= tolerance * float(damped.diagonal().max())


def test_every_random_matrix_is_factorised_or_refused():
    refused = 0
    for seed in range(1000):
        gram = random_psd(seed)
        mean = float(gram.double().diagonal().mean())
        if mean == 0.0:
            refused += 1
            with pytest.raises(FactorisationError, match="positive mean diagonal"):
                damped_cholesky(gram, 0.01)
            continue
        factor = damped_cholesky(gram, 0.01)
        assert factor.rungs == 0
        check_factor(factor, gram, 0.01 * mean)
    assert 10 < refused < 300


@pytest.mark.parametrize("damping", [1e-10, 1e-7, 1e-5])
def test_tiny_damping_of_singular_matrices_climbs_the_ladder(damping):
    climbed = 0
    for seed in range(200):
        gram = random_psd(seed)
        if float(gram.diagonal().sum()) > 0.0:
            factor = damped_cholesky(gram, damping)
            climbed += factor.rungs > 0
            if not factor.clipped:
                check_factor(factor, gram)
    assert climbed > 0 if damping < 1e-6 else climbed < 20


@pytest.mark.parametrize("failures", range(7))
def test_each_rung_gives_its_own_matrix(monkeypatch, failures):
    gram = random_psd(3) + 0.0
    attempts = []
    real = linalg._cholesky

    def failing(matrix):
        attempts.append(matrix.dtype)
        return None if len(attempts) <= failures else real(matrix)

    monkeypatch.setattr(linalg, "_cholesky", failing)
    factor = damped_cholesky(gram, 0.01)
    step, dtype = RUNGS[failures] if failures < 6 else (1.0, torch.float64)
    assert factor.rungs == failures
    assert factor.dtype == dtype
    assert factor.clipped == (failures == 6)
    assert attempts == [dtype for _, dtype in RUNGS[: failures + 1]]
    check_factor(factor, gram, step * 0.01 * float(gram.double().diagonal().mean()))


def test_indefinite_matrix_ends_at_clipped_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.linspace(-5.0, 10.0, 12, dtype=torch.float64)
    gram = q * eigenvalues @ q.mT
    factor = damped_cholesky(gram, 0.01)
    assert factor.clipped
    assert factor.rungs == 6
    damping = 0.01 * float(gram.diagonal().mean())
    expected = q * (eigenvalues.clamp_min(0.0) + damping) @ q.mT
    assert torch.allclose(factor.lower @ factor.lower.mT, expected, atol=1e-10)
    assert bool((factor.lower.diagonal() > 0).all())


def test_the_end_of_the_ladder_is_an_error(monkeypatch):
    monkeypatch.setattr(linalg, "_cholesky", lambda matrix: None)
    monkeypatch.setattr(linalg, "_cholesky_by_eigenvalues", lambda matrix, damping: None)
    with pytest.raises(FactorisationError, match=r"3x3 matrix could not be factorised with damping up to 1 "):
        damped_cholesky(torch.eye(3), 0.01)


def test_eigenvalue_rung_reports_failure(monkeypatch):
    def broken(matrix):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    assert linalg._cholesky_by_eigenvalues(torch.eye(3, dtype=torch.float64), 0.01) is None


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_first_rung_does_not_overflow_or_underflow(scale):
    gram = random_psd(3).double()
    gram *= scale / gram.diagonal().mean()
    factor = damped_cholesky(gram, 0.01)
    assert factor.rungs == 0
    assert factor.damping_used == pytest.approx(0.01 * scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_matrix_is_refused(bad):
    gram = torch.eye(3)
    gram[0, 1] = bad
    with pytest.raises(FactorisationError, match="finite"):
        damped_cholesky(gram, 0.01)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.inf, math.nan])
def test_bad_damping_is_refused(damping):
    with pytest.raises(InputError, match="damping must be a positive fraction"):
        damped_cholesky(torch.eye(2), damping)


def test_full_precision_switches_back_even_after_an_error():
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double()
    try:
        backend.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision():
                product = x @ x
            with pytest.raises(ZeroDivisionError), full_precision():
                _ = 1 / 0
            assert (x @ x).dtype == torch.bfloat16
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    assert product.dtype == torch.float32
    assert float((product - exact).abs().max()) < 1e-3


def test_full_precision_is_of_convolutions_too():
    backends = torch.backends.mkldnn.conv, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    with full_precision():
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in backends] == before


@pytest.mark.parametrize("d", [1, 2, 64, 65, 131, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-14)])
def test_the_inverse_by_halves_is_the_inverse(d, dtype, tolerance):
    generator = torch.Generator().manual_seed(d)
    samples = torch.randn(3 * d, d, generator=generator, dtype=torch.float64)
    lower = torch.linalg.cholesky(samples.mT @ samples / (3 * d))
    inverse = lower_inverse(lower.to(dtype))
    exact = torch.linalg.inv(lower)
    assert inverse.dtype == dtype
    assert torch.equal(inverse, inverse.tril())
    assert float((inverse - exact).abs().max() / exact.abs().max()) < tolerance


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)], ids=str)
def test_finite_is_what_has_no_nan_and_no_infinity(dtype, shape):
    largest = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)  # whose sum may overflow
    assert is_finite(largest)
    assert is_finite(torch.zeros(shape, dtype=dtype))
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = largest.double()
        spoilt.flatten()[-1:] = bad
        spoilt = spoilt.to(dtype)
        assert is_finite(spoilt) == bool(spoilt.float().isfinite().all())  # float8 has no infinity
        assert dtype == torch.float8_e4m3fn or not is_finite(spoilt)


def test_every_part_and_every_view_is_looked_at(monkeypatch):
    monkeypatch.setattr(linalg, "_AT_ONCE", 5)
    matrix = torch.zeros(6, 4)
    assert is_finite(matrix)
    assert is_finite(matrix.mT)
    for place in range(24):
        spoilt = matrix.clone()
        spoilt.view(-1)[place] = math.nan
        assert not is_finite(spoilt)
        assert not is_finite(spoilt.mT)


def test_infinities_that_cancel_are_not_finite():
    assert not is_finite(torch.tensor([[math.inf, -math.inf]]))
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.ones(3, dtype=torch.int64))
