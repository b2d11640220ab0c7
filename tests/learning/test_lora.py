"""Adapters that keep zeros: what they compute, train, merge and save, against peft itself and plain arithmetic."""

import importlib
import json
import sys
import warnings
from copy import deepcopy

import peft
import pytest
import torch
from safetensors.torch import load_file

from halve.errors import InputError, UnsupportedModelError
from halve.learning import lora
from halve.learning.adapter import read_adapter
from halve.learning.lora import MaskedLinear, MaskedLoraConfig, adapter_learner
from models import decoder, tokens
from pruned_for_learning import TWO_OF_FOUR, logits, loss_of, pruned_decoder, stock, targets, train


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return request.param


def attached(kind="lora", family="llama", rank=4, **options):
    model, layouts = pruned_decoder(family)
    before = deepcopy(model)
    learner = adapter_learner(kind, targets(model, layouts), rank=rank, **options)
    return model, layouts, learner, list(learner.attach(model)), before


def scrambled(parameters):
    """Give adapters values as a training would, so that B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def by_hand(before, layouts, found, scaling, *, masked=True):
    """Put ``W + M ⊙ s·BA`` into a copy of the model, in float64."""
    model = deepcopy(before)
    for each in targets(model, layouts):
        module = each.name.removesuffix(".weight")
        weight = each.inputs_last(each.tensor.data)
        update = scaling * (
            found[f"{module}.lora_B.default.weight"].double() @ found[f"{module}.lora_A.default.weight"].double()
        )
        if masked:
            update = update * (weight != 0)
        weight.copy_(weight.double() + update)
    return model


@pytest.mark.parametrize("alpha", [None, 10.0])
def test_a_masked_layer_computes_the_masked_sum(family, alpha):
    model, layouts, learner, trained, before = attached(family=family, alpha=alpha)
    torch.testing.assert_close(logits(model), logits(before))  # B is zero
    scrambled(trained)
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}
    oracle = by_hand(before, layouts, found, (4 if alpha is None else alpha) / 4)
    torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(by_hand(before, layouts, found, 1.0, masked=False)), atol=1e-2)
    with learner.unmasked():
        wrong = by_hand(before, layouts, found, (4 if alpha is None else alpha) / 4, masked=False)
        torch.testing.assert_close(logits(model), logits(wrong), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_masked_sum():
    model, _, _, trained, _ = attached()
    scrambled(trained)
    layer = model.model.layers[1].mlp.up_proj
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    layer(x).square().sum().backward()
    a, b = (part.default.weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    weight = layer.base_layer.weight.double()
    (x.double() @ (weight + (weight != 0) * (b @ a)).T).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.default.weight.grad.double(), a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_B.default.weight.grad.double(), b.grad, rtol=1e-4, atol=1e-4)
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_training_and_finishing_leaves_the_plain_model_in_its_pattern(kind, family):
    model, layouts, learner, trained, before = attached(kind, family)
    assert {id(each) for each in trained} == {id(each) for each in model.parameters() if each.requires_grad}
    assert len(trained) == 2 * len(layouts)
    train(model, trained)
    as_trained = logits(model)
    learner.finish()
    assert model.state_dict().keys() == before.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert model.__dict__.keys() == before.__dict__.keys()
    assert all(each.requires_grad for each in model.parameters())
    torch.testing.assert_close(logits(model), as_trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(before), atol=1e-2)
    for name, value in model.state_dict().items():
        old = before.state_dict()[name]
        if name in layouts:
            assert torch.equal(value[old == 0], torch.zeros_like(value[old == 0]))
            assert TWO_OF_FOUR.satisfied_by(value if layouts[name] == "out_in" else value.T)
            assert (value != old).any()
        else:
            assert torch.equal(value, old)


@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_what_is_saved_merges_to_the_very_bits_of_the_trained_model(kind, family, tmp_path):
    model, layouts, learner, trained, before = attached(kind, family, base="someone/pruned")
    train(model, trained)
    learner.save_adapter(tmp_path / "early")
    learner.finish()
    learner.save_adapter(tmp_path / "late", "Perplexity 12.0 merged, 13.0 as stock peft loads it.")
    first, second = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("early", "late"))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    adapter = read_adapter(tmp_path / "late")
    assert adapter.masked
    assert adapter.base == "someone/pruned"
    assert adapter.updates.keys() == {name.removesuffix(".weight") for name in layouts}
    for old, new in zip(targets(before, layouts), targets(model, layouts), strict=True):
        merged = adapter.updates[old.name.removesuffix(".weight")].merged(old.inputs_last(old.tensor), masked=True)
        assert torch.equal(merged, new.inputs_last(new.tensor.data))
    card = (tmp_path / "late" / "README.md").read_text()
    assert card.startswith((tmp_path / "early" / "README.md").read_text())
    assert "Perplexity 12.0 merged" in card
    assert ("different function" in card) == (kind == "lora")
    with pytest.raises(InputError, match="is not an empty directory"):
        learner.save_adapter(tmp_path / "late")


def test_an_adapter_replaces_only_an_adapter(tmp_path):
    _, _, learner, trained, _ = attached()
    learner.save_adapter(tmp_path / "adapter")
    scrambled(trained)
    learner.save_adapter(tmp_path / "adapter", again=True)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in held.items() if "lora_B" in name)
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not an empty directory"):
        learner.save_adapter(tmp_path / "adapter", again=True)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_the_effect_is_what_stock_peft_makes_of_the_saved_adapter(kind, family, tmp_path):
    model, _, learner, trained, before = attached(kind, family)
    scrambled(trained)
    assert learner.effect == ""
    learner.save_adapter(tmp_path / "adapter")
    ids = tokens(2, 12, seed=9)
    with torch.no_grad():
        masked = float(loss_of(model, ids))
        other = float(loss_of(stock(deepcopy(before), tmp_path / "adapter"), ids))
        learner.look_back(lambda: float(loss_of(model, ids)))
        assert float(loss_of(model, ids)) == masked
    if kind == "hira":  # there is nothing to tell
        assert learner.effect == ""
        return
    assert f"with the mask is {masked:.4f} nats a token" in learner.effect
    stated = float(learner.effect.split("token, and ")[1].split(" ")[0])
    assert stated == pytest.approx(other, abs=1e-3)
    assert abs(masked - other) > 1e-2


def test_stock_peft_makes_another_function_of_a_masked_adapter(family, tmp_path):
    model, _, learner, trained, before = attached(family=family)
    train(model, trained)
    learner.save_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["halve_mask"] == "nonzero"
    with pytest.warns(UserWarning, match="halve_mask"):
        peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    loaded = stock(deepcopy(before), tmp_path / "adapter")
    assert not torch.allclose(logits(loaded), logits(model), atol=1e-2)
    with learner.unmasked():
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    share = float((tmp_path / "adapter" / "README.md").read_text().split("update, ")[1].split("%")[0])
    assert 30 < share < 70


def test_stock_peft_makes_the_same_of_hira(family, tmp_path):
    model, _, learner, trained, before = attached("hira", family)
    train(model, trained)
    learner.save_adapter(tmp_path / "adapter")
    loaded = stock(deepcopy(before), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merge_of_peft_keeps_the_zeros_of_hira(family, dtype, tmp_path):
    model, layouts, learner, trained, before = attached("hira", family)
    train(model, trained)
    learner.save_adapter(tmp_path / "adapter")
    learner.finish()
    merged = stock(deepcopy(before).to(dtype), tmp_path / "adapter").merge_and_unload()
    for old, new, ours in zip(*(targets(each, layouts) for each in (before, merged, model)), strict=True):
        assert torch.equal(new.tensor == 0, old.tensor == 0)
        exact = dtype == torch.float32
        torch.testing.assert_close(
            new.tensor.float(), ours.tensor, rtol=1e-5 if exact else 0.03, atol=1e-6 if exact else 1e-2
        )


def test_in_any_trainer_a_masked_config_goes_through_peft_itself(family, tmp_path):
    model, layouts = pruned_decoder(family)
    before = deepcopy(model)
    names = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in layouts})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, MaskedLoraConfig(r=4, lora_alpha=8, target_modules=names))
    layers = [module for module in wrapped.modules() if isinstance(module, MaskedLinear)]
    assert len(layers) == len(layouts)
    train(wrapped, [each for each in wrapped.parameters() if each.requires_grad])
    as_trained = logits(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path)
    assert "halve_mask" not in "".join(load_file(tmp_path / "adapter_model.safetensors"))
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), as_trained, rtol=1e-4, atol=1e-4)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped), as_trained, rtol=1e-4, atol=1e-4)
    merged = wrapped.merge_and_unload()
    adapter = read_adapter(tmp_path)
    assert adapter.masked
    for old, new in zip(targets(before, layouts), targets(merged, layouts), strict=True):
        assert torch.equal(new.tensor[old.tensor == 0], old.tensor[old.tensor == 0])
        ours = adapter.updates[old.name.removesuffix(".weight")].merged(old.inputs_last(old.tensor), masked=True)
        torch.testing.assert_close(ours, new.inputs_last(new.tensor.data))


def test_dropout_takes_a_product_of_its_own_and_ends_with_training():
    model, _ = pruned_decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, MaskedLoraConfig(target_modules=["up_proj"], lora_dropout=0.5))
    layer = wrapped.base_model.model.model.layers[0].mlp.up_proj
    scrambled([each for each in wrapped.parameters() if each.requires_grad])
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(3))
    exact = layer.eval()(x)
    torch.manual_seed(0)
    noisy = torch.stack([layer.train()(x) for _ in range(200)])
    assert not torch.allclose(noisy[0], noisy[1])
    torch.testing.assert_close(noisy.mean(0).mean(0), exact.mean(0), rtol=0.05, atol=0.05)


def test_checkpointed_gradients_are_the_same():
    found = []
    for checkpointing in (False, True):
        model, _, _, trained, _ = attached()
        scrambled(trained)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        loss_of(model, tokens(2, 12)).backward()
        found.append([each.grad for each in trained])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_under_autocast_masters_stay_float32_and_the_merged_model_computes_the_same(kind):
    model, _, learner, trained, _ = attached(kind)
    with torch.autocast("cpu", torch.bfloat16):
        train(model, trained)
        as_trained = logits(model)
    assert {each.dtype for each in trained} == {torch.float32}
    assert all(each.grad.dtype == torch.float32 for each in trained)
    learner.finish()
    with torch.autocast("cpu", torch.bfloat16):
        merged = logits(model)
    if kind == "lora":  # one product of the very sum
        torch.testing.assert_close(merged, as_trained, rtol=1e-2, atol=1e-2)
    else:
        assert (merged - as_trained).abs().mean() < 0.05 * as_trained.abs().mean()


def test_a_seed_gives_the_same_adapter_whatever_was_drawn_before():
    found = []
    for drawn in range(2):
        model, layouts = pruned_decoder()
        learner = adapter_learner("lora", targets(model, layouts), seed=5)
        torch.manual_seed(drawn)
        found.append([each.detach().clone() for each in learner.attach(model)])
        assert torch.initial_seed() == drawn
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_fused_experts_stay_frozen_and_are_named():
    model, layouts = pruned_decoder("mixtral")
    fused = {name: "out_in" for name, each in model.named_parameters() if each.ndim == 3}
    learner = adapter_learner("lora", targets(model, layouts | fused))
    assert "experts" in learner.notes[0]
    assert "stay frozen" in learner.notes[0]
    learner.attach(model)
    assert not any(model.get_parameter(name).requires_grad for name in fused)
    with pytest.raises(InputError, match=r"no pruned linear layer that an adapter could be put on \(.*experts.* none"):
        adapter_learner("lora", targets(decoder("mixtral"), fused))
    with pytest.raises(InputError, match="no pruned linear layer that an adapter could be put on: train all"):
        adapter_learner("lora", [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "loha"}, "unknown adapter 'loha'"),
        ({"kind": "lora", "rank": 0}, "rank of the adapter must be a whole number"),
        ({"kind": "lora", "alpha": -1.0}, "alpha of the adapter must be"),
        ({"kind": "hira", "alpha": 8.0}, "hira has no alpha"),
    ],
)
def test_what_cannot_be_had_is_refused(options, message):
    model, layouts = pruned_decoder()
    with pytest.raises(InputError, match=message):
        adapter_learner(targets=targets(model, layouts), **options)


def test_an_update_that_is_not_finite_is_not_merged():
    _, layouts, learner, trained, before = attached()
    scrambled(trained)
    trained[-1].data[0, 0] = float("inf")
    with pytest.raises(UnsupportedModelError, match=r"the adapter of .*down_proj is not finite"):
        learner.finish()
    for old, new in zip(targets(before, layouts), learner._targets, strict=True):
        assert torch.equal(old.tensor, new.tensor)


def test_another_peft_or_none_is_told_in_a_sentence(monkeypatch):
    model, layouts = pruned_decoder()
    monkeypatch.setattr(lora, "version", lambda _name: "0.22.0")
    with pytest.raises(InputError, match=r"adapters need peft>=0\.21,<0\.22, and peft 0\.22\.0 is installed"):
        adapter_learner("lora", targets(model, layouts))
    monkeypatch.delitem(sys.modules, "halve.learning.lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"adapters need peft>=0\.21,<0\.22: pip install 'halve\[adapters\]'"):
        importlib.import_module("halve.learning.lora")
