"""As few dense matrices as a perplexity allows, against trying every number of them."""

import copy
import math
from functools import cache

import pytest
import torch

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.model.classify import make_plan
from halve.sensitivity.budget import fewest_dense, negative_log_likelihood
from halve.sensitivity.choose import by_cost
from halve.sensitivity.quick import quickly_pruned
from halve.sensitivity.units import units_of
from models import decoder, tokens

PATTERN = Pattern("2:4")


@cache
def written():
    """Return what a random model writes itself, so that pruning it makes the text less likely."""
    torch.manual_seed(0)
    with torch.no_grad():
        ids = decoder("llama").generate(tokens(6, 1), do_sample=True, min_length=24, max_length=24, top_k=0)
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]


def loss(model):
    """The model's own loss, which weighs every row alike."""
    ids = torch.cat([batch["input_ids"] for batch in written()])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.fixture
def case():
    model = decoder("llama")
    units = units_of(make_plan(model, PATTERN))
    damages = {unit.name: float(1 + index % 7) for index, unit in enumerate(units)}
    return model, units, damages


def losses_by_number(model, units, damages):
    """Prune copies, with 0, 1, 2, … of the costliest units dense."""
    ranked = by_cost(units, damages)
    found = []
    for dense in range(len(units) + 1):
        other = copy.deepcopy(model)
        for unit in ranked[dense:]:
            parameter = other.get_parameter(unit.name)
            parameter.data = quickly_pruned(parameter.data, unit.matrices, {}, PATTERN)
        found.append(loss(other))
    return found


def test_the_loss_is_the_models_own():
    model = decoder("llama")
    assert negative_log_likelihood(model, written()) == pytest.approx(loss(model), rel=1e-5)


def test_one_unit_less_would_be_too_few(case):
    model, units, damages = case
    losses = losses_by_number(model, units, damages)
    tried = set()
    for level in (0.15, 0.4, 0.7, 0.9):
        ratio = math.exp(level * (max(losses) - losses[-1]))
        chosen = fewest_dense(model, units, damages, written(), {}, PATTERN, ratio)
        count = len(chosen)
        most = losses[-1] + math.log(ratio)
        assert {unit.name for unit in chosen} == {unit.name for unit in by_cost(units, damages)[:count]}
        assert losses[count] <= most + 1e-6
        assert count == 0 or losses[count - 1] > most - 1e-6
        tried.add(count)
    assert len(tried) > 2


def test_a_large_budget_leaves_nothing_dense(case):
    assert fewest_dense(*case, written(), {}, PATTERN, 1e6) == []


def test_a_budget_that_no_matrix_fits_is_refused(case, monkeypatch):
    model, units, damages = case
    said = iter([1.0, *[2.0] * len(units)])
    monkeypatch.setattr("halve.sensitivity.budget.negative_log_likelihood", lambda *_: next(said))
    with pytest.raises(InputError, match=r"a single matrix pruned, perplexity is already more than 1\.5 times"):
        fewest_dense(model, units, damages, written(), {}, PATTERN, 1.5)
