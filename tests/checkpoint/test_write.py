"""Writing: the input's bytes where nothing changed, ours where something did, and nothing half-written."""

import errno
import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import models
from halve.checkpoint import write as store
from halve.checkpoint.load import LoadedModel, Source, load_model
from halve.checkpoint.room import check_destination
from halve.checkpoint.shards import read_shard
from halve.checkpoint.write import output_bytes, write_checkpoint
from halve.errors import HalveError, InputError, UnsupportedModelError
from halve.maths.pattern import Pattern

PATTERN = Pattern("2:4")


def save(model, path, **options):
    model.save_pretrained(path, **options)
    return path


def prune(loaded, names=None):
    """Project the weights of the blocks; return their names."""
    names = names or [
        name
        for name, parameter in loaded.model.named_parameters()
        if parameter.ndim in {2, 3} and ("layer" in name or ".h." in name)
    ]
    for name in names:
        parameter = loaded.model.get_parameter(name)
        parameter.copy_(PATTERN.project(parameter))
    return names


def read(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def raw(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        for entry in read_shard(path).tensors:
            found[entry.name] = content[entry.start : entry.end]
    return found


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def tiny_tokenizer():
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<eos>": 0, "a": 1}, "<eos>")),
        eos_token="<eos>",  # noqa: S106
        chat_template="{{ messages }}",
    )


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "mixtral", "qwen3_moe", "bert", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, family, dtype):
    """Oracle: the model in memory, the input's raw bytes, and plain from_pretrained."""
    model = models.decoder(family) if family in models.DECODERS else getattr(models, family)()
    before = save(model.to(dtype), tmp_path / "in", max_shard_size="12KB")
    loaded = load_model(before)
    names = prune(loaded)
    out = tmp_path / "out"
    write_checkpoint(out, loaded, names, {})
    again, info = type(model).from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert again.state_dict()[name].dtype == dtype
    changed = {name for parameter in names for name in loaded.layout.locate(parameter).tensors}
    old, new = raw(before), raw(out)
    assert {name for name in old if old[name] != new[name]} == changed
    assert old.keys() == new.keys()
    shards = sorted(path.name for path in before.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == sorted(path.name for path in out.glob("*.safetensors"))
    for name in shards:
        assert read_shard(before / name).header == read_shard(out / name).header
    for name in ("config.json", "model.safetensors.index.json"):
        assert (before / name).read_bytes() == (out / name).read_bytes()


def test_unknown_tensors_metadata_and_companions_are_kept(tmp_path):
    before = save(models.decoder("llama"), tmp_path / "in")
    tensors = load_file(before / "model.safetensors") | {"mtp.0.weight": torch.tensor([[-0.0, 1.0]])}
    save_file(tensors, before / "model.safetensors", {"format": "pt", "note": "kept"})
    tiny_tokenizer().save_pretrained(before)
    for name in ("README.md", "evil.py", "pytorch_model.bin", "LICENSE"):
        (before / name).write_text(name)
    (before / "additional_chat_templates").mkdir()
    (before / "additional_chat_templates" / "tools.jinja").write_text("x")
    loaded = load_model(before)
    write_checkpoint(tmp_path / "out", loaded, prune(loaded), {})
    old, new = contents(before), contents(tmp_path / "out")
    assert raw(tmp_path / "out")["mtp.0.weight"] == raw(before)["mtp.0.weight"]
    assert read_shard(before / "model.safetensors").header == read_shard(tmp_path / "out/model.safetensors").header
    old["BASE_MODEL_README.md"] = old.pop("README.md")
    assert new.keys() == (old.keys() | {"halve.json"}) - {"evil.py", "pytorch_model.bin"}
    assert all(new[name] == old[name] for name in new.keys() - {"halve.json", "model.safetensors"})


def test_only_what_is_named_is_written(tmp_path):
    before = save(models.decoder("llama"), tmp_path / "in")
    loaded = load_model(before)
    first, *others = prune(loaded)
    write_checkpoint(tmp_path / "out", loaded, [first], {})
    old, new = raw(before), raw(tmp_path / "out")
    assert {name for name in old if old[name] != new[name]} == {first}
    assert others


def test_zeros_are_positive_and_the_dtype_is_the_inputs(tmp_path):
    before = save(models.decoder("llama").to(torch.float16), tmp_path / "in")
    loaded = load_model(before, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = loaded.model.get_parameter(name)
    parameter.zero_()
    parameter[0, :4] = torch.tensor([-0.0, -1e-12, 0.5, -0.5])  # the second rounds to -0.0 in float16
    write_checkpoint(tmp_path / "out", loaded, [name], {})
    tensor = read(tmp_path / "out")[name]
    assert tensor.dtype == torch.float16
    assert tensor[0, :4].tolist() == [0.0, 0.0, 0.5, -0.5]
    assert torch.signbit(tensor).sum() == 1


def test_record_lists_the_files(tmp_path):
    loaded = load_model(save(models.decoder("llama"), tmp_path / "in", max_shard_size="40KB"))
    out = tmp_path / "out"
    sums = write_checkpoint(out, loaded, prune(loaded), {"pattern": "2:4", "name": "é"})
    record = json.loads((out / "halve.json").read_text())
    assert (record["pattern"], record["name"]) == ("2:4", "é")
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in contents(out).items()}
    assert record["files"] == {name: digest for name, digest in sums.items() if name != "halve.json"}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral", "gpt2", "bert", "vit"])
def test_a_model_from_memory_is_written_whole(tmp_path, family, monkeypatch):
    monkeypatch.setattr(store, "MAX_SHARD", 40_000)
    model = models.decoder(family) if family in models.DECODERS else getattr(models, family)()
    model.config.quantization_config = {"quant_method": "gguf"}
    loaded = LoadedModel(model.requires_grad_(False), tiny_tokenizer(), None)
    names = prune(loaded)
    out = tmp_path / "out"
    write_checkpoint(out, loaded, names, {})
    again, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert tf.AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(value) for value in raw(out).values())
    assert output_bytes(loaded) == index["metadata"]["total_size"]
    for path in shards:
        shard = read_shard(path)
        assert len(shard.tensors) == 1 or path.stat().st_size - len(shard.header) <= 40_000


