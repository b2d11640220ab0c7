import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError, PatternError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.methods import alps, prox_admm, prox_gradient
from halve.solve.methods.prox_admm import CHECK_EVERY, ProxADMMOptions, solve
from halve.solve.outcome import Status


def prune(weight, gram, pattern="2:4", **options):
    return solve(weight, Statistics(gram, 10), Pattern(pattern), ProxADMMOptions(**options))


def refitted_loss(pruned, weight, gram):
    return oracle.relative_loss(oracle.best_on_mask(weight, gram, pruned != 0), weight, gram)


def test_is_its_formulas_row_by_row():
    weight, gram = oracle.layer(6, 32, seed=0)
    expected = oracle.prox_admm(weight, gram, CHECK_EVERY)
    outcome = prune(weight, gram)
    assert outcome.status is Status.OK
    assert torch.equal(outcome.weight != 0, expected != 0)
    assert torch.allclose(outcome.weight.double(), expected, atol=1e-3 * float(expected.abs().max()))


def test_better_than_alps_and_than_the_proximal_gradient():
    weight, gram = oracle.layer(48, 128, seed=1)
    stats, pattern = Statistics(gram, 10), Pattern("2:4")
    mine = prune(weight, gram)
    slow = prox_gradient.solve(weight, stats, pattern, prox_gradient.ProxGradientOptions())
    other = alps.solve(weight, stats, pattern, alps.ALPSOptions())
    loss = refitted_loss(mine.weight, weight, gram)
    assert loss < 0.98 * refitted_loss(slow.weight, weight, gram)
    assert loss < refitted_loss(other.weight, weight, gram)
    assert mine.facts["iterations"] < 0.2 * slow.facts["iterations"]


def test_exact_where_nothing_correlates():
    weight, gram = oracle.layer(32, 64, seed=9)
    best = weight.abs() * gram.diagonal().sqrt()
    pruned = prune(weight, torch.diag(gram.diagonal())).weight
    assert torch.equal(pruned != 0, Pattern("2:4").keep_mask(best))


def test_slower_growth_is_better():
    weight, gram = oracle.layer(48, 128, seed=2)
    slow = prune(weight, gram, lambda_growth=1.03, rho_growth=1.06)
    fast = prune(weight, gram, lambda_growth=1.4, rho_growth=2.0)
    assert refitted_loss(slow.weight, weight, gram) < refitted_loss(fast.weight, weight, gram)
    assert slow.facts["iterations"] > 2 * fast.facts["iterations"]


def test_result_does_not_depend_on_packing_or_on_the_other_rows(monkeypatch):
    weight, gram = oracle.layer(30, 32, seed=3)
    expected = prune(weight, gram)
    for share in (0.0001, 2.0):
        monkeypatch.setattr(prox_admm, "REPACK_SHARE", share)
        other = prune(weight, gram)
        assert torch.equal(other.weight != 0, expected.weight != 0)
        assert torch.allclose(other.weight, expected.weight, atol=1e-4)
    assert expected.facts["row_iterations"] < expected.facts["iterations"]


def test_rows_already_in_the_pattern_are_left_alone():
    weight, gram = oracle.layer(8, 32, seed=4)
    weight[:, 2::4], weight[:, 3::4] = 0.0, 0.0
    outcome = prune(weight, gram)
    assert torch.allclose(outcome.weight, weight, rtol=1e-6)
    assert outcome.facts["iterations"] == 0


def test_the_limit_projects_and_says_so():
    weight, gram = oracle.layer(8, 32, seed=5)
    outcome = prune(weight, gram, max_iterations=3)
    assert outcome.status is Status.MAX_ITER
    assert "8 rows were not 2:4 after 3 iterations" in outcome.reason
    assert outcome.facts["projected_rows"] == 8
    assert outcome.facts["iterations"] == 3
    assert ((outcome.weight.view(8, 8, 4) != 0).sum(-1) == 2).all()


def test_facts():
    weight, gram = oracle.layer(8, 32, seed=6)
    facts = prune(weight, gram).facts
    count = int(facts["iterations"])
    assert facts["lambda"] == pytest.approx(0.01 * 1.1 ** (count - 1), rel=1e-6)
    assert facts["rho"] == pytest.approx(0.1 * 1.2 ** ((count - 1) // 5), rel=1e-6)
    assert facts["projected_rows"] == 0


def test_unstructured_patterns_are_refused():
    with pytest.raises(PatternError, match="prox-admm prunes to N:M, not to 50%"):
        prune(torch.ones(2, 8), torch.eye(8), "50%")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lambda0", 0.0),
        ("lambda_growth", 1.0),
        ("rho", float("inf")),
        ("rho_growth", 0.9),
        ("rho_growth", 1.7),
        ("max_iterations", True),
    ],
)
def test_bad_options_are_refused(option, value):
    with pytest.raises(InputError, match=f"{option} of prox-admm must be"):
        ProxADMMOptions(**{option: value})


def test_exchanges_can_be_left_out():
    weight, _ = oracle.layer(16, 32, seed=8)
    gram = torch.eye(32)
    with_them, without = (prune(weight, gram, exchanges=exchanges) for exchanges in (True, False))
    assert with_them.facts["exchanges"] > 0.0
    assert "exchanges" not in without.facts
    assert oracle.relative_loss(with_them.weight, weight, gram) < oracle.relative_loss(without.weight, weight, gram)
    with pytest.raises(InputError, match="exchanges of prox-admm must be true or false, got 1"):
        ProxADMMOptions(exchanges=1)
