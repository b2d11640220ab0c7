from dataclasses import replace

import pytest
import torch

import layer_oracles as oracle
from halve.errors import FactorisationError, InputError, PatternError
from halve.maths import linalg
from halve.maths.gram import GramAccumulator, Statistics
from halve.solve import matrix as matrix_module
from halve.solve import methods
from halve.solve import objective as objective_module
from halve.solve import refit as refits
from halve.solve.dense_target import dense_target
from halve.solve.matrix import prune_weight, prune_weights
from halve.solve.objective import Objective
from halve.solve.outcome import Status
from halve.solve.shrinkage import shrink

METHODS = list(methods.METHODS)
FAST = {"prox-gradient": {"beta": 1.15}}


def prune(weight, gram, method="wanda", refit="cg", pattern="2:4", **options):
    return prune_weight(weight, gram, pattern, method, refit, **FAST.get(method, {}), **options)


def check_pruned(outcome, weight, keep=2, group=4):
    pruned = outcome.weight
    assert pruned.dtype == weight.dtype
    assert pruned.shape == weight.shape
    assert bool(torch.isfinite(pruned).all())
    assert bool(((pruned.reshape(len(weight), -1, group) != 0).sum(-1) <= keep).all())
    assert not bool(torch.signbit(pruned[pruned == 0]).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_prunes_refits_and_reports(method, dtype):
    weight, gram = oracle.layer(12, 32, seed=0)
    weight = weight.to(dtype)
    outcome = prune(weight, Statistics(gram, 77), method)
    assert outcome.status is Status.OK
    assert outcome.method == ("prox-admm" if method == "auto" else method)
    assert outcome.reason == ""
    check_pruned(outcome, weight)
    facts = outcome.facts
    assert facts["tokens"] == 77
    assert facts["seconds"] > 0
    assert facts["relative_loss"] == pytest.approx(oracle.relative_loss(outcome.weight, weight, gram), rel=1e-4)
    assert facts["relative_loss"] < facts["relative_loss_before_refit"]
    assert facts["refit_iterations"] > 0
    mask = outcome.weight != 0
    best = oracle.relative_loss(oracle.best_on_mask(weight, gram, mask), weight, gram)
    assert facts["relative_loss"] <= best * (1.001 if dtype in (torch.float32, torch.float64) else 1.02)


def test_defaults_are_auto_with_conjugate_gradients():
    weight, gram = oracle.layer(2, 8, seed=1)
    outcome = prune_weight(weight, gram)
    assert outcome.method == "prox-admm"
    assert {"iterations", "rho", "refit_kept_rows", "refit_row_iterations"} <= set(outcome.facts)
    check_pruned(outcome, weight)
    assert "tokens" not in outcome.facts
    assert prune_weight(weight, gram, tokens=5).facts["tokens"] == 5


def test_refits_differ_as_they_should():
    weight, gram = oracle.layer(12, 32, seed=2)
    none, gd, cg = (prune(weight, gram, refit=refit) for refit in ("none", "gd", "cg"))
    assert torch.equal(
        none.weight, methods.get("wanda").solve(weight, Statistics(gram, 1), matrix_module.Pattern("2:4"), None).weight
    )
    assert none.facts["relative_loss"] == none.facts["relative_loss_before_refit"]
    assert "refit_iterations" not in none.facts
    assert gd.facts["refit_iterations"] == 1000
    assert cg.facts["relative_loss"] <= 1.001 * gd.facts["relative_loss"] < 0.9 * none.facts["relative_loss"]


def test_options_reach_method_and_refit():
    weight, gram = oracle.layer(4, 16, seed=3)
    outcome = prune_weight(weight, gram, method="sparsegpt", refit="gd", damping=0.1, refit_steps=3)
    assert outcome.facts["damping"] == pytest.approx(0.1)
    assert outcome.facts["refit_iterations"] == 3


def test_a_time_limit_is_shared_by_matrices_that_are_solved_one_by_one(monkeypatch):
    weights, stats = several()
    limits = []

    def note(weight, stats, pattern, options):
        limits.append(options.time_limit)
        return methods.METHODS["magnitude"].solve(weight, stats, pattern, None)

    monkeypatch.setitem(methods.METHODS, "auto", replace(methods.METHODS["auto"], solve=note))
    prune_weights(weights, stats, "4:8", "auto", "none", time_limit=19.0)
    assert limits == pytest.approx([8.0, 2.0, 9.0])
    prune_weights(weights, stats, "2:4", "auto", "none", time_limit=19.0)
    assert limits[3:] == [19.0]


def test_a_refit_that_fails_leaves_the_mask_where_a_fallback_is_allowed(monkeypatch):
    def broken(*_arguments, **_options):
        raise FactorisationError("no luck")

    monkeypatch.setitem(refits.REFITS, "swap", replace(refits.REFITS["swap"], solve=broken))
    weight, gram = oracle.layer(4, 16, seed=3)
    failed = prune(weight, gram, refit="swap")
    assert failed.status is Status.FAILED
    assert failed.reason == "refit swap failed: no luck"
    fallen = prune(weight, gram, refit="swap", fallback="magnitude")
    plain = prune(weight, gram, refit="none")
    assert fallen.status is Status.FELL_BACK
    assert fallen.reason == "refit swap failed: no luck; the weights are those of method wanda"
    assert torch.equal(fallen.weight, plain.weight)
    assert fallen.facts["relative_loss"] == plain.facts["relative_loss"]


def test_free_slots_are_used():
    weight, gram = oracle.layer(8, 16, seed=4)
    weight[:, 4:7] = 0.0
    outcome = prune(weight, gram)
    assert bool(((outcome.weight[:, 4:8] != 0).sum(-1) == 2).all())


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "50%"])
def test_other_patterns(pattern):
    weight, gram = oracle.layer(8, 32, seed=5)
    outcome = prune(weight, gram, "sparsegpt", pattern=pattern)
    keep, group = (16, 32) if pattern == "50%" else map(int, pattern.split(":"))
    check_pruned(outcome, weight, keep, group)


