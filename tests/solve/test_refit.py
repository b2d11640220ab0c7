from functools import partial

import pytest
import torch

import layer_oracles as oracle
from halve.errors import CalibrationError, InputError
from halve.maths.pattern import Pattern
from halve.maths.quadratic import Scaled
from halve.solve import refit as refits
from halve.solve.refit import refit_cg, refit_gd

SOLVERS = [refit_cg, refit_gd]


def masked(d_out=24, d_in=64, seed=0, tokens=None, pattern="2:4"):
    original, gram = oracle.layer(d_out, d_in, seed, tokens)
    mask = Pattern(pattern).keep_mask(original.abs() * gram.diagonal().sqrt())
    return original * mask, original, gram, mask


@pytest.mark.parametrize("seed", range(4))
def test_cg_is_within_a_thousandth_of_the_exact_optimum(seed):
    weight, original, gram, mask = masked(seed=seed)
    best = oracle.row_losses(oracle.best_on_mask(original, gram, mask), original, gram)
    fitted, facts = refit_cg(weight, original, gram, mask)
    loss = oracle.row_losses(fitted, original, gram)
    assert float(loss.sum()) <= 1.001 * float(best.sum())
    assert bool((loss <= 1.02 * best).all())
    assert float(oracle.row_losses(weight, original, gram).sum()) > 1.1 * float(best.sum())
    assert 0 < facts["refit_row_iterations"] <= facts["refit_iterations"] < 200
    assert facts["refit_unconverged_rows"] == 0


def test_cg_leaves_rows_alone_that_are_within_the_tolerance():
    weight, original, gram, mask = masked()
    fitted, _ = refit_cg(weight, original, gram, mask, tolerance=1e-6)
    mixed = torch.cat([fitted[:20], weight[20:]])
    again, facts = refit_cg(mixed, original, gram, mask, tolerance=1e-2)
    assert torch.equal(again[:20], fitted[:20])  # bit for bit
    assert facts["refit_row_iterations"] < facts["refit_iterations"]
    before, after = (oracle.row_losses(each, original, gram)[20:] for each in (mixed, again))
    assert bool((after < before).all())
    nothing, facts = refit_cg(fitted, original, gram, mask, tolerance=1e-2)
    assert torch.equal(nothing, fitted)
    assert facts["refit_iterations"] == facts["refit_kept_rows"] == 0


def test_cg_without_tolerance_reaches_the_optimum_and_stops():
    weight, original, gram, mask = masked()
    best = oracle.row_losses(oracle.best_on_mask(original, gram, mask), original, gram)
    fitted, facts = refit_cg(weight, original, gram, mask, tolerance=0.0)
    assert torch.allclose(oracle.row_losses(fitted, original, gram), best, rtol=1e-4)
    assert facts["refit_iterations"] < 500


def test_cg_result_does_not_depend_on_the_batch_or_on_packing(monkeypatch):
    weight, original, gram, mask = masked(40)
    whole, _ = refit_cg(weight, original, gram, mask)

    def check(other, part):
        # Rounding differs with the shape of a product and may make a row stop one step earlier or later.
        ours, theirs = (oracle.row_losses(w, original[part], gram) for w in (other, whole[part]))
        assert torch.allclose(ours, theirs, rtol=5e-5)
        scaled = Scaled.of(original[part], gram)
        mine, reference = scaled.apply(other), scaled.apply(whole[part])
        distance = (mine - reference).norm(dim=1) / reference.norm(dim=1)
        assert float(distance.max()) < 5e-3
        assert float(distance.median()) < 2e-4

    for part in (slice(0, 1), slice(1, 8), slice(8, 40)):
        check(refit_cg(weight[part], original[part], gram, mask[part])[0], part)
    for share in (0.0001, 2.0):
        monkeypatch.setattr(refits, "REPACK_SHARE", share)
        check(refit_cg(weight, original, gram, mask)[0], slice(0, 40))


def test_gd_is_equation_five():
    weight, original, gram, mask = masked(6, 16)
    scaled = Scaled.of(original, gram)
    target, unit = scaled.weight.double(), scaled.gram.double()
    lipschitz = torch.linalg.eigvalsh(unit)[-1]
    row = scaled.apply(weight).double()
    for _ in range(30):
        row = row - mask * ((row - target) @ unit) / lipschitz
    fitted, facts = refit_gd(weight, original, gram, mask, steps=30)
    assert torch.allclose(scaled.apply(fitted).double(), row, atol=0.02)
    assert float((scaled.apply(fitted).double() - row).norm() / (row - scaled.apply(weight)).norm()) < 0.01
    assert facts["refit_iterations"] == 30


def test_gd_approaches_the_optimum_from_above():
    weight, original, gram, mask = masked()
    best = float(oracle.row_losses(oracle.best_on_mask(original, gram, mask), original, gram).sum())
    few, many = (refit_gd(weight, original, gram, mask, steps=steps)[0] for steps in (20, 500))
    few, many = (float(oracle.row_losses(fitted, original, gram).sum()) for fitted in (few, many))
    assert best <= many * (1 + 1e-6)
    assert many < few
    assert many < 1.05 * best


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_singular_gram_is_safe(solver, tokens):
    weight, original, gram, mask = masked(tokens=tokens)
    fitted, _ = solver(weight, original, gram, mask)
    assert bool(torch.isfinite(fitted).all())
    assert not bool(fitted[~mask].any())
    assert bool((oracle.row_losses(fitted, original, gram) <= oracle.row_losses(weight, original, gram) + 1e-12).all())
    assert oracle.relative_loss(fitted, original, gram) < (1e-3 if solver is refit_cg else 0.05)


