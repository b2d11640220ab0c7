import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError
from halve.maths.gram import GramAccumulator, Statistics
from halve.solve import methods
from halve.solve.conditioning import check_weight, checked_statistics, into_range, times_power_of_two
from halve.solve.matrix import prune_weights
from halve.solve.outcome import Status
from pruned_matrices import with_gradient

METHODS = list(methods.METHODS)
OPTIONS = {"prox-gradient": {"beta": 1.15}}


def layer(seed=0, d_in=32):
    """A layer whose largest weight and largest mean square lie just below 1."""
    weight, gram = oracle.layer(6, d_in, seed=seed)
    return weight / weight.abs().amax() * 0.9, gram / gram.diagonal().amax() * 0.9


def prune(weight, gram, method, refit="cg"):
    extra = {**OPTIONS.get(method, {}), **with_gradient(method, [weight], gram)}
    return prune_weights([weight], gram, "2:4", method, refit, **extra)[0]


@pytest.mark.parametrize("refit", ["none", "cg", "gd", "swap"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("of_weight", "of_gram"), [(100, 0), (-100, 0), (0, 100), (0, -100), (100, 100), (-100, -100)])
def test_powers_of_two_change_nothing(method, refit, of_weight, of_gram):
    weight, gram = layer()
    plain = prune(weight, gram, method, refit)
    scaled = prune(times_power_of_two(weight, of_weight), times_power_of_two(gram, of_gram), method, refit)
    assert torch.equal(scaled.weight, times_power_of_two(plain.weight, of_weight))
    facts = {name: value for name, value in plain.facts.items() if name != "seconds"}
    assert facts == {name: value for name, value in scaled.facts.items() if name != "seconds"}
    assert 0.0 < facts["relative_loss"] < 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1e35), (torch.float32, 1e-40), (torch.float64, 1e250)])
def test_the_ends_of_every_dtype(method, dtype, scale):
    weight, gram = layer(seed=1)
    weight = (weight.double() * scale).to(dtype)
    outcome = prune(weight, gram, method)
    assert outcome.status is Status.OK
    assert outcome.weight.dtype == dtype
    assert bool(((outcome.weight.double().view(6, 8, 4) != 0).sum(-1) <= 2).all())
    true = oracle.relative_loss(outcome.weight.double() / scale, weight.double() / scale, gram)
    assert outcome.facts["relative_loss"] == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-200, 1e-50, 1e40, 1e300])
def test_a_gram_matrix_beyond_float32_is_as_good_as_another(scale):
    weight, gram = layer(seed=2)
    found, expected = prune(weight, gram.double() * scale, "wanda"), prune(weight, gram, "wanda")
    assert torch.equal(found.weight != 0, expected.weight != 0)
    assert found.facts["relative_loss"] == pytest.approx(expected.facts["relative_loss"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_a_refit_would_raise_to_infinity_fail_and_stay(dtype):
    shared = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    x = shared + 0.01 * torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.full((4, 16), 2.9e38).to(dtype)
    outcome = prune(weight, x.mT @ x / 200, "auto")
    assert outcome.status is Status.FAILED
    assert "not finite" in outcome.reason
    assert torch.equal(outcome.weight, weight)


def test_a_failure_returns_the_weights_as_they_were():
    weight = layer()[0] * 1e30
    outcome = prune(weight, torch.zeros(32, 32), "sparsegpt")
    assert outcome.status is Status.FAILED
    assert torch.equal(outcome.weight, weight)


def test_ordinary_problems_are_left_alone_and_others_scaled_with_all_they_have():
    weight, _ = layer()
    accumulator = GramAccumulator(32, halves=True)
    x = oracle.correlated_inputs(100, 32, seed=3).float()
    accumulator.add(x, 2 * x)
    stats = accumulator.finish()
    same = into_range(weight, stats)
    assert (same[0] is weight, same[1] is stats, same[2]) == (True, True, 0)
    accumulator = GramAccumulator(32, halves=True)
    accumulator.add(x * 2.0**50, 2 * x * 2.0**50)
    tall = into_range(weight, accumulator.finish())[1]
    factor = tall.gram[0, 0] / stats.gram[0, 0]
    assert float(torch.frexp(factor)[0]) == 0.5
    assert 0.25 < float(tall.gram.diagonal().amax()) < 2.0
    for one, other in (
        (tall.gram, stats.gram),
        (tall.cross, stats.cross),
        *zip(tall.halves, stats.halves, strict=True),
    ):
        assert torch.equal(one, other * factor)
    assert into_range(torch.zeros(2, 4), None)[1:] == (None, 0)
    assert into_range(torch.zeros(2, 4), Statistics(torch.zeros(4, 4), 1))[2] == 0


def eigen(d, least, seed):
    """A symmetric matrix with eigenvalues from ``least`` to 1."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    matrix = q * torch.linspace(least, 1.0, d, dtype=torch.float64) @ q.mT
    return (matrix + matrix.mT) / 2


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_indefinite_matrices_are_refused(scale):
    weight = torch.ones(2, 24)
    for seed in range(20):
        with pytest.raises(InputError, match="gram is not positive semi-definite: it must be XᵀX / tokens"):
            checked_statistics(eigen(24, -0.05, seed) * scale, weight, None)
        trusted = Statistics(eigen(24, -0.05, seed).float(), 5)
        assert checked_statistics(trusted, weight, None).tokens == 5
    beside_a_dead_feature = torch.eye(24)
    beside_a_dead_feature[3, 3] = 0.0
    beside_a_dead_feature[3, 4] = beside_a_dead_feature[4, 3] = 5e-5
    with pytest.raises(InputError, match="semi-definite"):
        checked_statistics(beside_a_dead_feature, weight, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gram_matrices_of_every_rank_are_accepted_however_rounded(dtype):
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        d = int(torch.randint(4, 200, (), generator=generator))
        tokens = int(torch.randint(1, 2 * d, (), generator=generator))
        x = oracle.correlated_inputs(tokens, d, seed)
        x = (x / x.abs().amax()).to(dtype)
        gram = (x.mT @ x / tokens).to(dtype)
        assert checked_statistics(gram, torch.ones(1, d), tokens).gram.dtype == torch.float32
    assert not checked_statistics(torch.zeros(8, 8, dtype=dtype), torch.ones(1, 8), 1).gram.any()


def test_weights_that_are_none_are_refused():
    check_weight(torch.ones(1, 4))
    with pytest.raises(InputError, match="weight has NaN or infinity, first at row 0, column 2"):
        check_weight(torch.tensor([[1.0, 2.0, float("inf"), float("nan")]]))