def test_autocast_and_gradients_of_the_caller_do_not_matter():
    weight, gram = oracle.layer(8, 32, seed=6)
    expected = prune(weight, gram).weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = prune(weight.clone().requires_grad_(), gram)
    assert torch.equal(outcome.weight, expected)
    assert not outcome.weight.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case", ["dead", "constant", "equal", "one token", "1e30", "1e-30", "zero group", "zero row", "tiny", "duplicate"]
)
def test_degenerate_layers_give_valid_weights(method, case):
    weight, gram = oracle.layer(6, 16, seed=7, tokens=1 if case == "one token" else None)
    if case == "dead":
        gram[[1, 4, 5, 6, 7]], gram[:, [1, 4, 5, 6, 7]] = 0.0, 0.0
    elif case == "constant":
        gram = torch.ones(16, 16)
    elif case == "equal":
        weight = torch.full((6, 16), 0.25)
    elif case in {"1e30", "1e-30"}:
        gram = gram * float(case)
    elif case == "zero group":
        weight[:, 4:8] = 0.0
    elif case == "zero row":
        weight[2] = 0.0
    elif case == "tiny":
        weight = weight * 1e-37
    elif case == "duplicate":
        gram = gram[torch.arange(16) // 4 * 4][:, torch.arange(16) // 4 * 4]
    outcome = prune(weight, gram, method, tokens=1)
    assert outcome.status is Status.OK
    check_pruned(outcome, weight)
    if case not in {"zero row", "tiny"}:
        magnitude = oracle.relative_loss(prune(weight, None, "magnitude", "none").weight, weight, gram)
        assert oracle.relative_loss(outcome.weight, weight, gram) <= magnitude * (1 + 1e-6)


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


@pytest.mark.parametrize("method", [name for name in METHODS if methods.METHODS[name].needs_statistics])
def test_zero_gram_fails_or_falls_back_and_says_so(method):
    weight, gram = oracle.layer(4, 16, seed=9)
    failed = prune(weight, 0 * gram, method)
    assert failed.status is Status.FAILED
    assert torch.equal(failed.weight, weight)
    assert failed.method == method
    assert f"method {method} failed: the Gram matrix is zero" in failed.reason
    fallen = prune(weight, 0 * gram, method, fallback="magnitude")
    assert fallen.status is Status.FELL_BACK
    assert fallen.method == "magnitude"
    assert "used magnitude instead" in fallen.reason
    assert torch.equal(fallen.weight, prune(weight, None, "magnitude", "none").weight)
    both = prune(weight, 0 * gram, method, fallback="wanda")
    assert both.status is Status.FAILED
    assert "fallback wanda failed too" in both.reason
    assert torch.equal(both.weight, weight)


def test_zero_gram_fails_the_refit_of_magnitude_pruning():
    weight, gram = oracle.layer(4, 16, seed=9)
    outcome = prune(weight, 0 * gram, "magnitude", "cg")
    assert outcome.status is Status.FAILED
    assert "refit cg failed: the Gram matrix is zero" in outcome.reason
    assert prune(weight, 0 * gram, "magnitude", "none").status is Status.OK
    fallen = prune(weight, 0 * gram, "magnitude", "cg", fallback="magnitude")
    assert fallen.status is Status.FELL_BACK
    check_pruned(fallen, weight)


@pytest.mark.parametrize("fallback", ["magnitude", "wanda"])
def test_failed_factorisation_fails_or_falls_back(monkeypatch, fallback):
    monkeypatch.setattr(linalg, "_cholesky", lambda matrix: None)
    monkeypatch.setattr(linalg, "_cholesky_by_eigenvalues", lambda matrix, damping: None)
    weight, gram = oracle.layer(4, 16, seed=10)
    failed = prune(weight, gram, "sparsegpt")
    assert failed.status is Status.FAILED
    assert torch.equal(failed.weight, weight)
    assert "method sparsegpt failed" in failed.reason
    fallen = prune(weight, gram, "sparsegpt", fallback=fallback)
    assert fallen.status is Status.FELL_BACK
    assert fallen.method == fallback
    assert f"used {fallback} instead" in fallen.reason
    assert torch.equal(fallen.weight, prune(weight, gram, fallback).weight)
    assert fallen.facts["relative_loss"] < fallen.facts["relative_loss_before_refit"]


@pytest.mark.parametrize(("bad", "reason"), [(float("nan"), "not finite"), (1.0, "not 2:4")])
def test_a_wrong_result_is_caught(monkeypatch, bad, reason):
    def broken(weight, stats, pattern, options):
        return matrix_module.Outcome(torch.full_like(weight, bad), Status.OK, "wanda")

    row = replace(methods.METHODS["wanda"], solve=broken)
    monkeypatch.setitem(methods.METHODS, "wanda", row)
    weight, gram = oracle.layer(4, 16, seed=11)
    outcome = prune(weight, gram, refit="none")
    assert outcome.status is Status.FAILED
    assert reason in outcome.reason
    assert torch.equal(outcome.weight, weight)


def with_entry(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


WEIGHT, GRAM = oracle.layer(4, 16, seed=12)


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
    monkeypatch.setattr(matrix_module, "_solve", lambda task: pytest.fail("work began"))
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
    monkeypatch.setattr(matrix_module, "_solve", lambda task: pytest.fail("work began"))
    with pytest.raises(PatternError, match=message):
        prune(WEIGHT, GRAM, method, pattern=pattern)


@pytest.mark.parametrize("refit", ["none", "cg", "gd", "swap"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_input_gives_the_same_bytes(method, refit):
    """Whatever lies where in memory, and whether or not rows are treated side by side in other numbers than before."""
    weight, gram = oracle.layer(40, 64, seed=21)
    first = prune(weight, gram, method, refit).weight
    room = torch.empty(weight.numel() + 3)[3:]
    again = prune(room.view_as(weight).copy_(weight), gram.clone(), method, refit).weight
    assert torch.equal(first, again)


ROUNDING_DECIDES = ("alps", "prox-admm", "auto")
"""Methods whose dual variable adds up what rounding makes of exact ties: which wins differs between processors."""


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ROUNDING_DECIDES])
def test_ties_go_to_the_lowest_index(method):
    pruned = prune(torch.full((4, 16), 0.5), torch.eye(16), method, "none").weight
    assert (pruned != 0).view(-1, 4).tolist() == [[True, True, False, False]] * 16


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


def same_up_to_rounding(weight, other):
    """The same kept places, and values that differ by no more than a refit that stops at its tolerance."""
    difference = (weight - other).float().norm(dim=1) / other.float().norm(dim=1)
    return torch.equal(weight != 0, other != 0) and float(difference.amax()) < 5e-3


@pytest.mark.parametrize("order", ["rows", "columns", "one row"])
@pytest.mark.parametrize("method", METHODS)
def test_the_given_matrix_is_not_modified_however_it_lies_in_memory(method, order):
    weight, gram = oracle.layer(1 if order == "one row" else 6, 32, seed=19)
    given = weight.mT.contiguous().mT if order == "columns" else weight.clone()
    outcome = prune(given, gram, method)
    assert torch.equal(given, weight)
    assert outcome.weight.is_contiguous()
    assert same_up_to_rounding(outcome.weight, prune(weight.clone(), gram, method).weight)
    true = oracle.relative_loss(outcome.weight, weight, gram)
    assert outcome.facts["relative_loss"] == pytest.approx(true, rel=1e-4)


def several(d_in=32, seed=13, dtype=torch.float32):
    """Matrices of different heights, one of them much larger in its weights, and their common statistics."""
    weight, gram = oracle.layer(19, d_in, seed=seed)
    heights = (8, 2, 9)
    return [
        (factor * part).to(dtype) for factor, part in zip((1.0, 50.0, 0.3), weight.split(heights), strict=True)
    ], Statistics(gram, 77)


REFITS = ("none", "cg", "gd", "swap")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_several_matrices_get_what_each_alone_would_get(method, dtype):
    weights, stats = several(dtype=dtype)
    for pattern in ("2:4", "4:8") if method == "auto" else ("2:4",):
        options = FAST.get(method, {})
        together = prune_weights(weights, stats, pattern, method, **options)
        assert len(together) == 3
        for weight, outcome in zip(weights, together, strict=True):
            alone = prune_weight(weight, stats, pattern, method, **options)
            check_pruned(outcome, weight, *map(int, pattern.split(":")))
            assert outcome.weight.is_contiguous()
            if methods.METHODS[method].independent_rows(matrix_module.Pattern(pattern)):
                assert same_up_to_rounding(outcome.weight, alone.weight)
            else:
                assert torch.equal(outcome.weight, alone.weight)
            assert (outcome.status, outcome.method, outcome.reason) == (Status.OK, alone.method, "")
            true = oracle.relative_loss(outcome.weight, weight, stats.gram)
            assert outcome.facts["relative_loss"] == pytest.approx(true, rel=1e-4)
            for fact in ("relative_loss", "relative_loss_before_refit"):
                assert outcome.facts[fact] == pytest.approx(alone.facts[fact], rel=1e-3)
            assert outcome.facts["tokens"] == 77
            assert set(outcome.facts) == set(alone.facts)


@pytest.mark.parametrize("refit", REFITS)
def test_every_refit_serves_several_matrices(refit):
    weights, stats = several(seed=14)
    for weight, outcome in zip(weights, prune_weights(weights, stats, "2:4", "wanda", refit), strict=True):
        alone = prune_weight(weight, stats, "2:4", "wanda", refit)
        assert same_up_to_rounding(outcome.weight, alone.weight)
        true = oracle.relative_loss(outcome.weight, weight, stats.gram)
        assert outcome.facts["relative_loss"] == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_matrices_are_solved_as_one_only_where_rows_are_independent(monkeypatch, method):
    weights, stats = several()
    heights = []
    real = methods.METHODS[method]

    def solve(weight, stats, pattern, options):
        heights.append(len(weight))
        return real.solve(weight, stats, pattern, options)

    monkeypatch.setitem(methods.METHODS, method, replace(real, solve=solve))
    prune_weights(weights, stats, "2:4", method, **FAST.get(method, {}))
    assert heights == ([19] if method not in {"ria", "alps"} else [8, 2, 9])


def test_the_time_of_a_common_solution_is_shared_by_the_rows():
    weights, stats = several()
    seconds = [outcome.facts["seconds"] for outcome in prune_weights(weights, stats)]
    assert seconds[0] / 8 == pytest.approx(seconds[1] / 2) == pytest.approx(seconds[2] / 9)


@pytest.mark.parametrize(
    "other",
    [torch.ones(2, 16), torch.ones(2, 32, dtype=torch.float64), torch.ones(2, 32, device="meta"), None],
    ids=["width", "dtype", "device", "none"],
)
def test_matrices_that_do_not_go_together_are_refused(monkeypatch, other):
    monkeypatch.setattr(matrix_module, "_solve", lambda task: pytest.fail("work began"))
    monkeypatch.setattr(matrix_module, "check_weight", lambda weight: None)  # it cannot look at the meta device
    weights, stats = several()
    with pytest.raises(InputError, match="must be one or more matrices of the same width, dtype and device"):
        prune_weights([] if other is None else [*weights, other], stats)


def test_one_bad_matrix_of_several_is_named():
    weights, stats = several()
    weights[2] = with_entry(weights[2], (3, 5), float("nan"))
    with pytest.raises(InputError, match="weight has NaN or infinity, first at row 3, column 5"):
        prune_weights(weights, stats)


@pytest.mark.parametrize("method", ["auto", "alps"])
def test_failure_leaves_each_matrix_its_own_weights(method):
    weights, stats = several()
    dead = Statistics(0 * stats.gram, 77)
    for weight, outcome in zip(weights, prune_weights(weights, dead, "2:4", method), strict=True):
        assert outcome.status is Status.FAILED
        assert torch.equal(outcome.weight, weight)
        assert "the Gram matrix is zero" in outcome.reason
    for weight, outcome in zip(weights, prune_weights(weights, dead, "2:4", method, fallback="magnitude"), strict=True):
        assert outcome.status is Status.FELL_BACK
        assert torch.equal(outcome.weight, prune(weight, None, "magnitude", "none").weight)


def test_a_wrong_result_of_one_matrix_is_not_held_against_the_others(monkeypatch):
    def broken(weight, stats, pattern, options):
        pruned = methods.METHODS["magnitude"].solve(weight, stats, pattern, None).weight
        pruned[8] = 1.0  # the first row of the second matrix
        return matrix_module.Outcome(pruned, Status.OK, "wanda")

    monkeypatch.setitem(methods.METHODS, "wanda", replace(methods.METHODS["wanda"], solve=broken))
    weights, stats = several()
    outcomes = prune_weights(weights, stats, "2:4", "wanda", "none")
    assert [outcome.status for outcome in outcomes] == [Status.OK, Status.FAILED, Status.OK]
    assert "not 2:4" in outcomes[1].reason
    assert torch.equal(outcomes[1].weight, weights[1])


def two_streams(d_in=32, seed=15):
    """The dense model's inputs, those of the pruned one, and the statistics of both, by halves."""
    x = oracle.correlated_inputs(400, d_in, seed=seed).float()
    noisy = x + 0.5 * x.square().mean(0).sqrt() * torch.tanh(x.roll(3, dims=1) / x.square().mean(0).sqrt())
    accumulator = GramAccumulator(d_in, halves=True)
    accumulator.add(noisy, x)
    return x.double(), noisy.double(), accumulator.finish()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "auto"])
