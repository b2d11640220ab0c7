import pytest
import torch

import layer_oracles as oracle
from halve.errors import CalibrationError
from halve.maths import quadratic
from halve.maths.quadratic import (
    Scaled,
    dead_features,
    feature_scales,
    relative_loss,
    row_losses,
    spectral_bound,
)


@pytest.fixture
def problem():
    original, gram = oracle.layer(12, 32, seed=0)
    weight = original * (torch.rand(12, 32, generator=torch.Generator().manual_seed(9)) > 0.5)
    return weight, original, gram


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_losses_match_float64_at_any_scale(problem, scale):
    weight, original, gram = problem
    expected = oracle.row_losses(weight, original, gram) * scale
    total = oracle.row_losses(0 * original, original, gram) * scale
    assert torch.allclose(row_losses(weight, original, gram * scale), expected, rtol=1e-5, atol=0)
    assert relative_loss(weight, original, gram * scale) == pytest.approx(float(expected.sum() / total.sum()), rel=1e-5)


def test_loss_is_that_of_the_outputs():
    x = oracle.correlated_inputs(200, 16, seed=1)
    original = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    weight = torch.zeros_like(original)
    weight[:, ::2] = original[:, ::2]
    lost = (x @ (weight - original).double().mT).square().sum() / (x @ original.double().mT).square().sum()
    assert relative_loss(weight, original, (x.mT @ x).float()) == pytest.approx(float(lost), rel=1e-5)


def test_extremes_of_the_relative_loss(problem):
    _, original, gram = problem
    assert relative_loss(original, original, gram) == 0.0
    assert relative_loss(torch.zeros_like(original), original, gram) == pytest.approx(1.0)
    zero = torch.zeros_like(original)
    assert relative_loss(zero, zero, gram) == 0.0
    assert relative_loss(zero, original, torch.zeros_like(gram)) == 0.0
    assert relative_loss(original, zero, gram) == float("inf")


def test_scaling_has_unit_diagonal_and_rows_of_mean_magnitude_one(problem):
    weight, original, gram = problem
    scaled = Scaled.of(original, gram)
    assert torch.allclose(scaled.gram.diagonal(), torch.ones(32), atol=1e-6)
    assert torch.allclose(scaled.weight.abs().mean(-1), torch.ones(len(original)), rtol=1e-6)
    expected = (original.double() * gram.double().diagonal().sqrt()).abs().mean(-1, keepdim=True)
    assert torch.allclose(scaled.scale.double(), expected, rtol=1e-6)
    assert torch.allclose(scaled.restore(scaled.apply(weight)), weight, rtol=1e-6, atol=0)
    ours = oracle.row_losses(scaled.apply(weight), scaled.weight, scaled.gram) * scaled.scale.flatten() ** 2
    assert torch.allclose(ours, oracle.row_losses(weight, original, gram), rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_scaled_problem_does_not_depend_on_units(problem, factor):
    _, original, gram = problem
    one, other = Scaled.of(original, gram), Scaled.of(original, gram * factor)
    assert torch.allclose(one.weight, other.weight, rtol=1e-5)
    assert torch.allclose(one.gram, other.gram, atol=1e-5)


def test_a_row_is_scaled_alike_whatever_stands_beside_it(problem):
    _, original, gram = problem
    whole = Scaled.of(original, gram)
    assert torch.equal(Scaled.of(original[3:5], gram).weight, whole.weight[3:5])


def test_dead_features_are_floored_and_come_back_untouched(problem):
    _, original, gram = problem
    gram[4], gram[:, 4] = 0.0, 0.0
    assert dead_features(gram).nonzero().flatten().tolist() == [4]
    floor = (1e-10 * gram.double().diagonal().mean()).sqrt()
    assert float(feature_scales(gram)[4]) == pytest.approx(float(floor), rel=1e-5)
    scaled = Scaled.of(original, gram)
    assert bool(torch.isfinite(scaled.gram).all())
    assert bool(torch.isfinite(scaled.weight).all())
    assert bool(scaled.weight[:, 4].abs().max() < scaled.weight[:, :4].abs().min())
    moved = scaled.weight * 1.5
    moved[2, 4] = 0.0
    restored = scaled.restore(moved)
    assert torch.equal(restored[3:, 4], original[3:, 4])
    assert restored[2, 4] == 0.0


def test_restored_zeros_are_positive():
    scaled = Scaled.of(torch.ones(1, 4), torch.eye(4))
    assert not bool(torch.signbit(scaled.restore(torch.tensor([[-0.0, 1.0, -0.0, 1.0]]))).any())


def test_zero_weight_and_zero_gram():
    assert torch.equal(Scaled.of(torch.zeros(2, 4), torch.eye(4)).scale, torch.ones(2, 1))
    with pytest.raises(CalibrationError, match="Gram matrix is zero"):
        Scaled.of(torch.ones(2, 4), torch.zeros(4, 4))


def test_spectral_bound_is_above_and_close():
    ratios = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        d = int(torch.randint(1, 200, (1,), generator=generator))
        tokens = int(torch.randint(1, 3 * d + 1, (1,), generator=generator))
        x = oracle.correlated_inputs(tokens, d, seed) if seed % 2 else torch.randn(tokens, d, generator=generator)
        gram = Scaled.of(torch.ones(1, d), (x.mT @ x / tokens).float()).gram
        true = float(torch.linalg.eigvalsh(gram.double())[-1])
        ratios.append(spectral_bound(gram) / true)
    assert min(ratios) >= 1.0
    assert max(ratios) <= 1.02
    assert sorted(ratios)[len(ratios) // 2] <= 1.01


@pytest.mark.parametrize("columns", [1, 2])
def test_spectral_bound_stays_above_from_a_poor_estimate(columns):
    for seed in range(20):
        x = torch.randn(150, 100, generator=torch.Generator().manual_seed(seed))
        gram = x.mT @ x / 150
        true = float(torch.linalg.eigvalsh(gram.double())[-1])
        assert true <= spectral_bound(gram, columns=columns, powers=1) <= 1.6 * float(gram.abs().sum(-1).max())


def test_spectral_bound_of_simple_matrices():
    assert spectral_bound(torch.eye(50)) == pytest.approx(1.0, rel=0.01)
    assert spectral_bound(torch.ones(50, 50)) == pytest.approx(50.0, rel=0.01)
    assert spectral_bound(torch.ones(1, 1)) == pytest.approx(1.0, rel=0.01)
    assert spectral_bound(torch.zeros(8, 8)) == 0.0
    assert spectral_bound(torch.eye(50)) >= 1.0
    assert spectral_bound(torch.ones(50, 50)) >= 50.0


@pytest.mark.parametrize("d_in", [64, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slope_steps_along_the_gradient_whatever_the_products_dtype(monkeypatch, d_in, dtype):
    monkeypatch.setattr(quadratic, "compute_dtype", lambda _device: dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * d_in, d_in, generator=generator)
    gram = x.T @ x / len(x)
    target = torch.randn(8, d_in, generator=generator)
    weight = target + 0.01 * torch.randn(8, d_in, generator=generator)
    slope = quadratic.Slope(gram, -0.5)
    assert slope.dtype == (dtype if d_in >= 256 else torch.float32)
    moved = slope.step(weight, target).double() - weight.double()
    expected = -0.5 * (weight.double() - target.double()) @ gram.double()
    assert float((moved - expected).norm() / expected.norm()) < (1e-4 if slope.dtype == torch.float32 else 6e-3)
