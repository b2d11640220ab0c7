"""Reading foreign checkpoints: what loads, and what is refused and how."""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import models
from halve.checkpoint import load as checkpoint
from halve.checkpoint.load import LoadedModel, load_model, resolve, skeleton, source_files
from halve.errors import CorruptFileError, InputError, UnsupportedModelError


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "mixtral", "bert", "vit"])
def test_every_parameter_is_loaded(tmp_path, family):
    model = models.decoder(family) if family in models.DECODERS else getattr(models, family)()
    loaded = load_model(models.save(model, tmp_path / "in"))
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    assert loaded.tokenizer is None
    expected, got = model.state_dict(), loaded.model.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
        assert got[name].device.type == "cpu"
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_dtype_is_the_checkpoints_unless_asked(tmp_path):
    path = models.save(models.decoder("llama").to(torch.bfloat16), tmp_path / "in")
    assert load_model(path).model.dtype == torch.bfloat16
    loaded = load_model(path, dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_source_says_what_was_found(sharded):
    source = resolve(str(sharded))
    assert (source.kind, source.path, source.name, source.revision) == ("directory", sharded, str(sharded), None)
    assert source.shards == tuple(sorted(sharded.glob("*.safetensors")))
    assert len(source.shards) > 3
    assert source.size == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))


def test_tokenizer_is_loaded_from_the_same_files(llama):
    words = {"<eos>": 0, "a": 1, "b": 2}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<eos>")), eos_token="<eos>")  # noqa: S106
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(llama)
    loaded = load_model(llama)
    assert loaded.tokenizer.get_vocab() == words
    assert loaded.tokenizer.chat_template == "{{ messages }}"
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer of .* could not be loaded"):
        load_model(llama)


def test_unexpected_tensors_are_fine_and_part_of_the_layout(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["mtp.layers.0.weight"] = torch.ones(4, 4)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    assert "mtp.layers.0.weight" in load_model(llama).layout.tensors


def test_missing_and_mismatched_weights_are_named(llama):
    tensors = load_file(llama / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"random: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(llama)
    tensors["model.layers.1.mlp.up_proj.weight"] = lost[:8].clone()
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"random: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(llama)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_parameter_that_is_not_finite_is_named(llama, bad):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = bad
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.down_proj\.weight.*NaN or infinity"):
        load_model(llama)


def test_files_that_were_not_validated_are_not_seen(llama, monkeypatch):
    """An adapter's base model, code or a pickle would otherwise be within the loader's reach."""
    for name in ("adapter_config.json", "modeling_llama.py", ".metadata", "pytorch_model.bin"):
        (llama / name).write_text("{}")
    load, seen = tf.LlamaForCausalLM.from_pretrained, set()

    def spy(directory, **options):
        seen.update(path.name for path in directory.iterdir())
        return load(directory, **options)

    monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", spy)
    load_model(llama)
    assert seen == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("names", [None, [], ["LlamaForCausalLM", "LlamaModel"], ["NoSuchModel"], ["AutoConfig"], [3]])
def test_unknown_architectures_are_refused(llama, names):
    models.edit_json(llama / "config.json", architectures=names)
    with pytest.raises(UnsupportedModelError, match=r"architectures|does not have"):
        load_model(llama)


def test_what_transformers_cannot_build_is_one_sentence(llama):
    models.edit_json(llama / "config.json", hidden_size="big")
    with pytest.raises(UnsupportedModelError, match="transformers could not load") as caught:
        load_model(llama)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["no/such/thing/here", "./absent", "x.gguf", "a b", ""])
def test_names_that_are_nothing(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"does not exist|has no config"):
        resolve(source)


def test_gguf_files_are_recognised(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    source = resolve(path)
    assert (source.kind, source.path, source.shards, source.size) == ("gguf", path, (), 24)
    with pytest.raises(UnsupportedModelError, match="could not load"):
        load_model(path)
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'halve\[gguf\]'"):
        resolve(path)
    part = tmp_path / "big-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="merge the parts"):
        resolve(part)
    path.write_bytes(b"GGML")
    with pytest.raises(CorruptFileError, match="signature"):
        resolve(path)
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match="is a file"):
        resolve(tmp_path / "model.onnx")


def test_a_model_from_memory_has_a_layout_of_its_own():
    loaded = LoadedModel(models.decoder("llama_tied"), None, None)
    assert loaded.layout.locate("lm_head.weight").tensors == ("model.embed_tokens.weight",)
    assert loaded.layout is loaded.layout


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "mixtral", "bert", "vit"])
def test_a_skeleton_needs_settings_alone(tmp_path, family):
    model = models.decoder(family) if family in models.DECODERS else getattr(models, family)()
    path = models.save(model.to(torch.bfloat16), tmp_path / "in")
    (path / "model.safetensors").unlink()
    source = resolve(path, weights=False)
    assert source_files(source)[0] == path / "config.json"
    built = skeleton(source)
    assert type(built) is type(model)
    assert {name: (p.shape, p.dtype, p.is_meta) for name, p in built.named_parameters()} == {
        name: (p.shape, p.dtype, True) for name, p in model.named_parameters()
    }
    with pytest.raises(InputError, match="has neither"):
        resolve(path)


def test_settings_that_no_model_can_be_built_from_are_refused(llama):
    models.edit_json(llama / "config.json", num_attention_heads=0)
    with pytest.raises(UnsupportedModelError, match="transformers could not build"):
        skeleton(resolve(llama, weights=False))