def test_matching_the_dense_model_brings_outputs_closer_to_it(method):
    x, noisy, stats = two_streams()
    weight, _ = oracle.layer(12, 32, seed=16)
    matched = Objective(shrinkage=0.0, match_dense=1.0, match_ridge=1e-3)
    errors = []
    for objective in (Objective(shrinkage=0.0), replace(matched, match_dense=0.5), matched):
        outcome = prune(weight, stats, method, objective=objective)
        assert outcome.status is Status.OK
        check_pruned(outcome, weight)
        errors.append(float((noisy @ outcome.weight.double().mT - x @ weight.double().mT).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_the_loss_that_is_reported_is_against_the_target_on_the_given_gram():
    _, _, stats = two_streams()
    weights = [weight * 0.1 for weight in several()[0]]
    objective = Objective(shrinkage=0.3, match_dense=1.0)
    for weight, outcome in zip(weights, prune_weights(weights, stats, "2:4", objective=objective), strict=True):
        target = dense_target(weight, stats, 1.0, 0.1)
        true = oracle.relative_loss(outcome.weight, target, stats.gram)
        assert outcome.facts["relative_loss"] == pytest.approx(true, rel=1e-3)
        assert outcome.facts["shrinkage"] == 0.3
    plain = prune(weights[0], stats, objective=Objective(match_dense=1.0))
    assert "shrinkage" not in plain.facts


def test_a_shrunk_gram_is_what_method_and_refit_see():
    _, _, stats = two_streams()
    weight, _ = oracle.layer(12, 32, seed=17)
    for method in ("auto", "sparsegpt"):
        got = prune(weight, stats, method, objective=Objective(0.2, 0.0))
        expected = prune(weight, shrink(stats.gram, 0.2), method)
        assert torch.equal(got.weight, expected.weight)
        assert got.facts["relative_loss"] != expected.facts["relative_loss"]
    diagonal = prune(weight, stats, "auto", objective=Objective(1.0, 0.0))
    torch.testing.assert_close(diagonal.weight, prune(weight, stats, "wanda", "none").weight, rtol=1e-5, atol=0.0)


def test_only_auto_chooses_its_shrinkage_unasked():
    x = oracle.correlated_inputs(40, 32, seed=18).float()
    accumulator = GramAccumulator(32, halves=True)
    accumulator.add(x)
    stats, weight = accumulator.finish(), oracle.layer(12, 32, seed=18)[0]
    assert prune(weight, stats, "auto").facts["shrinkage"] > 0.0
    for method in ("prox-admm", "wanda"):
        assert "shrinkage" not in prune(weight, stats, method).facts
        assert prune(weight, stats, method, objective=Objective("auto")).facts["shrinkage"] > 0.0
    assert "shrinkage" not in prune(weight, replace(stats, halves=None), "auto").facts


@pytest.mark.parametrize("gram", [GRAM, Statistics(GRAM, 5), None])
def test_matching_the_dense_model_without_its_inputs_is_refused(gram):
    with pytest.raises(InputError, match=r"match_dense needs statistics with the dense model's inputs \(cross\)"):
        prune(WEIGHT, gram, "magnitude", "none", objective=Objective(match_dense=0.5))


def test_a_target_that_cannot_be_had_leaves_the_weights_alone(monkeypatch):
    def broken(*_arguments):
        raise FactorisationError("no luck")

    monkeypatch.setattr(objective_module, "dense_target", broken)
    _, _, stats = two_streams()
    weights, _ = several()
    for weight, outcome in zip(weights, prune_weights(weights, stats, objective=Objective(0.0, 1.0)), strict=True):
        assert outcome.status is Status.FAILED
        assert outcome.method == "auto"
        assert "match_dense failed: " in outcome.reason
        assert torch.equal(outcome.weight, weight)