def test_a_model_from_memory_can_change_its_dtype(tmp_path):
    loaded = LoadedModel(models.decoder("llama_tied").requires_grad_(False), None, None)
    out = tmp_path / "out"
    write_checkpoint(out, loaded, prune(loaded), {}, dtype=torch.bfloat16)
    again = tf.LlamaForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in read(out)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16())
    assert loaded.model.dtype == torch.float32
    assert loaded.model.config.dtype != torch.bfloat16
    assert output_bytes(loaded, torch.bfloat16) * 2 == output_bytes(loaded)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_refused_before_anything_is_written(tmp_path, bad):
    before = save(models.decoder("llama").to(torch.float16), tmp_path / "in")
    loaded = load_model(before, dtype=torch.float32)
    names = prune(loaded)
    loaded.model.model.layers[1].mlp.down_proj.weight[0, 0] = bad
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*float16"):
        write_checkpoint(tmp_path / "out", loaded, names, {})
    assert not (tmp_path / "out").exists()
    whole = LoadedModel(loaded.model, None, None)
    with pytest.raises(InputError, match="NaN or infinity"):
        write_checkpoint(tmp_path / "out", whole, [], {}, dtype=torch.float16)


def test_arguments_that_cannot_be_meant(tmp_path):
    loaded = load_model(save(models.decoder("llama"), tmp_path / "in"))
    out = tmp_path / "out"
    with pytest.raises(InputError, match="leave dtype out"):
        write_checkpoint(out, loaded, [], {}, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="no parameter 'nothing'"):
        write_checkpoint(out, loaded, ["nothing"], {})
    for record in ({"loss": float("nan")}, {"x": object()}):
        with pytest.raises(InputError, match="record cannot be written"):
            write_checkpoint(out, loaded, [], record)
    assert not out.exists()


