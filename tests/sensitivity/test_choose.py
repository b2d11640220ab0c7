"""The choice of what stays dense, against trying all sets."""

import random
from itertools import chain, combinations

import pytest

from halve.model.plan import Matrix
from halve.sensitivity.choose import by_cost, choose
from halve.sensitivity.units import Unit


def unit(name, weights):
    return Unit((Matrix(name=name, parameter=name, block=0, d_out=1, d_in=weights),))


def best(units, damages, most):
    """Return the most damage that can be spared."""
    sets = chain.from_iterable(combinations(units, count) for count in range(len(units) + 1))
    fitting = (chosen for chosen in sets if sum(each.weights for each in chosen) <= most)
    return max(sum(damages[each.name] for each in chosen) for chosen in fitting)


@pytest.mark.parametrize("seed", range(8))
def test_of_matrices_of_one_size_the_choice_is_the_best(seed):
    draw = random.Random(seed)
    units = [unit(f"{index}", 4) for index in range(7)]
    damages = {each.name: draw.random() for each in units}
    most = 4 * draw.randint(1, 6) + 3
    spared = sum(damages[each.name] for each in choose(units, damages, most))
    assert spared == pytest.approx(best(units, damages, most), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_of_others_it_spares_less_by_the_damage_of_one_at_most(seed):
    draw = random.Random(seed)
    units = [unit(f"{index}", draw.randint(1, 9)) for index in range(7)]
    damages = {each.name: draw.random() for each in units}
    most = draw.randint(5, 30)
    chosen = choose(units, damages, most)
    assert sum(each.weights for each in chosen) <= most
    spared = sum(damages[each.name] for each in chosen)
    assert spared >= best(units, damages, most) - max(damages.values())
    left = most - sum(each.weights for each in chosen)
    assert all(each in chosen or each.weights > left for each in units)  # nothing else fits


def test_what_does_not_fit_is_passed_over_and_equal_ones_keep_their_order():
    units = [unit("a", 2), unit("large", 8), unit("b", 2), unit("c", 2)]
    damages = {"a": 1.0, "large": 8.0, "b": 1.0, "c": 1.0}
    assert [each.name for each in by_cost(units, damages)] == ["large", "a", "b", "c"]
    assert [each.name for each in choose(units, damages, 5)] == ["a", "b"]
    assert [each.name for each in by_cost(units, {**damages, "large": 4.0})] == ["a", "large", "b", "c"]
