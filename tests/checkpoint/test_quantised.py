"""What is to be pruned must be plain floating point on disk, or is refused with how to make it so."""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import halve
import models
from halve.checkpoint.load import load_model, resolve
from halve.errors import InputError, UnsupportedModelError

UP = "model.layers.1.mlp.up_proj"


def change(directory, changes):
    """Add tensors to the weights of a checkpoint, or take them away."""
    tensors = load_file(directory / "model.safetensors") | changes
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})


def weight(directory, name=UP):
    return load_file(directory / "model.safetensors")[f"{name}.weight"]


def float8(directory):
    scale = weight(directory).abs().amax() / 448
    return {
        f"{UP}.weight": (weight(directory) / scale).to(torch.float8_e4m3fn),
        f"{UP}.weight_scale_inv": scale.float().reshape(1, 1),
    }


def float8_alone(directory):
    return {f"{UP}.weight": weight(directory).to(torch.float8_e5m2)}


def int8(directory):
    scale = weight(directory).abs().amax(1)
    return {f"{UP}.weight": (weight(directory) / scale[:, None] * 127).round().to(torch.int8), f"{UP}.SCB": scale}


def nf4(directory):
    return {
        f"{UP}.weight": torch.zeros(1024, 1, dtype=torch.uint8),
        f"{UP}.weight.absmax": torch.ones(32),
        f"{UP}.weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8),
    }


def gptq(directory):
    return {
        f"{UP}.weight": None,
        f"{UP}.qweight": torch.zeros(4, 64, dtype=torch.int32),
        f"{UP}.qzeros": torch.zeros(1, 8, dtype=torch.int32),
        f"{UP}.scales": torch.ones(1, 64, dtype=torch.float16),
        f"{UP}.g_idx": torch.zeros(32, dtype=torch.int32),
    }


def compressed(directory):
    return {
        f"{UP}.weight": None,
        f"{UP}.weight_packed": torch.zeros(64, 4, dtype=torch.int32),
        f"{UP}.weight_scale": torch.ones(64, 1),
        f"{UP}.weight_shape": torch.tensor([64, 32]),
    }


def cast_without_its_scale(directory):
    return {f"{UP}.weight_scale_inv": torch.ones(1, 1)}


KINDS = {
    float8: ("up_proj.weight' is float8_e4m3fn", "weight_scale_inv", "FineGrainedFP8Config"),
    float8_alone: ("up_proj.weight' is float8_e5m2", "", "FineGrainedFP8Config"),
    int8: ("up_proj.weight' is int8", "up_proj.SCB", "bitsandbytes"),
    nf4: ("up_proj.weight' is uint8", "weight.absmax", "bitsandbytes"),
    gptq: ("", "up_proj.g_idx", "dequantised"),
    compressed: ("", "weight_packed", "dequantised"),
    cast_without_its_scale: ("", "weight_scale_inv", "FineGrainedFP8Config"),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_quantised_weights_without_their_config_are_refused_before_they_are_loaded(llama, tmp_path, kind, monkeypatch):
    change(llama, kind(llama))
    monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(UnsupportedModelError, match="no quantization_config") as caught:
        halve.prune(llama, tmp_path / "out", method="magnitude", refit="none")
    assert all(said in str(caught.value) for said in (str(llama), "prune the unquantised original", *KINDS[kind]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_experts_that_are_fused_while_loading_are_looked_at_too(tmp_path):
    path = models.save(models.decoder("mixtral"), tmp_path / "in")
    name = next(name for name in load_file(path / "model.safetensors") if ".experts.1." in name)
    change(path, {name: load_file(path / "model.safetensors")[name].to(torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedModelError, match=rf"{name}' is float8_e4m3fn"):
        load_model(path)
    change(path, {name: load_file(path / "model.safetensors")[name].float(), f"{name}_scale_inv": torch.ones(1, 1)})
    with pytest.raises(UnsupportedModelError, match=rf"{name}_scale_inv' belongs to quantised weights"):
        load_model(path)


def test_integers_and_float8_that_are_no_weights_are_nobodys_business(llama, tmp_path):
    others = {
        "model.embeddings.position_ids": torch.arange(8).reshape(1, 8),
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "mtp.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
        f"{UP}.input_scale": torch.ones(1),
        "model.layers.1.self_attn.k_scale": torch.ones(1),
        "logit_scale": torch.ones(1),
    }
    change(llama, others)
    halve.prune(llama, tmp_path / "out", method="magnitude", refit="none")
    assert halve.check(tmp_path / "out", against=llama).ok
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name].float(), value.float()) for name, value in others.items())


@pytest.mark.parametrize("family", ["gpt2", "bert", "swin"])
def test_models_with_integer_buffers_are_fine(tmp_path, family):
    if family == "swin":
        model = tf.SwinModel(tf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2]))
    else:
        model = models.bert() if family == "bert" else models.decoder(family)
    path = models.save(model, tmp_path / "in")
    change(path, {"attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8), "index": torch.zeros(2, 2).long()})
    load_model(path)


def test_ordinary_models_are_not_built_twice(llama, monkeypatch):
    monkeypatch.setattr("halve.checkpoint.load.skeleton", None)
    load_model(resolve(llama))


def test_float8_in_memory_is_refused():
    model = models.decoder("llama")
    model.model.layers[0].mlp.up_proj.to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight is torch\.float8_e4m3fn, not plain"):
        halve.prune(model, method="magnitude", refit="none")
