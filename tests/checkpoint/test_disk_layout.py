"""Parameters and disk tensors: what transformers fused must come apart again, bit for bit."""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import models
from halve.checkpoint.disk_layout import DiskLayout, DiskTensor
from halve.checkpoint.load import load_model
from halve.errors import InputError, UnsupportedModelError

FAMILIES = [*models.DECODERS, "bert", "vit"]


def build(family):
    return models.decoder(family) if family in models.DECODERS else getattr(models, family)()


def disk(path):
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("written", [True, False])
def test_every_tensor_on_disk_comes_back(tmp_path, family, written):
    """Oracle: what save_pretrained wrote, read by the safetensors library."""
    model = build(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    layout = load_model(tmp_path).layout if written else DiskLayout(model)
    expected = disk(tmp_path)
    got = dict(layout.convert([names[0] for names in layout.everything()]))
    assert got.keys() == expected.keys() == layout.tensors.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("family", models.MIXTURES)
@pytest.mark.parametrize("written", [True, False])
def test_an_expert_is_found_alone(tmp_path, family, written):
    model = models.decoder(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    layout = loaded.layout if written else DiskLayout(model)
    parameter = next(name for name, _ in loaded.model.named_parameters() if name.endswith("experts.gate_up_proj"))
    fused, tensors = loaded.model.get_parameter(parameter), disk(tmp_path)
    assert len(layout.locate(parameter).tensors) == 2 * len(fused)
    for expert in range(len(fused)):
        names = layout.locate(parameter, expert).tensors
        assert torch.equal(torch.cat([tensors[name] for name in names]), fused[expert])


def test_only_the_wanted_tensors_are_converted(tmp_path):
    models.decoder("mixtral").save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    parameter = "model.layers.1.mlp.experts.down_proj"
    first, *_ = loaded.layout.locate(parameter).tensors
    assert [name for name, _ in loaded.layout.convert([parameter], {first})] == [first]
    assert list(loaded.layout.convert([parameter], {"lm_head.weight"})) == []
    twice = [name for name, _ in loaded.layout.convert([parameter, parameter])]
    assert sorted(twice) == sorted(loaded.layout.locate(parameter).tensors)


@pytest.mark.parametrize("on_disk", [["model.embed_tokens.weight"], ["model.embed_tokens.weight", "lm_head.weight"]])
def test_tied_parameters_are_found_under_either_name(on_disk):
    model = models.decoder("llama_tied")
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight" or name in on_disk}
    layout = DiskLayout(model, [DiskTensor(name, value.dtype, tuple(value.shape)) for name, value in state.items()])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert sorted(layout.locate(name).tensors) == sorted(on_disk)


def test_legacy_names_and_a_missing_prefix_are_followed(tmp_path):
    model = models.bert()
    model.save_pretrained(tmp_path)
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in disk(tmp_path).items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_model(tmp_path)
    assert loaded.layout.locate("bert.embeddings.LayerNorm.weight").tensors == ("bert.embeddings.LayerNorm.gamma",)
    tied = models.decoder("llama_tied")
    tied.save_pretrained(tmp_path / "llama")
    tensors = {name.removeprefix("model."): tensor for name, tensor in disk(tmp_path / "llama").items()}
    save_file(tensors, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
    layout = load_model(tmp_path / "llama").layout
    assert layout.locate("model.layers.0.mlp.up_proj.weight").tensors == ("layers.0.mlp.up_proj.weight",)


def test_experts_without_their_prefix_are_followed(tmp_path):
    models.decoder("mixtral", tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = {name.removeprefix("model."): tensor for name, tensor in disk(tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_model(tmp_path)
    got = dict(loaded.layout.convert(["model.layers.2.mlp.experts.gate_up_proj"]))
    assert got.keys() == {f"layers.2.block_sparse_moe.experts.{e}.w{w}.weight" for e in range(4) for w in (1, 3)}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in got.items())


def test_experts_that_the_loader_transposes(tmp_path):
    """Qwen3-VL-MoE: published files hold (expert, in, out), the model (expert, out, in)."""
    text = {**models._SMALL, **models._MOE, "head_dim": 8}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = tf.Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    tensors = disk(tmp_path)
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.model.get_parameter(name), model.get_parameter(name))
    assert loaded.layout.locate(name).transposed
    assert not loaded.layout.locate(name.replace("layers.0", "layers.1")).transposed
    assert torch.equal(dict(loaded.layout.convert([name]))[name], tensors[name])


def test_a_conversion_that_would_not_load_back_is_refused(tmp_path, monkeypatch):
    models.decoder("mixtral").save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    revert = loaded.layout._rules.revert

    def swapped(state):
        tensors = revert(state)
        first, second = list(tensors)[:2]
        return {**tensors, first: tensors[second], second: tensors[first]}

    monkeypatch.setattr(loaded.layout._rules, "revert", swapped)
    with pytest.raises(UnsupportedModelError, match="does not come back"):
        list(loaded.layout.convert(["model.layers.0.mlp.experts.down_proj"]))


def test_bad_input():
    model = models.decoder("llama")
    with pytest.raises(InputError, match="no parameter 'nothing'"):
        DiskLayout(model).locate("nothing")
    empty = DiskLayout(model, [])
    with pytest.raises(UnsupportedModelError, match=r"'lm_head\.weight' has no tensor"):
        empty.locate("lm_head.weight")
    twice = [DiskTensor(name, torch.float32, (64, 32)) for name in ("embed_tokens.weight", "model.embed_tokens.weight")]
    with pytest.raises(UnsupportedModelError, match="on disk twice"):
        DiskLayout(model, twice)
    mixture = models.decoder("mixtral")
    tensors = list(DiskLayout(mixture).tensors.values())
    with pytest.raises(UnsupportedModelError, match="was loaded from 3 tensors"):
        DiskLayout(
            mixture, [tensor for tensor in tensors if "layers.0.block_sparse_moe.experts.3.w2" not in tensor.name]
        )
    with pytest.raises(UnsupportedModelError, match="shape"):
        DiskLayout(mixture, [DiskTensor(t.name, t.dtype, (3, *t.shape[1:])) for t in tensors])
