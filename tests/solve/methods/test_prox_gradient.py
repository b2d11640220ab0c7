import pytest
import torch

import layer_oracles as oracle
from halve.errors import InputError, PatternError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.solve.methods import prox_gradient
from halve.solve.methods.prox_gradient import CHECK_EVERY, ProxGradientOptions, solve
from halve.solve.outcome import Status


def prune(weight, gram, pattern="2:4", **options):
    return solve(weight, Statistics(gram, 10), Pattern(pattern), ProxGradientOptions(**options))


def test_is_algorithm_two_row_by_row():
    weight, gram = oracle.layer(6, 16, seed=0)
    expected = oracle.proximal_gradient(weight, gram, 0.01, 1.1, CHECK_EVERY)
    outcome = prune(weight, gram, beta=1.1)
    assert outcome.status is Status.OK
    # The bound on L exceeds the exact eigenvalue by 0.2 %, which may tip a near-tie and moves the weights a little.
    same = ((outcome.weight != 0) == (expected != 0)).all(-1)
    assert int(same.sum()) >= 5
    assert float((outcome.weight - expected)[same].abs().max() / expected.abs().max()) < 0.02


def test_slower_growth_is_better_and_takes_longer():
    weight, gram = oracle.layer(24, 64, seed=1)
    fast, slow = prune(weight, gram, beta=1.3), prune(weight, gram, beta=1.02)
    losses = [oracle.relative_loss(outcome.weight, weight, gram) for outcome in (slow, fast)]
    assert losses[0] < 0.95 * losses[1]
    assert slow.facts["iterations"] > 3 * fast.facts["iterations"]


def test_result_does_not_depend_on_packing_or_on_the_other_rows(monkeypatch):
    weight, gram = oracle.layer(30, 32, seed=2)
    expected = prune(weight, gram, beta=1.05)
    for share in (0.0001, 2.0):
        monkeypatch.setattr(prox_gradient, "REPACK_SHARE", share)
        other = prune(weight, gram, beta=1.05)
        assert torch.equal(other.weight != 0, expected.weight != 0)
        assert torch.allclose(other.weight, expected.weight, atol=1e-4)
        assert other.facts["iterations"] == expected.facts["iterations"]


def test_finished_rows_stop_costing():
    weight, gram = oracle.layer(64, 32, seed=3)
    facts = prune(weight, gram, beta=1.05).facts
    assert facts["row_iterations"] < 0.9 * facts["iterations"]


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
    facts = prune(weight, gram, beta=1.05).facts
    features = gram.double().diagonal().sqrt()
    unit = gram.double() / features / features[:, None]
    true = float(torch.linalg.eigvalsh(unit)[-1])
    assert true <= facts["lipschitz"] <= 1.01 * true
    assert facts["scale"] == pytest.approx(float((weight.double() * features).abs().mean()), rel=1e-5)
    assert facts["lambda"] == pytest.approx(0.01 * 1.05 ** (facts["iterations"] - 1), rel=1e-6)
    assert facts["projected_rows"] == 0


def test_all_dead_groups_cost_no_iterations():
    weight, gram = oracle.layer(8, 32, seed=7)
    gram[8:12], gram[:, 8:12] = 0.0, 0.0
    live = torch.ones(32, dtype=torch.bool)
    live[8:12] = False
    outcome = prune(weight, gram, beta=1.05)
    alone = prune(weight[:, live].contiguous(), gram[live][:, live].contiguous(), beta=1.05)
    assert outcome.facts["iterations"] <= 1.3 * alone.facts["iterations"]
    kept = weight[:, 8:12].abs().topk(2).values.sort().values
    assert torch.equal(outcome.weight[:, 8:12].abs().topk(2).values.sort().values, kept)


def test_unstructured_patterns_are_refused():
    with pytest.raises(PatternError, match="prox-gradient prunes to N:M, not to 50%"):
        prune(torch.ones(2, 8), torch.eye(8), "50%")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lambda0", 0.0),
        ("lambda0", float("inf")),
        ("beta", 1.0),
        ("beta", float("nan")),
        ("max_iterations", 0),
        ("max_iterations", 1.5),
    ],
)
def test_bad_options_are_refused(option, value):
    with pytest.raises(InputError, match=f"{option} of prox-gradient must be"):
        ProxGradientOptions(**{option: value})
