"""What is refused, before any work."""

import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError, PatternError
from halve.maths.gram import Statistics
from halve.solve import matrix as matrix_module
from halve.solve.matrix import prune_weights
from halve.solve.objective import Objective
from halve.solve.outcome import Status
from pruned_matrices import GRAM, WEIGHT, check_pruned, forbid_work, prune, several, with_entry


@pytest.mark.parametrize(
    ("weight", "gram", "options", "message"),
    [
        (WEIGHT[0], GRAM, {}, r"weight must be .* got torch.float32 of shape \(16,\)"),
        (WEIGHT.int(), GRAM, {}, "weight must be .* got torch.int32"),
        (WEIGHT[:0], GRAM, {}, "weight must be a non-empty"),
        (WEIGHT.tolist(), GRAM, {}, "weight must be .* got list"),
        (with_entry(WEIGHT, (2, 3), float("nan")), GRAM, {}, "weight has NaN or infinity, first at row 2, column 3"),
        (WEIGHT, GRAM[:8, :8], {}, r"gram must be floating point of shape \(16, 16\) .* got .*\(8, 8\)"),
        (WEIGHT, GRAM.int(), {}, "gram must be floating point"),
        (WEIGHT, "gram", {}, "gram must be floating point .* got str"),
        (WEIGHT, GRAM.to("meta"), {}, "gram is on meta and weight on cpu"),
        (WEIGHT, with_entry(GRAM, (0, 1), float("inf")), {}, "gram has NaN or infinity"),
        (WEIGHT, Statistics(GRAM.double() * 1e300, 5), {}, "gram has NaN or infinity in float32"),
        (WEIGHT, Statistics(GRAM, 5, (GRAM, GRAM[:8])), {}, "a half of gram must be floating point of shape"),
        (WEIGHT, Statistics(GRAM, 5, cross=GRAM[:8]), {}, "cross must be floating point of shape"),
        (WEIGHT, with_entry(GRAM, (0, 1), 9.0), {}, "gram is not symmetric"),
        (WEIGHT, with_entry(GRAM, (3, 3), -1.0), {}, "gram has a negative diagonal entry at feature 3"),
        (WEIGHT, GRAM, {"tokens": 0}, "tokens must be a whole number of at least 1, got 0"),
        (WEIGHT, GRAM, {"method": "wandaa"}, "unknown method 'wandaa': did you mean 'wanda'"),
        (WEIGHT, GRAM, {"refit": "cgg"}, "unknown refit 'cgg': did you mean 'cg'"),
        (WEIGHT, GRAM, {"beta": 1.1}, "method wanda has no option 'beta'"),
        (WEIGHT, GRAM, {"refit_steps": 5}, "refit cg has no option 'refit_steps'"),
        (WEIGHT, GRAM, {"refit_tolerance": -1.0}, "refit_tolerance must be"),
        (WEIGHT, GRAM, {"fallback": "sparsegpt"}, "fallback 'sparsegpt' is unknown: choose one of magnitude, wanda"),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, weight, gram, options, message):
    forbid_work(monkeypatch)
    with pytest.raises(InputError, match=message):
        prune(weight, gram, **options)


@pytest.mark.parametrize(
    ("pattern", "method", "message"),
    [
        ("4:2", "wanda", "not understood"),
        ("3:5", "wanda", "divisible by 5, got d_in = 16"),
        (
            "50%",
            "prox-gradient",
            "prunes to N:M such as 2:4, not to 50%: for that choose one of auto, magnitude, wanda, ria",
        ),
    ],
)
def test_bad_patterns_are_refused_before_any_work(monkeypatch, pattern, method, message):
    forbid_work(monkeypatch)
    with pytest.raises(PatternError, match=message):
        prune(WEIGHT, GRAM, method, pattern=pattern)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrinkage": 0.1}, r"shrinkage belongs to the objective: write objective=halve\.Objective\(shrinkage=…\)"),
        ({"objective": {"shrinkage": 0.1}}, r"objective must be a halve\.Objective, .*, got dict"),
        (
            {"objective": Objective(shrinkage="auto")},
            "shrinkage auto .* give Statistics with halves",
        ),
        ({"objective": Objective(match_dense=0.5)}, "match_dense needs statistics with the dense model's inputs"),
    ],
)
def test_objectives_that_cannot_be_followed_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        prune(WEIGHT, GRAM, **options)


@pytest.mark.parametrize("gram", [GRAM, Statistics(GRAM, 5), None])
def test_matching_the_dense_model_without_its_inputs_is_refused(gram):
    with pytest.raises(InputError, match=r"match_dense needs statistics with the dense model's inputs \(cross\)"):
        prune(WEIGHT, gram, "magnitude", "none", objective=Objective(match_dense=0.5))


def test_magnitude_without_statistics():
    weight, _ = oracle.layer(4, 16, seed=8)
    outcome = prune(weight, None, "magnitude", "none")
    assert outcome.status is Status.OK
    check_pruned(outcome, weight)
    assert set(outcome.facts) == {"seconds"}
    with pytest.raises(InputError, match=r'refit cg needs gram.*set refit="none"'):
        prune(weight, None, "magnitude", "cg")
    with pytest.raises(InputError, match="method wanda needs gram"):
        prune(weight, None, "wanda", "none")


@pytest.mark.parametrize(
    "other",
    [torch.ones(2, 16), torch.ones(2, 32, dtype=torch.float64), torch.ones(2, 32, device="meta"), None],
    ids=["width", "dtype", "device", "none"],
)
def test_matrices_that_do_not_go_together_are_refused(monkeypatch, other):
    forbid_work(monkeypatch)
    monkeypatch.setattr(matrix_module, "check_weight", lambda weight: None)  # it cannot look at the meta device
    weights, stats = several()
    with pytest.raises(InputError, match="must be one or more matrices of the same width, dtype and device"):
        prune_weights([] if other is None else [*weights, other], stats)


def test_one_bad_matrix_of_several_is_named():
    weights, stats = several()
    weights[2] = with_entry(weights[2], (3, 5), float("nan"))
    with pytest.raises(InputError, match="weight has NaN or infinity, first at row 3, column 5"):
        prune_weights(weights, stats)
