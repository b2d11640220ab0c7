import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, dynamic_module_utils

import models
from halve.checkpoint.load import has_tokenizer, load_model
from halve.checkpoint.shards import read_shard
from halve.errors import CorruptFileError, InputError, UnsupportedModelError
from halve.evaluation.perplexity import perplexity
from halve.maths.pattern import Pattern
from halve.packed import load as loading
from halve.packed.load import load
from halve.packed.read import PackedCheckpoint, open_packed, unpack_checkpoint
from halve.packed.write import pack_checkpoint
from halve.pruning import prune
from halve.runtime.linear import SparseLinear
from halve.verification import check
from own_code import CONFIGURATION, MODELLING, some_tokens
from packed_models import packed, prune_layers, pruned, record_again, sums


def same_state(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def sparse_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


@pytest.mark.parametrize("family", models.DECODERS)
def test_is_the_plain_model_in_every_respect_but_memory(family, tmp_path):
    made = pruned(tmp_path, family, dtype=torch.float32)
    models.edit_json(made / "generation_config.json", repetition_penalty=1.5)
    record_again(made)
    directory = pack_checkpoint(made, tmp_path / "packed").out
    ours, plain = load(directory), load_model(made)
    assert ours.model.generation_config.repetition_penalty == 1.5
    listed = open_packed(directory).manifest.matrices
    experts = {name for name in listed if ".experts." in name}
    assert len(sparse_layers(ours.model)) == len(listed) - len(experts) > 0
    assert bool(experts) == (family in models.MIXTURES) == bool(ours.notes)
    if experts:
        assert ours.notes[0].startswith(f"{len(experts)} of {len(listed)} packed matrices are dense in memory")
    assert type(ours.model) is type(plain.model)
    assert not ours.model.training
    assert not any(module.training for module in ours.model.modules())
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())
    assert ours.model.generation_config.to_dict() == plain.model.generation_config.to_dict()
    assert ours.model.config.to_dict() == {**plain.model.config.to_dict(), "_name_or_path": str(directory)} or (
        ours.model.config.to_dict() == plain.model.config.to_dict()
    )
    assert ours.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    buffers = dict(plain.model.named_buffers())
    for name, buffer in buffers.items():
        assert torch.equal(ours.model.get_buffer(name), buffer), name
    same_state(ours.model, plain.model)
    x = models.tokens(2, 12)
    with torch.no_grad():
        assert_close(ours.model(x).logits, plain.model(x).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.model.generate(x, **options), plain.model.generate(x, **options))
    ours.model.save_pretrained(tmp_path / "ours")
    plain.model.save_pretrained(tmp_path / "theirs")
    assert sums(tmp_path / "ours") == sums(tmp_path / "theirs")


