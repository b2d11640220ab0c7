import pytest
import torch

import layer_oracles as oracle
from halve.maths.gram import GramAccumulator, Statistics
from halve.maths.pattern import Pattern
from halve.solve.matrix import prune_weight
from halve.solve.objective import Objective
from halve.solve.shrinkage import CANDIDATES, _lowest, choose_shrinkage, shrink

PATTERN = Pattern("2:4")


def weights(rows=32, d_in=64, seed=0):
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed + 1)) * 0.05


def by_halves(x):
    accumulator = GramAccumulator(x.shape[-1], halves=True)
    accumulator.add(x.float())
    return accumulator.finish()


def held_out_loss(weight, mask, halves, amount):
    """Both directions, with the exact optimum of every row in float64."""
    lost = 0.0
    for fitted_on, judged_on in (halves, halves[::-1]):
        diagonal = torch.diag(fitted_on.double().diagonal())
        fitted = oracle.best_on_mask(weight, (1 - amount) * fitted_on.double() + amount * diagonal, mask)
        lost += oracle.relative_loss(fitted, weight, judged_on)
    return lost


@pytest.mark.parametrize("amount", [0.003, 0.3, 0.99])
def test_matches_the_formula_in_float64_and_keeps_the_diagonal_exactly(amount):
    _, gram = oracle.layer(1, 24, seed=0)
    given = gram.clone()
    shrunk = shrink(gram, amount)
    expected = (1 - amount) * gram.double() + amount * torch.diag(gram.double().diagonal())
    torch.testing.assert_close(shrunk.double(), expected, rtol=1e-6, atol=0.0)
    assert torch.equal(shrunk.diagonal(), gram.diagonal())
    assert torch.equal(gram, given)


def test_nothing_is_the_very_tensor_and_everything_is_the_diagonal():
    _, gram = oracle.layer(1, 24, seed=1)
    assert shrink(gram, 0.0) is gram
    assert torch.equal(shrink(gram, 1.0), torch.diag(gram.diagonal()))


def test_without_halves_nothing_is_shrunk():
    weight, gram = oracle.layer(8, 32, seed=2, tokens=8)
    assert choose_shrinkage(weight, Statistics(gram, 8), PATTERN) == 0.0
    assert choose_shrinkage(weight, Statistics(gram, 8, (gram, 0 * gram)), PATTERN) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_few_tokens_ask_for_much_and_many_for_next_to_nothing(seed):
    x = oracle.correlated_inputs(20_000, 64, seed=seed)
    few, more, many = (choose_shrinkage(weights(), by_halves(x[:count]), PATTERN) for count in (24, 1000, 20_000))
    assert few >= 0.05
    assert few > more > many
    assert many <= 0.01


@pytest.mark.parametrize("tokens", [40, 200, 2000])
@pytest.mark.parametrize("seed", range(3))
def test_is_half_of_what_serves_the_other_half_best(tokens, seed):
    weight = weights(seed=seed)
    statistics = by_halves(oracle.correlated_inputs(tokens, 64, seed=seed))
    scores = weight.double().abs() * statistics.gram.double().diagonal().sqrt()
    mask = torch.zeros(32, 16, 4, dtype=torch.bool)
    mask = mask.scatter(2, scores.view(32, 16, 4).topk(2, dim=2).indices, value=True).view(32, 64)
    losses = {amount: held_out_loss(weight, mask, statistics.halves, amount) for amount in CANDIDATES if amount}
    chosen = choose_shrinkage(weight, statistics, PATTERN)
    winner = chosen if chosen == 1.0 else 2 * chosen
    assert losses[winner] <= 1.01 * min(losses.values())


def test_uncorrelated_inputs_with_few_tokens_trust_the_diagonal_alone():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    assert choose_shrinkage(weights(), by_halves(x), PATTERN) == 1.0


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_choice_depends_on_neither_scale_nor_dtype_nor_repetition(scale):
    weight, statistics = weights(), by_halves(oracle.correlated_inputs(100, 64, seed=4))
    scaled = Statistics(scale * statistics.gram, 100, tuple(scale * half for half in statistics.halves))
    expected = choose_shrinkage(weight, statistics, PATTERN)
    assert expected > 0.0
    assert choose_shrinkage(weight, statistics, PATTERN) == expected
    assert choose_shrinkage(weight, scaled, PATTERN) == expected
    assert choose_shrinkage(weight.bfloat16(), statistics, PATTERN) == expected


def test_rows_from_the_whole_matrix_judge():
    # Rows of zeros lose nothing whatever is done: were only the first ones asked, the search would stay where it began.
    statistics = by_halves(oracle.correlated_inputs(20, 64, seed=5))
    weight = torch.cat([torch.zeros(640, 64), weights(640)])
    assert choose_shrinkage(torch.zeros(640, 64), statistics, PATTERN) == 0.05
    assert choose_shrinkage(weight, statistics, PATTERN) > 0.05


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_the_default_is_never_worse_than_wanda_on_fresh_tokens(tokens):
    trusting = []
    for seed in range(4):
        x = oracle.correlated_inputs(20_000 + tokens, 64, seed=seed)
        statistics, fresh = by_halves(x[:tokens]), x[tokens:].mT @ x[tokens:] / 20_000
        weight = weights(seed=seed)
        wanda = prune_weight(weight, statistics, method="wanda", refit="none")
        default = prune_weight(weight, statistics, method="auto")
        plain = prune_weight(weight, statistics, method="auto", objective=Objective(shrinkage=0.0))
        true = [oracle.relative_loss(outcome.weight, weight, fresh) for outcome in (wanda, default, plain)]
        assert default.facts["shrinkage"] > 0.0
        assert "shrinkage" not in plain.facts
        assert true[1] <= true[0] * (1 + 1e-6), seed
        trusting.append(true[2] > true[0])
    # As many tokens as kept weights a row can be fitted exactly, noise and all.
    assert tokens != 32 or all(trusting)


def test_a_single_token_is_trusted_for_its_diagonal_alone():
    accumulator = GramAccumulator(32, halves=True)
    accumulator.add(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    stats = accumulator.finish()
    assert stats.halves is None
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    assert choose_shrinkage(weight, stats, Pattern("2:4")) == 1.0
    outcome = prune_weight(weight, stats, "2:4")
    assert outcome.facts["shrinkage"] == 1.0
    assert float((outcome.weight - weight * (outcome.weight != 0)).abs().max()) < 2e-3  # as close as the refit asks


@pytest.mark.parametrize(
    "costs", [[5, 4, 3, 2, 1, 2, 3], [1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1], [3, 1, 2, 3, 4, 5, 6]]
)
def test_the_search_goes_downhill_and_asks_no_more_than_it_must(costs):
    asked = []

    def cost(index):
        asked.append(index)
        return costs[index]

    assert costs[_lowest(cost, 4, 7)] == 1
    assert len(asked) == len(set(asked))
    if costs[4] == 1:
        assert sorted(asked) == [3, 4, 5]
