from dataclasses import replace

import pytest
import torch

import layer_oracles as oracle
from halve.errors import CalibrationError, FactorisationError, InputError
from halve.maths.gram import Statistics
from halve.solve import dense_target as module
from halve.solve.dense_target import dense_target


def streams(tokens=200, d_in=16, seed=0, noise=0.3):
    """The inputs in the dense and in the pruned model, the latter with an error that depends on the former."""
    x = oracle.correlated_inputs(tokens, d_in, seed=seed)
    mixing = torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(seed + 7), dtype=torch.float64)
    scales = x.square().mean(0).sqrt()
    error = torch.tanh(x / scales @ mixing / d_in**0.5)
    return x, x + noise * error * scales


def statistics(x, noisy):
    return Statistics((noisy.mT @ noisy / len(x)).float(), len(x), cross=(x.mT @ noisy / len(x)).float())


def weights(rows=6, d_in=16, seed=1):
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed)) * 0.05


def expected_target(weight, x, noisy, blend, ridge):
    """Least squares on the stacked system, in float64: blended outputs above, the ridge's rows below."""
    tokens, weight = len(x), weight.double()
    scales = noisy.square().mean(0).sqrt()
    outputs = ((1 - blend) * noisy + blend * x) @ weight.mT
    # The ridge's pull does not grow with the blend: W_t - W0 is α times the correction for α = 1.
    above = torch.cat([noisy / tokens**0.5, ridge**0.5 * torch.diag(scales)])
    below = torch.cat([outputs / tokens**0.5, ridge**0.5 * torch.diag(scales) @ weight.mT])
    return torch.linalg.lstsq(above, below).solution.mT


@pytest.mark.parametrize("blend", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_solves_the_stacked_least_squares_problem_of_the_raw_inputs(blend, ridge):
    x, noisy = streams()
    target = dense_target(weights(), statistics(x, noisy), blend, ridge)
    expected = expected_target(weights(), x, noisy, blend, ridge)
    assert float((target.double() - expected).norm() / (expected - weights().double()).norm()) < 1e-3
    assert float((expected - weights().double()).norm() / weights().double().norm()) > 0.01


def test_no_blend_and_no_dense_inputs_return_the_very_weight():
    weight, stats = weights(), statistics(*streams())
    assert dense_target(weight, stats, 0.0, 0.1) is weight
    assert dense_target(weight, replace(stats, cross=None), 1.0, 0.1) is weight


def test_a_huge_ridge_stays_with_the_dense_weights():
    weight, stats = weights(), statistics(*streams())
    moved = [float((dense_target(weight, stats, 1.0, ridge) - weight).norm()) for ridge in (1e-3, 0.1, 10.0, 1e6)]
    assert moved == sorted(moved, reverse=True)
    torch.testing.assert_close(dense_target(weight, stats, 1.0, 1e6), weight, rtol=1e-4, atol=1e-6)


def test_a_tiny_ridge_gives_the_projection_of_the_dense_outputs():
    x, noisy = streams(noise=0.5)
    weight = weights()
    target = dense_target(weight, statistics(x, noisy), 1.0, 1e-5)
    outputs = x @ weight.double().mT
    basis = torch.linalg.qr(noisy).Q
    projected = basis @ (basis.mT @ outputs)
    error = noisy @ target.double().mT - projected
    before = noisy @ weight.double().mT - outputs
    assert float(error.norm() / before.norm()) < 0.01
    # What is left cannot be had from the noisy inputs.
    assert float((noisy @ target.double().mT - outputs).norm()) < 0.95 * float(before.norm())


def test_equal_streams_leave_the_weights_where_they_are():
    x, _ = streams()
    torch.testing.assert_close(dense_target(weights(), statistics(x, x), 1.0, 1e-3), weights(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept_and_computed_with_in_float32(dtype):
    x, noisy = streams()
    weight = weights().to(dtype)
    target = dense_target(weight, statistics(x, noisy), 1.0, 0.1)
    assert target.dtype == dtype
    expected = expected_target(weight, x, noisy, 1.0, 0.1)
    torch.testing.assert_close(target.double(), expected, rtol=1e-2, atol=1e-4)


def test_dead_features_stay_finite_and_keep_their_weights():
    x, noisy = streams()
    x[:, 3], noisy[:, 3] = 0.0, 0.0
    target = dense_target(weights(), statistics(x, noisy), 1.0, 0.1)
    assert bool(torch.isfinite(target).all())
    assert torch.equal(target[:, 3], weights()[:, 3])


def test_features_of_any_scale_are_treated_alike():
    x, noisy = streams()
    scales = torch.logspace(-2, 2, 16, dtype=torch.float64)
    plain = dense_target(weights(), statistics(x, noisy), 1.0, 0.1)
    scaled = dense_target((weights() / scales).float(), statistics(x * scales, noisy * scales), 1.0, 0.1)
    torch.testing.assert_close((scaled * scales).float(), plain, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_solved_is_an_error(monkeypatch):
    x, noisy = streams()
    with pytest.raises(CalibrationError, match="the Gram matrix is zero"):
        dense_target(weights(), statistics(0 * x, 0 * noisy), 1.0, 0.1)
    broken = replace(statistics(x, noisy), cross=torch.full((16, 16), torch.inf))
    with pytest.raises(FactorisationError, match=r"not finite with ridge 0\.1"):
        dense_target(weights(), broken, 1.0, 0.1)
    with pytest.raises(InputError, match="positive fraction"):
        dense_target(weights(), statistics(x, noisy), 1.0, 0.0)

    def fail(gram, damping):
        raise FactorisationError("no luck")

    monkeypatch.setattr(module, "damped_cholesky", fail)
    with pytest.raises(FactorisationError, match="no luck"):
        dense_target(weights(), statistics(x, noisy), 1.0, 0.1)