def test_tied_weights_stay_tied(tmp_path):
    model = load(packed(tmp_path, "llama_tied")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_several_shards(tmp_path):
    directory = packed(tmp_path, max_shard_size="40KB")
    assert len(list(directory.glob("packed-*.safetensors"))) > 2
    same_state(load(directory).model, load_model(tmp_path / "plain").model)


def load_counting(monkeypatch, directory, **options):
    """Load, and return the model, how often it was put together, and the names of the matrices unpacked."""
    times, unpacked = [], []
    assemble, tensor = loading.assemble, PackedCheckpoint.tensor

    def noted(checkpoint, entry):
        unpacked.extend([entry.name] if entry.name in checkpoint.manifest.matrices else [])
        return tensor(checkpoint, entry)

    monkeypatch.setattr(loading, "assemble", lambda *args, **named: times.append(1) or assemble(*args, **named))
    monkeypatch.setattr(PackedCheckpoint, "tensor", noted)
    return load(directory, **options), len(times), sorted(unpacked)


def test_a_dtype_that_is_not_packed_is_unpacked_once_and_named(tmp_path, monkeypatch):
    directory = packed(tmp_path)
    ours, times, unpacked = load_counting(monkeypatch, directory, dtype=torch.float64)
    (note,) = ours.notes
    assert note.startswith("21 of 21 packed matrices are dense in memory, because float64 is not packed: model.layers.")
    assert (times, unpacked) == (1, sorted(open_packed(directory).manifest.matrices))


def test_a_tensor_of_several_matrices_is_unpacked_once_and_named(tmp_path, monkeypatch):
    torch.manual_seed(0)
    settings = {**models.DECODERS["mixtral"][1], "num_local_experts": 3}
    dense = models.save(GraniteMoeForCausalLM(GraniteMoeConfig(**settings)).bfloat16(), tmp_path / "dense")
    prune(dense, tmp_path / "plain", method="magnitude", refit="none")
    directory = pack_checkpoint(tmp_path / "plain", tmp_path / "packed").out
    ours, times, unpacked = load_counting(monkeypatch, directory)
    (note,) = ours.notes
    assert note.startswith(
        "6 of 18 packed matrices are dense in memory, because each is several matrices in one tensor: "
        "model.layers.0.block_sparse_moe.input_linear.weight, "
    )
    experts = [name for name in open_packed(directory).manifest.matrices if "block_sparse_moe" in name]
    assert (times, unpacked) == (1, sorted(experts))
    assert len(sparse_layers(ours.model)) == 12
    same_state(ours.model, load_model(tmp_path / "plain").model)


def test_only_what_has_no_place_is_unpacked_and_the_model_loaded_again(tmp_path, monkeypatch):
    directory = packed(tmp_path, "mixtral")
    ours, times, unpacked = load_counting(monkeypatch, directory)
    (note,) = ours.notes
    assert note.startswith("36 of 48 packed matrices are dense in memory, because the model has no plain linear layer")
    experts = [name for name in open_packed(directory).manifest.matrices if ".experts." in name]
    assert (times, unpacked) == (2, sorted(experts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_another_dtype_is_the_plain_models_in_it(dtype, tmp_path):
    ours = load(packed(tmp_path), dtype=dtype)
    same_state(ours.model, load_model(tmp_path / "plain", dtype=dtype).model)
    assert bool(ours.notes) == (dtype == torch.float64)
    assert bool(sparse_layers(ours.model)) == (dtype != torch.float64)


def test_a_config_without_a_dtype_takes_the_tensors_own(tmp_path):
    plain = pruned(tmp_path)
    config = json.loads((plain / "config.json").read_text())
    del config["dtype"]
    (plain / "config.json").write_text(json.dumps(config))
    record_again(plain)
    ours = load(pack_checkpoint(plain, tmp_path / "packed").out)
    assert len(sparse_layers(ours.model)) == 21
    same_state(ours.model, load_model(plain).model)


def test_a_value_that_another_dtype_makes_infinite_is_named(tmp_path):
    dense = models.decoder("llama").to(torch.bfloat16)
    dense.model.layers[1].mlp.up_proj.weight.data[:, 0] = 1e5
    plain = models.save(dense, tmp_path / "dense")
    for name, parameter in dense.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            parameter.data = Pattern("2:4").project(parameter.data)
    models.save(dense, plain)
    directory = pack_checkpoint(plain, tmp_path / "packed", "2:4").out
    load(directory)
    with pytest.raises(InputError, match=r"up_proj\.weight' holds NaN or infinity in torch\.float16"):
        load(directory, dtype=torch.float16)


def test_a_plain_checkpoint_is_loaded_as_ever(tmp_path):
    plain = pruned(tmp_path)
    same_state(load(plain).model, load_model(plain).model)
    assert not sparse_layers(load(plain).model)


class Derived(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda model, layer: None, True),
        (lambda model, layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())), False),
        (lambda model, layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().mT)), False),
        (lambda model, layer: setattr(layer, "__class__", Derived), False),
        (lambda model, layer: setattr(model[1], "weight", layer.weight), False),
        (
            lambda model, layer: (
                layer.bias.data.__class__ and setattr(layer, "bias", nn.Parameter(torch.ones(8).half()))
            ),
            False,
        ),
    ],
)
def test_only_an_untouched_stand_in_in_one_plain_layer_is_a_place(change, found):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    stand_in = loading._StandIn(loading._stand_in((8, 8), torch.float32), transposed=False)
    model[0].weight = nn.Parameter(stand_in.tensor)
    change(model, model[0])
    assert loading._places(model, {"a": stand_in}) == ({"a": "0"} if found else {})


def test_without_the_kernels_it_says_so(tmp_path, monkeypatch):
    directory = packed(tmp_path)
    monkeypatch.setattr(loading, "instruction_sets", lambda: ())
    monkeypatch.setattr(loading, "describe", lambda: "no kernels here")
    assert "no kernels here" in load(directory).notes


def test_is_measured_like_any_model_and_not_pruned_again(tmp_path):
    ours, plain = load(packed(tmp_path, dtype=torch.float32)), load_model(tmp_path / "plain")
    found, expected = (perplexity(each.model, some_tokens(), forward_dtype="float32").nll for each in (ours, plain))
    assert found == pytest.approx(expected, rel=1e-4)
    assert has_tokenizer(ours.source)
    with pytest.raises(UnsupportedModelError, match="halve unpack"):
        _ = ours.layout


