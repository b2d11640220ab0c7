"""Reading foreign checkpoints: what loads, and what is refused and how."""

import shutil
from importlib import import_module

import huggingface_hub
import huggingface_hub.errors as hub
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

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(root, directory, monkeypatch):
    """Lay ``directory`` out as the hub's cache does, and forbid the network."""
    repository = root / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in directory.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


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


def test_revision_is_for_the_hub(llama):
    with pytest.raises(InputError, match="leave the revision out"):
        resolve(llama, revision="main")


def test_a_hub_model_comes_from_the_cache(tmp_path, sharded, monkeypatch):
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    snapshot = cache(tmp_path / "cache", sharded, monkeypatch)
    source = resolve("org/tiny")
    assert (source.kind, source.path, source.name, source.revision) == ("hub", snapshot, "org/tiny", COMMIT)
    loaded = load_model(source)
    assert torch.equal(loaded.model.lm_head.weight, models.decoder("llama").lm_head.weight)
    assert loaded.model.config._name_or_path == "org/tiny"
    (snapshot / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(CorruptFileError, match="leaves"):
        resolve("org/tiny")


def test_only_safetensors_and_settings_are_asked_of_the_hub(tmp_path, sharded, monkeypatch):
    snapshot = cache(tmp_path / "cache", sharded, monkeypatch)
    asked = []

    def download(name, *, revision, allow_patterns, local_files_only):
        asked.append((name, revision, allow_patterns, local_files_only))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("org/tiny", revision="v1")
    (_, first, settings, offline), (_, second, weights, _) = asked
    assert (first, second, offline) == ("v1", COMMIT, True)
    assert weights == sorted(path.name for path in sharded.glob("*.safetensors"))
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) and "." in pattern for pattern in settings)
    asked.clear()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        resolve("org/tiny")
    assert len(asked) == 1  # refused before the weights were fetched


def test_a_hub_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="org/absent is no file or directory here, and its files are not all in the"):
        resolve("org/absent")


def answer(kind, status, code=""):
    """Return an error as the hub's client makes it of an answer."""
    headers = {"X-Error-Code": code} if code else {}
    module = import_module(next(base for base in kind.__mro__ if base.__name__ == "HTTPError").__module__.split(".")[0])
    request = module.Request("GET", "https://huggingface.co/api/models/org/tiny")
    return kind(f"{status} of the hub", response=module.Response(status, headers=headers, request=request))


def no_network():
    """Return what the hub's client raises where names cannot be resolved."""
    error = hub.LocalEntryNotFoundError("Got: ConnectError: a long explanation " + "x" * 300)
    error.__cause__ = ConnectionError("Name or service not known")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (no_network(), "org/tiny is no file or directory here, and the hub cannot be reached: check"),
        (answer(hub.GatedRepoError, 403), "org/tiny is gated on the hub and needs a login: accept its terms there"),
        (answer(hub.RepositoryNotFoundError, 404), "here, and the hub does not know it, or only to those logged in"),
        (answer(hub.RevisionNotFoundError, 404), "the hub has org/tiny, but no revision 'v9' of it: give one of"),
        (answer(hub.HfHubHTTPError, 401), "here, and the hub refuses the login it was given: log in anew"),
        (answer(hub.HfHubHTTPError, 503), r"here, and the hub answers with an error \(503\): try again later"),
        (hub.HFValidationError("Repo id must use"), "here, and the hub has no names like that: give a directory"),
        (OSError(28, "No space left on device"), "org/tiny cannot be stored in the local cache: OSError: .*No space"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_why_the_hub_gave_nothing_is_one_short_sentence(monkeypatch, error, said):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=said) as caught:
        resolve("org/tiny", revision="v9")
    assert len(str(caught.value)) < 160
    assert caught.value.__cause__ is error
    assert caught.value.details.startswith(type(error).__name__)


def test_a_name_that_nobody_has_is_compared_with_what_is_here(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise no_network()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(InputError, match=r"^tinyy is no file or directory here \(did you mean tiny\?\), and the hub"):
        resolve("tinyy")


def test_the_details_of_no_network_are_the_whole_chain(monkeypatch):
    def fail(*_args, **_options):
        raise no_network()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        resolve("missing-name")
    first, second = caught.value.details.splitlines()
    assert first.startswith("LocalEntryNotFoundError: Got: ConnectError")
    assert second == "ConnectionError: Name or service not known"


@pytest.mark.parametrize("name", ["./modle", "models/modle", "models/modle.gguf"])
def test_a_path_with_a_slip_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    (tmp_path / "models" / "model").mkdir(parents=True)
    (tmp_path / "models" / "model.gguf").touch()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_options: pytest.fail("asked the hub"))
    meant = name.replace("modle", "model").removeprefix("./")
    with pytest.raises(InputError, match=f"^{name} does not exist: did you mean {meant}\\? give a directory"):
        resolve(name)


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


def test_of_the_hub_a_skeleton_asks_for_settings_alone(tmp_path, llama, monkeypatch):
    (llama / "model.safetensors").unlink()
    cache(tmp_path / "cache", llama, monkeypatch)
    asked, download = [], huggingface_hub.snapshot_download

    def spy(name, *, allow_patterns, **keywords):
        asked.extend(allow_patterns)
        return download(name, allow_patterns=allow_patterns, **keywords)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
    source = resolve("org/tiny", weights=False)
    assert (source.kind, source.revision, source.shards) == ("hub", COMMIT, ())
    assert asked
    assert not any("safetensors" in pattern for pattern in asked)
    assert len(list(skeleton(source).parameters())) == len(list(models.decoder("llama").parameters()))
