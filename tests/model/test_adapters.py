"""Adapters that are not merged are refused by their structure: peft, which makes them, is not installed here."""

import pytest
import torch
from torch import nn

import halve
import models
from halve.errors import InputError
from halve.model.adapters import refuse_adapters

UP = "model.layers.1.mlp.up_proj"


class Wrapper(nn.Module):
    """What peft's tuner layers have in common."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x)


def lora(base):
    wrapper = Wrapper(base)
    wrapper.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
    wrapper.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})
    wrapper.lora_embedding_A = nn.ParameterDict()
    return wrapper


def dora(base):
    wrapper = lora(base)
    wrapper.lora_magnitude_vector = nn.ModuleDict({"default": nn.LayerNorm(base.out_features)})
    return wrapper


def adalora(base):
    wrapper = Wrapper(base)
    wrapper.lora_A = nn.ParameterDict({"default": torch.randn(4, base.in_features)})
    wrapper.lora_E = nn.ParameterDict({"default": torch.randn(4, 1)})
    wrapper.lora_B = nn.ParameterDict({"default": torch.randn(base.out_features, 4)})
    return wrapper


def ia3(base):
    wrapper = Wrapper(base)
    wrapper.ia3_l = nn.ParameterDict({"default": torch.ones(base.out_features, 1)})
    return wrapper


def oft(base):
    wrapper = Wrapper(base)
    wrapper.oft_R = nn.ModuleDict({"default": nn.Linear(4, 4)})
    return wrapper


def modules_to_save(base):
    wrapper = Wrapper(base)
    del wrapper.base_layer
    wrapper.original_module = base
    wrapper.modules_to_save = nn.ModuleDict({"default": nn.Linear(base.in_features, base.out_features, bias=False)})
    return wrapper


class LoraLinear(nn.Linear):
    """As loralib has it: a layer with the matrices in itself."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.lora_A = nn.Parameter(torch.randn(4, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, 4))


class Unnamed(nn.Module):
    """Low-rank matrices beside a layer, under any names."""

    def __init__(self, base):
        super().__init__()
        self.inner = base
        self.down = nn.Parameter(torch.randn(base.in_features, 4))
        self.up = nn.Parameter(torch.randn(4, base.out_features))


KINDS = [lora, dora, adalora, ia3, oft, modules_to_save, LoraLinear, Unnamed]


def adapted(kind):
    model = models.decoder("llama")
    for block in model.model.layers[1:]:
        block.mlp.up_proj = kind(block.mlp.up_proj)
    return model


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_adapters_are_refused_before_anything_is_done(kind, tmp_path):
    model = adapted(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for out in (None, tmp_path / "out"):
        with pytest.raises(InputError, match=rf"LlamaForCausalLM has adapters beside its weights, {UP}\..*merge them"):
            halve.prune(model, out, method="magnitude", refit="none")
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_whole_model_in_a_wrapper_is_told_the_same(tmp_path):
    wrapper = nn.Module()
    wrapper.base_model = adapted(lora)
    with pytest.raises(InputError, match="has adapters beside its weights, base_model"):
        halve.prune(wrapper, tmp_path / "out", method="magnitude", refit="none")


@pytest.mark.parametrize("family", [*models.DECODERS, "bert", "vit"])
def test_models_without_adapters_are_fine(family):
    refuse_adapters(models.decoder(family) if family in models.DECODERS else getattr(models, family)())


def test_a_wrapper_whose_adapters_were_deleted_has_none():
    model = adapted(Wrapper)
    refuse_adapters(model)
    assert len(halve.prune(model, method="magnitude", refit="none").report.matrices) == 21


def test_two_layers_that_follow_each_other_are_no_adapter():
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(4, 32)

    refuse_adapters(nn.Sequential(Bottleneck()))