def test_code_beside_the_weights_runs_only_where_it_is_trusted(tmp_path, modules, monkeypatch):
    marker = tmp_path / "the code was run"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    plain = pruned(tmp_path)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    models.edit_json(plain / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=classes)
    (plain / "configuration_own.py").write_text(CONFIGURATION.format(marker=str(marker)))
    (plain / "modeling_own.py").write_text(MODELLING)
    record_again(plain)
    directory = pack_checkpoint(plain, tmp_path / "packed", trust_remote_code=True).out
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        load(directory)
    assert not marker.exists()
    ours = load(directory, trust_remote_code=True)
    assert marker.exists()
    assert type(ours.model).__name__ == "OwnForCausalLM"
    same_state(ours.model, load_model(plain, trust_remote_code=True).model)


MEASURE = """
import re, sys, json
from pathlib import Path
import psutil, torch
from transformers import LlamaForCausalLM
from halve.packed.load import load

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

load(sys.argv[1])  # what is allocated once
before = psutil.Process().memory_info().rss
Path("/proc/self/clear_refs").write_text("5")
loaded = load(sys.argv[2])
print(json.dumps([peak() - before, psutil.Process().memory_info().rss - before]))
"""


GIVES_BACK = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes glibc return freed memory at once: otherwise a third of what is measured is chance."""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured as Linux does")
def test_memory_stays_well_below_the_dense_size(tmp_path):
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "vocab_size": 320}
    model = models.decoder("llama", **shape).to(torch.bfloat16)
    for parameter in model.model.layers.parameters():
        if parameter.ndim == 2:
            parameter.data = Pattern("2:4").project(parameter.data)
    dense = models.save(model, tmp_path / "dense")
    size = (dense / "model.safetensors").stat().st_size
    assert size > 90e6
    directory = pack_checkpoint(dense, tmp_path / "packed", "2:4").out
    small = packed(tmp_path / "small")
    found = {}
    for name, path in (("dense", dense), ("packed", directory)):
        command = [sys.executable, "-c", MEASURE, str(small), str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, env=GIVES_BACK).stdout
        found[name] = json.loads(printed)
    assert found["dense"][0] > 0.95 * size  # the measurement sees what it should
    assert max(found["packed"]) < 0.8 * size, found
    assert max(found["packed"]) < found["dense"][0] - 0.4 * size, found  # of the 0.44 that are saved


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_quantised_one_is_the_model_with_rounded_weights(family, values, tmp_path):
    directory = pack_checkpoint(pruned(tmp_path, family), tmp_path / "packed", values=values).out
    unpack_checkpoint(directory, tmp_path / "back")
    ours, plain = load(directory), load_model(tmp_path / "back")
    same_state(ours.model, plain.model)
    layers = [module for module in ours.model.modules() if isinstance(module, SparseLinear)]
    assert layers
    assert {layer.bits for layer in layers} == {int(values.removeprefix("int"))}
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        got, expected = (loaded.model(ids).logits.float() for loaded in (ours, plain))
    assert (got - expected).norm() < 0.05 * expected.norm()  # inputs are rounded too
    wide = load(directory, dtype=torch.float32)
    with torch.inference_mode():
        assert (wide.model(ids).logits - expected).norm() < 0.05 * expected.norm()


def test_scales_that_mean_nothing_are_refused_by_the_name_of_their_matrix(tmp_path):
    directory = pack_checkpoint(pruned(tmp_path), tmp_path / "packed", values="int8").out
    name = "model.layers.1.mlp.up_proj.weight"
    path = directory / "packed.safetensors"
    start = next(entry.start for entry in read_shard(path).tensors if entry.name == f"{name}.scales")
    with path.open("r+b") as file:
        file.seek(start)
        file.write(torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8).numpy().tobytes())
    with pytest.raises(CorruptFileError, match=rf"tensor '{name}' .* is corrupt: a scale .* is negative or not finite"):
        load(directory)
    checked = check(directory)
    assert not checked.ok
    assert any("a scale of a packed matrix" in problem for problem in checked.problems)


def test_why_a_next_token_is_not_computed_in_one_call_is_an_attribute(tmp_path):
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    made = prune_layers(models.decoder("llama", **wide))
    made.save_pretrained(tmp_path / "plain")
    directory = pack_checkpoint(tmp_path / "plain", tmp_path / "packed", "2:4").out
    assert load(directory).decoding == ""
    assert load(directory, one_call=False).decoding == "one call was not asked for"
    assert load(tmp_path / "plain").decoding == ""
    other = pack_checkpoint(pruned(tmp_path / "gpt2", "gpt2"), tmp_path / "other").out
    assert "GPT2LMHeadModel is not of a family" in load(other).decoding