def test_cg_stops_where_an_indefinite_gram_offers_no_descent():
    gram = torch.tensor([[1.0, 1.2, 0.6, 0.1], [1.2, 1.0, -0.2, 0.3], [0.6, -0.2, 1.0, 0.0], [0.1, 0.3, 0.0, 1.0]])
    original = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False, False]])
    once, often = (refit_cg(original * mask, original, gram, mask, max_iterations=limit)[0] for limit in (1, 50))
    assert torch.equal(once, often)
    assert float(oracle.row_losses(often, original, gram)) < float(oracle.row_losses(original * mask, original, gram))


@pytest.mark.parametrize("solver", SOLVERS)
def test_ill_conditioned_gram_is_safe(solver):
    weight, original, gram, mask = masked()
    features = torch.logspace(-6, 6, 64)
    gram = gram * features * features[:, None]
    fitted, _ = solver(weight, original, gram, mask)
    assert bool(torch.isfinite(fitted).all())
    after, before = (oracle.row_losses(w, original, gram) for w in (fitted, weight))
    assert bool((after <= before * (1 + 1e-6)).all())


@pytest.mark.parametrize("solver", [partial(refit_cg, tolerance=1e-6), refit_gd])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_optimal_row_is_never_made_worse(solver, dtype):
    _, original, gram, mask = masked()
    original = original.to(dtype)
    given = oracle.best_on_mask(original, gram, mask).to(dtype)
    fitted, facts = solver(given, original, gram, mask)
    assert fitted.dtype == dtype
    after, before = (oracle.row_losses(w, original, gram) for w in (fitted, given))
    assert bool((after <= before * (1 + 1e-6)).all())
    assert facts["refit_kept_rows"] > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_overflow_in_the_result_dtype_keeps_the_given_row(solver):
    # The only way to make up for the lost weight is a huge one on an almost dead copy of its input.
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0] * 1e-4
    gram = x.mT @ x / 200
    original = torch.tensor([[40.0, 1.0, 1.0, 1.0]]).half()
    mask = torch.tensor([[False, True, True, False]])
    given = original * mask
    fitted, facts = solver(given, original, gram, mask)
    assert torch.equal(fitted, given)
    assert facts["refit_kept_rows"] == 1
    wide, _ = solver(given.float(), original.float(), gram, mask)
    assert float(wide[0, 1]) > 65_504


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_outside_the_mask_are_ignored_and_zeros_are_positive(solver):
    weight, original, gram, mask = masked()
    clean, _ = solver(weight, original, gram, mask)
    dirty, _ = solver(original, original, gram, mask)
    assert torch.equal(clean, dirty)
    assert not bool(torch.signbit(clean[~mask]).any())
    assert not bool(clean[~mask].any())


@pytest.mark.parametrize("solver", SOLVERS)
def test_kept_weights_of_dead_features_stay(solver):
    weight, original, gram, mask = masked()
    gram[5], gram[:, 5] = 0.0, 0.0
    mask[:, 4:8] = torch.tensor([True, True, False, False])
    weight = original * mask
    fitted, _ = solver(weight, original, gram, mask)
    assert torch.equal(fitted[:, 5], original[:, 5])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_gram_does_not_matter(scale):
    weight, original, gram, mask = masked()
    expected, _ = refit_cg(weight, original, gram, mask)
    fitted, _ = refit_cg(weight, original, gram * scale, mask)
    ours, theirs = (oracle.row_losses(w, original, gram) for w in (fitted, expected))
    assert torch.allclose(ours, theirs, rtol=1e-4)


def test_the_limit_is_reported():
    weight, original, gram, mask = masked()
    _, facts = refit_cg(weight, original, gram, mask, max_iterations=2)
    assert facts["refit_iterations"] == 2
    assert facts["refit_unconverged_rows"] == 24


def test_table_and_options():
    assert list(refits.REFITS) == ["none", "cg", "gd", "swap", "int4"]
    assert refits.get("cg").solve is refit_cg
    assert refits.make_options("gd", steps=7).steps == 7
    with pytest.raises(InputError, match=r"unknown refit 'cgs': did you mean 'cg'\? choose one of none, cg, gd"):
        refits.get("cgs")
    with pytest.raises(InputError, match=r"refit cg has no option 'refit_steps': its options are refit_tolerance, "):
        refits.make_options("cg", steps=3)
    with pytest.raises(InputError, match=r"refit none has no option 'refit_steps': it takes none"):
        refits.make_options("none", steps=3)


@pytest.mark.parametrize(
    ("solver", "option", "value"),
    [
        (refit_cg, "tolerance", -1.0),
        (refit_cg, "tolerance", float("nan")),
        (refit_cg, "max_iterations", 0),
        (refit_cg, "max_iterations", 2.5),
        (refit_gd, "steps", 0),
    ],
)
def test_bad_options_are_refused(solver, option, value):
    with pytest.raises(InputError, match=f"refit_{option} must be"):
        solver(*masked(2, 4), **{option: value})


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_gram_is_refused(solver):
    weight, original, gram, mask = masked(2, 4)
    with pytest.raises(CalibrationError, match="Gram matrix is zero"):
        solver(weight, original, gram * 0, mask)


def test_cg_stops_where_nothing_is_left_to_gain():
    original, gram = oracle.layer(8, 128, seed=7, tokens=32)  # 32 tokens, 64 kept weights a row: no loss has a floor
    mask = Pattern("2:4").keep_mask(original.abs())
    fitted, facts = refit_cg(original * mask, original, gram, mask)
    assert oracle.relative_loss(fitted, original, gram) < 2e-6
    assert facts["refit_iterations"] < 40
