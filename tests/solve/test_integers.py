import itertools

import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError, PatternError
from halve.maths.grid import recovered
from halve.maths.pattern import Pattern
from halve.solve.integers import to_integers
from halve.solve.matrix import prune_weight
from halve.solve.refit import refit_cg, refit_int4


def masked(d_out=24, d_in=192, seed=0, tokens=None):
    original, gram = oracle.layer(d_out, d_in, seed, tokens)
    mask = Pattern("2:4").keep_mask(original.abs() * gram.diagonal().sqrt())
    return refit_cg(original * mask, original, gram, mask)[0], original, gram, mask


def total(weight, original, gram):
    return float(oracle.row_losses(weight, original, gram).sum())


def words(weight):
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % 64)).view(-1, 64)


@pytest.mark.parametrize("seed", range(3))
def test_the_descent_takes_much_of_what_rounding_loses(seed):
    fitted, original, gram, mask = masked(seed=seed)
    floor = total(fitted, original, gram)
    losses = [total(to_integers(fitted, original, gram, mask, sweeps)[0], original, gram) for sweeps in (0, 1, 4)]
    assert floor < losses[2] < losses[1] < losses[0]
    assert losses[2] - floor < 0.7 * (losses[0] - floor)
    gain = to_integers(fitted, original, gram, mask, 4)[1]["integer_gain"]
    assert gain == pytest.approx((losses[0] - losses[2]) / (losses[0] - floor), rel=0.02)


@pytest.mark.parametrize("d_in", [4, 60, 64, 68, 200])
def test_what_comes_out_lies_on_the_grid_and_on_the_mask(d_in):
    fitted, original, gram, mask = masked(d_in=d_in)
    weight, _ = to_integers(fitted, original, gram, mask, 3)
    assert not weight[~mask].any()
    assert recovered(words(weight))[2].all()


def test_no_other_integer_is_better_for_any_weight():
    fitted, original, gram, mask = masked(6, 64)
    weight, _ = to_integers(fitted, original, gram, mask, 40)
    integers, scales, _ = recovered(words(weight))
    best = oracle.row_losses(weight, original, gram)
    for row, column in mask.nonzero().tolist():
        for step in (-1, 1):
            if -8 <= int(integers[row, column]) + step <= 7:
                other = weight.clone()
                other[row, column] = (int(integers[row, column]) + step) * float(scales[row])
                assert oracle.row_losses(other, original, gram)[row] >= best[row] * (1 - 1e-4)


def test_it_comes_close_to_the_best_there_is():
    fitted, original, gram, mask = masked(12, 8)
    weight, _ = to_integers(fitted, original, gram, mask, 20)
    _, scales, _ = recovered(words(weight))
    codes = torch.tensor(list(itertools.product(range(-8, 8), repeat=4)), dtype=torch.float64)
    found, optimum = 0.0, 0.0
    for row in range(12):
        all_of_them = torch.zeros(len(codes), 8, dtype=torch.float64)
        all_of_them[:, mask[row]] = codes * float(scales[row])
        off = all_of_them - original[row].double()
        optimum += float((0.5 * (off @ gram.double()) * off).sum(-1).min())
        found += float(oracle.row_losses(weight, original, gram)[row])
    assert optimum * (1 - 1e-9) <= found < 1.05 * optimum


def test_rows_do_not_depend_on_one_another():
    fitted, original, gram, mask = masked()
    whole, _ = to_integers(fitted, original, gram, mask, 2)
    part, _ = to_integers(fitted[5:9], original[5:9], gram, mask[5:9], 2)
    differs = (whole[5:9] != part).any(-1)
    losses = [oracle.row_losses(each, original[5:9], gram) for each in (whole[5:9], part)]
    assert torch.allclose(*losses, rtol=0.02)
    assert int(differs.sum()) <= 2


def test_inputs_that_never_came_leave_their_weights_at_the_nearest():
    fitted, original, gram, mask = masked(8, 64)
    gram[:, 10] = gram[10] = 0.0
    weight, _ = to_integers(fitted, original, gram, mask, 3)
    assert weight.isfinite().all()


def test_as_a_refit_of_a_matrix():
    original, gram = oracle.layer(16, 128, 1, None)
    plain = prune_weight(original, gram, method="wanda", refit="cg")
    outcome = prune_weight(original.bfloat16(), gram, method="wanda", refit="int4", refit_sweeps=4)
    assert outcome.weight.dtype == torch.bfloat16
    assert recovered(words(outcome.weight))[2].all()
    assert plain.facts["relative_loss"] < outcome.facts["relative_loss"] < 1.5 * plain.facts["relative_loss"] + 0.01
    assert 0 < outcome.facts["integer_gain"] < 1
    with pytest.raises(PatternError, match=r"refit int4 is for 2:4, not for 4:8: use cg"):
        prune_weight(original, gram, "4:8", "wanda", "int4")
    with pytest.raises(InputError, match=r"refit_sweeps must be a whole number of at least 0, got -1"):
        refit_int4(original, original, gram, original != 0, sweeps=-1)
