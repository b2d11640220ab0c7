"""The damage of each unit alone, against whole forward passes of copies that were pruned by sorting."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional

import halve
from halve.errors import UnsupportedModelError
from halve.maths.pattern import Pattern
from halve.model.plan import Matrix
from halve.model.survey import plan_model
from halve.sensitivity import alone
from halve.sensitivity.alone import damages_alone
from halve.sensitivity.quick import input_norms
from halve.sensitivity.units import units_of
from models import convnext, decoder, encoder_decoder, gemma4, pairs, resnet, tokens, vit

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


def test_a_block_that_does_not_run_is_named():
    model, batches = MODELS["llama"]()
    plan, _ = plan_model(model, batches, PATTERN)
    model.model.config.num_hidden_layers = 2  # as a model may that drops its layers by itself
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2 does not run .* leave it dense with skip"):
        damages_alone(model, plan.blocks, units_of(plan)[-1:], batches[:1], {}, PATTERN)


def regnet():
    """Return a random RegNet for 16 x 16 grey images: its middle convolutions have groups of eight channels."""
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8}
    return tf.RegNetForImageClassification(tf.RegNetConfig(**sizes, layer_type="x", num_labels=10)).eval()


def telling(model, batch):
    """Return a model whose blocks matter, and whose logits are of the order of one: then every damage can be seen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:  # ConvNeXt begins with 1e-6
                parameter.fill_(1.0)
        spread = model(**batch).logits.std(dim=0).mean()
        [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].weight.div_(spread)
    return model


def norms_by_unfolding(model, unit, batches):
    """Return of each weight of a convolution the norm of its inputs, in the weight's own order of channels and taps."""
    layer = model.get_submodule(unit.name.removesuffix(".weight"))
    seen = []
    with layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0])), torch.no_grad():
        for batch in batches:
            model(**batch)
    weight = layer.weight
    if weight.ndim == 2:
        norms = torch.cat([x.flatten(0, -2) for x in seen]).double().norm(dim=0)
        return norms.expand(weight.shape)
    how = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    columns = torch.cat([functional.unfold(x.double(), layer.kernel_size, **how) for x in seen])
    norms = columns.transpose(0, 1).flatten(1).norm(dim=1).view(layer.groups, 1, *weight.shape[1:])
    return norms.expand(-1, len(weight) // layer.groups, -1, -1, -1).flatten(0, 1)


@pytest.mark.parametrize("make", [resnet, convnext, regnet])
def test_damage_of_convolutions_is_that_of_whole_passes(make):
    generator = torch.Generator().manual_seed(4)
    batches = [{"pixel_values": torch.randn(4, 1, 16, 16, generator=generator)} for _ in range(2)]
    model = telling(make(), batches[0])
    plan, _ = plan_model(model, batches, PATTERN)
    assert any(matrix.layout == "conv" for matrix in plan.matrices)
    assert any(matrix.expert for matrix in plan.matrices) == (make is regnet)
    units, norms = units_of(plan), input_norms(model, plan.matrices, batches)
    found = damages_alone(model, plan.blocks, units, batches, norms, PATTERN)
    for unit in units:
        other = copy.deepcopy(model)
        weight = other.get_parameter(unit.name).data
        by_hand = pruned_by_hand(weight.movedim(1, -1), norms_by_unfolding(model, unit, batches).movedim(1, -1))
        weight.copy_(by_hand.movedim(-1, 1))
        expected = 0.0
        for batch in batches:
            with torch.no_grad():
                p, q = (each(**batch).logits.double().log_softmax(-1) for each in (model, other))
            expected += float((p.exp() * (p - q)).sum()) / 8
        assert expected > 1e-5
        assert found[unit.name] == pytest.approx(expected, rel=5e-3)


def test_convolutions_that_cost_most_stay_dense():
    batch = {"pixel_values": torch.randn(4, 1, 16, 16, generator=GENERATOR)}
    model = telling(resnet(), batch)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    record = halve.prune(model, calibration=[batch], method="wanda", refit="none", keep_dense="20%").record
    kept, pruned = record["keep_dense"]["kept"], record["keep_dense"]["pruned"]
    assert kept
    assert min(kept.values()) > 0.0
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in kept)
    assert all(bool((model.get_parameter(name) == 0).any()) for name in pruned)


@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_passes_through_all_blocks_are_warned_of(family):
    model, batches = MODELS[family]()
    plan, _ = plan_model(model, batches, PATTERN)
    units, said = units_of(plan), []
    damages_alone(model, plan.blocks, units, batches[:1], {}, PATTERN, said.append)
    if family == "llama":
        assert said == []
        return
    (sentence,) = said
    later = sum(unit.blocks != {0} for unit in units)
    assert f"the damage of {later} of {len(units)} parameters is measured by passes through all blocks" in sentence
    assert "up to twice as long" in sentence
