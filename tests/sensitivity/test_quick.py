"""Quickly pruned weights, against sorting by hand."""

import pytest
import torch

from halve.maths.pattern import Pattern
from halve.model.classify import make_plan
from halve.model.plan import Matrix
from halve.sensitivity.quick import input_norms, pruned_in, quickly_pruned
from halve.sensitivity.units import units_of
from models import decoder, tokens

PATTERN = Pattern("2:4")


def matrix(**changes):
    return Matrix(**{"name": "a", "parameter": "a", "block": 0, "d_out": 2, "d_in": 8, **changes})


def two_of_four(weight, norms):
    """Keep the two largest of four by sorting, one group at a time."""
    kept = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 4):
            group = range(start, start + 4)
            for column in sorted(group, key=lambda c: -abs(float(weight[row, c])) * float(norms[c]))[:2]:
                kept[row, column] = weight[row, column]
    return kept


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_wanda_keeps_what_is_large_times_its_input(layout):
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(2, 8, generator=generator), torch.rand(8, generator=generator)
    stored = weight if layout == "out_in" else weight.T.contiguous()
    before = stored.clone()
    found = quickly_pruned(stored, [matrix(layout=layout)], {"a": norms}, PATTERN)
    expected = two_of_four(weight, norms)
    assert torch.equal(found if layout == "out_in" else found.T, expected)
    assert torch.equal(stored, before)


def test_experts_whose_inputs_are_not_watched_go_by_magnitude():
    weight = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1))
    experts = [matrix(name=f"a[{e}]", expert=e) for e in range(2)]
    found = quickly_pruned(weight, experts, {}, PATTERN)
    assert torch.equal(found, torch.stack([two_of_four(part, torch.ones(8)) for part in weight]))


def test_norms_are_over_all_positions_of_all_batches():
    model, ids = decoder("llama"), tokens(4, 6)
    matrices = make_plan(model, PATTERN).matrices
    found = input_norms(model, matrices, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}])
    assert found.keys() == {matrix.name for matrix in matrices}
    seen = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    expected = seen[0].double().flatten(0, 1).norm(dim=0).float()
    torch.testing.assert_close(found["model.layers.1.mlp.up_proj.weight"], expected)
    torch.testing.assert_close(found["model.layers.1.mlp.gate_proj.weight"], expected)


def test_dense_weights_come_back_untouched_whatever_happens():
    model = decoder("llama")
    units = units_of(make_plan(model, PATTERN))
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}

    def fail():
        with pruned_in(model, units[:2], {}, PATTERN):
            assert all(PATTERN.satisfied_by(model.get_parameter(unit.name)) for unit in units[:2])
            assert not PATTERN.satisfied_by(model.get_parameter(units[2].name))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
