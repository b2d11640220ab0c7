"""The damage of each unit alone, against whole forward passes of copies that were pruned by sorting."""

import copy

import pytest
import torch

from halve.maths.pattern import Pattern
from halve.model.plan import Matrix
from halve.model.survey import plan_model
from halve.sensitivity import alone
from halve.sensitivity.alone import damages_alone
from halve.sensitivity.quick import input_norms
from halve.sensitivity.units import units_of
from models import decoder, encoder_decoder, gemma4, pairs, tokens, vit

PATTERN = Pattern("2:4")
GENERATOR = torch.Generator().manual_seed(3)


def of_text(make):
    return lambda: (make(), [{"input_ids": tokens(2, 8)}, {"input_ids": tokens(3, 8, seed=1)}])


MODELS = {
    "llama": of_text(lambda: decoder("llama")),
    "gpt2": of_text(lambda: decoder("gpt2")),
    "mixtral": of_text(lambda: decoder("mixtral")),
    "gemma4": of_text(gemma4),
    "t5": lambda: (encoder_decoder("t5"), [pairs("t5", seed=seed) for seed in range(2)]),
    "vit": lambda: (vit(), [{"pixel_values": torch.randn(4, 3, 16, 16, generator=GENERATOR)}]),
}


def pruned_by_hand(weight, norms):
    """Keep two of four by sorting."""
    scores = (weight.abs() * norms).unflatten(-1, (-1, 4))
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(scores).scatter_(-1, order[..., :2], 1.0).flatten(-2)
    return weight * mask


def brute_force(model, unit, batches, norms):
    """Prune a copy, run all of both models, and compare in float64."""
    other = copy.deepcopy(model)
    for matrix in unit.matrices:
        assert isinstance(matrix, Matrix)
        weight = other.get_parameter(matrix.parameter).data
        weight = weight if matrix.expert is None else weight[matrix.expert]
        weight = weight if matrix.layout == "out_in" else weight.T
        weight.copy_(pruned_by_hand(weight, norms.get(matrix.name, torch.ones(matrix.d_in))))
    total, positions = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            p, q = (each(**batch).logits.double().log_softmax(-1) for each in (model, other))
        total += float((p.exp() * (p - q)).sum())
        positions += p.numel() // p.shape[-1]
    return total / positions


@pytest.mark.parametrize("family", MODELS)
def test_damage_is_that_of_whole_passes(family):
    model, batches = MODELS[family]()
    plan, _ = plan_model(model, batches, PATTERN)
    units, norms = units_of(plan), input_norms(model, plan.matrices, batches)
    found = damages_alone(model, plan.blocks, units, batches, norms, PATTERN)
    assert list(found) == [unit.name for unit in units]
    for unit in units:
        expected = brute_force(model, unit, batches, norms)
        assert found[unit.name] == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert max(found.values()) > 1e-4


def test_blocks_before_the_pruned_one_are_not_computed(monkeypatch):
    model, batches = MODELS["llama"]()
    plan, _ = plan_model(model, batches, PATTERN)
    ran = []
    monkeypatch.setattr(alone, "beginnings", lambda *_: {block: block for block in range(3)})
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index) and None)
    monkeypatch.setattr(alone, "divergence", lambda *_: ran.append("compared") or 0.0)
    damages_alone(model, plan.blocks, units_of(plan)[-1:], batches[:1], {}, PATTERN)
    assert ran == [0, 1, 2, 2, "compared"]