def test_order_of_writes_and_flushes(tmp_path, monkeypatch):
    """Power loss cannot be simulated, so the order is asserted: data, fsync, rename, fsync of the directory."""
    loaded = load_model(save(models.decoder("llama"), tmp_path / "in", max_shard_size="40KB"))
    out = tmp_path / "out"
    events = []
    fsync, rename = os.fsync, type(out).replace

    def spy_fsync(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        events.append(("fsync", name, os.fstat(descriptor).st_size if name.endswith(".tmp") else None))
        fsync(descriptor)

    def spy_rename(path, target):
        events.append(("rename", target.name, path.stat().st_size))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(type(out), "replace", spy_rename)
    sums = write_checkpoint(out, loaded, prune(loaded), {})
    assert events.pop(0) == ("fsync", tmp_path.name, None)
    names = [name for kind, name, _ in events if kind == "rename"]
    assert sorted(names) == sorted(sums)
    assert names[-3:] == ["halve.json", "model.safetensors.index.json", "config.json"]
    for i, name in enumerate(names):
        size = (out / name).stat().st_size
        assert events[3 * i : 3 * i + 3] == [
            ("fsync", f".{name}.tmp", size),
            ("rename", name, size),
            ("fsync", "out", None),
        ]


@pytest.mark.parametrize("made", [False, True])
def test_a_failure_at_any_write_leaves_nothing(tmp_path, monkeypatch, made):
    loaded = load_model(save(models.decoder("llama"), tmp_path / "in", max_shard_size="40KB"))
    (tmp_path / "in/additional_chat_templates").mkdir()
    (tmp_path / "in/additional_chat_templates/tools.jinja").write_text("x")
    names = prune(loaded)
    out = tmp_path / "new" / "out"
    before = contents(tmp_path / "in")
    if made:
        out.mkdir(parents=True)
    fsync = os.fsync
    for count in range(200):
        left = [count]

        def failing(descriptor, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        try:
            write_checkpoint(out, loaded, names, {})
        except HalveError as error:
            assert "No space left on device" in str(error)  # noqa: PT017 - the loop ends with a success
            assert not list(out.rglob("*")) if made else not out.parent.exists()
        else:
            break
    assert count == 2 * len(contents(out)) + (1 if made else 3)  # two a file, and one a new directory
    assert (out / "config.json").exists()
    assert contents(tmp_path / "in") == before


def test_a_file_size_limit_is_reported(tmp_path):
    loaded = load_model(save(models.decoder("llama"), tmp_path / "in"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(HalveError, match=r"writing .* failed"):
            write_checkpoint(tmp_path / "out", loaded, [], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


def test_a_layout_that_fails_midway_leaves_nothing(tmp_path, monkeypatch):
    loaded = load_model(save(models.decoder("llama"), tmp_path / "in"))

    def fail(*_):
        raise UnsupportedModelError("no")

    monkeypatch.setattr(loaded.layout, "convert", fail)
    with pytest.raises(UnsupportedModelError):
        write_checkpoint(tmp_path / "out", loaded, ["model.layers.2.mlp.up_proj.weight"], {})
    assert not (tmp_path / "out").exists()


def test_destinations_that_would_do_harm(tmp_path, monkeypatch):
    before = save(models.decoder("llama"), tmp_path / "a" / "in")
    source = Source("directory", before, "in", None, (before / "model.safetensors",))
    link = tmp_path / "link"
    link.symlink_to(before)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shutil.move(before / "model.safetensors", blobs / "x")
    (before / "model.safetensors").symlink_to(blobs / "x")
    digest = contents(before)
    for out in (before, before / "out", before / "x" / "y", link, link / "out", tmp_path / "a/../a/in", blobs / "out"):
        with pytest.raises(InputError, match="lies in, the input"):
            check_destination(out, source, 0)
    with pytest.raises(InputError, match="contains the input"):
        check_destination(tmp_path / "a", source, 0)
    for name in ("file", "full"):
        with pytest.raises(InputError, match=r"is a file|not empty"):
            check_destination(make(tmp_path, name), source, 0)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="link to nothing"):
        check_destination(tmp_path / "dangling", source, 0)
    with pytest.raises(InputError, match="not a directory you can write to"):
        check_destination(tmp_path / "file" / "out", source, 0)
    with pytest.raises(InputError, match=r"needs 1000000000\.00 GB"):
        check_destination(tmp_path / "out", source, 10**18)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="not a directory you can write to"):
        check_destination(tmp_path / "out", None, 0)
    assert contents(before) == digest


def make(root, name):
    if name == "file":
        (root / name).write_text("x")
    else:
        (root / name).mkdir()
        (root / name / "x").write_text("x")
    return root / name


def test_destinations_that_are_fine(tmp_path):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "out", tmp_path / "empty", tmp_path / "deep" / "er"):
        check_destination(out, Source("gguf", gguf, "x.gguf"), 1000)
    with pytest.raises(InputError):
        check_destination(gguf, Source("gguf", gguf, "x.gguf"), 0)
