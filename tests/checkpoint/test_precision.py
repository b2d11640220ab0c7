"""The dtype on disk decides what is pruned and written, whatever the config names."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import halve
import models
from halve.checkpoint.load import load_model, resolve
from halve.checkpoint.precision import differing_dtypes, dtype_in_config, dtype_to_prune_in, dtypes_on_disk
from halve.errors import UnsupportedModelError
from halve.pruning import _run_dtype
from halve.whole_model import load_found

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MLP = "model.layers.1.mlp.up_proj.weight"


def stored(path, dtype, named):
    """Write a tiny Llama in one dtype with a config that names another, by either of its keys."""
    models.save(models.decoder("llama").to(dtype), path)
    config = json.loads((path / "config.json").read_text())
    config.pop("dtype")
    (path / "config.json").write_text(json.dumps(config | named))
    return path


def kept_are_the_sources(before, after):
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    pruned = 0
    for name, value in old.items():
        assert new[name].dtype == value.dtype
        changed = new[name].view(torch.uint8) != value.view(torch.uint8)
        assert bool((new[name][changed.view(*value.shape, -1).any(-1)] == 0).all()), name
        pruned += int((new[name] == 0).sum()) if "_proj" in name else 0
    return pruned


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("named", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": "float16"}])
def test_weights_that_are_kept_are_the_sources_bit_for_bit(tmp_path, named, method):
    dense = stored(tmp_path / "in", torch.float32, named)
    values = torch.cat([value.flatten() for value in load_file(dense / "model.safetensors").values()])
    assert bool((values.to(torch.bfloat16).float() != values).any())  # else the test could not fail
    pruned = halve.prune(dense, tmp_path / "out", method=method, refit="none", calibration=models.tokens())
    assert {parameter.dtype for parameter in pruned.model.parameters()} == {torch.float32}
    weights = sum(torch.Size(matrix["shape"]).numel() for matrix in pruned.record["matrices"])
    assert kept_are_the_sources(dense, tmp_path / "out") == weights // 2
    for name, value in load_file(dense / "model.safetensors").items():  # the mask is that of the values on disk
        if method == "magnitude" and "_proj" in name:
            wanted = halve.Pattern("2:4").project(value)
            assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], wanted)
    assert (tmp_path / "out" / "config.json").read_bytes() == (dense / "config.json").read_bytes()
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == NAMES[next(iter(named.values()))]


def test_it_is_said_once_and_put_on_record(tmp_path):
    dense = stored(tmp_path / "in", torch.float32, {"dtype": "bfloat16"})
    pruned = halve.prune(dense, tmp_path / "out", method="magnitude", refit="none")
    sentence = (
        "the weights are float32 on disk and config.json names bfloat16: they are pruned in float32 and written as "
        "they are on disk, and transformers loads them in bfloat16 unless it is told otherwise"
    )
    assert pruned.notes == (sentence,)
    assert json.loads((tmp_path / "out" / "halve.json").read_text())["warnings"].count(sentence) == 1
    same = stored(tmp_path / "same", torch.bfloat16, {"dtype": "bfloat16"})
    assert halve.prune(same, method="magnitude", refit="none").notes == ()


@pytest.mark.parametrize("matrix", [torch.float32, torch.float16])
def test_a_matrix_of_more_bits_than_the_others_keeps_them(tmp_path, matrix):
    """The model is run in what most weights have; what loading rounds away of the rest is put back."""
    dense = stored(tmp_path / "in", torch.bfloat16, {"dtype": "bfloat16"})
    tensors = load_file(dense / "model.safetensors")
    tensors[MLP] = (torch.randn(tensors[MLP].shape, generator=torch.Generator().manual_seed(0)) / 8).to(matrix)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    pruned = halve.prune(dense, tmp_path / "out", method="wanda", refit="none", calibration=models.tokens())
    assert pruned.model.dtype == torch.bfloat16
    kept_are_the_sources(dense, tmp_path / "out")
    assert halve.check(tmp_path / "out", against=dense).matrices == len(pruned.report.matrices)
    again = halve.prune(dense, tmp_path / "refit", method="wanda", refit="cg", calibration=models.tokens())
    written = load_file(tmp_path / "refit" / "model.safetensors")[MLP]
    assert torch.equal(written.to(torch.bfloat16), again.model.get_parameter(MLP))


def test_blocks_in_float32_beside_larger_embeddings_are_pruned_in_it(tmp_path):
    models.save(models.decoder("llama", vocab_size=2000), tmp_path / "in")
    models.edit_json(tmp_path / "in" / "config.json", dtype="bfloat16")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    outside = {name: value.bfloat16() for name, value in tensors.items() if value.shape[0] == 2000}
    save_file(tensors | outside, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    pruned = halve.prune(tmp_path / "in", tmp_path / "out", method="magnitude", refit="none")
    assert dtypes_on_disk(resolve(tmp_path / "in")) == (torch.bfloat16, torch.float32)
    assert pruned.model.dtype == torch.float32
    assert "are bfloat16 and float32 on disk" in pruned.notes[0]
    kept_are_the_sources(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[MLP], halve.Pattern("2:4").project(tensors[MLP]))


def test_a_value_that_memory_holds_as_zero_does_not_come_back_into_a_pruned_place(tmp_path):
    dense = stored(tmp_path / "in", torch.float16, {"dtype": "float16"})
    tensors = load_file(dense / "model.safetensors")
    tensors[MLP] = torch.full(tensors[MLP].shape, 1e-30, dtype=torch.float32)
    tensors[MLP][:, ::4] = 1 / 3
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    halve.prune(dense, tmp_path / "out", method="magnitude", refit="none")
    written = load_file(tmp_path / "out" / "model.safetensors")[MLP]
    assert torch.equal(written != 0, tensors[MLP] > 0.1)
    assert torch.equal(written[:, ::4], tensors[MLP][:, ::4])


@pytest.mark.parametrize(
    ("on_disk", "named", "pruned_in"),
    [
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float16", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", None, "float16"),
    ],
)
def test_the_dtype_to_prune_in_holds_every_value_on_disk(tmp_path, on_disk, named, pruned_in):
    path = stored(tmp_path / "in", NAMES[on_disk], {"dtype": named})
    source = resolve(path)
    assert dtypes_on_disk(source) == (NAMES[on_disk],)
    assert dtype_to_prune_in(source) == NAMES[pruned_in]
    assert bool(differing_dtypes(source)) == (dtype_in_config(source) not in {None, NAMES[on_disk]})


@pytest.mark.parametrize("named", ["float8_e4m3fn", "no_such_type", "int8"])
def test_a_config_that_names_a_dtype_which_is_not_plain_is_refused(tmp_path, named):
    path = stored(tmp_path / "in", torch.float32, {"dtype": named})
    with pytest.raises(UnsupportedModelError, match=f"names the dtype '{named}', in which no plain model is loaded"):
        resolve(path)


def test_running_and_measuring_speed_go_by_the_config(tmp_path):
    dense = stored(tmp_path / "in", torch.float32, {"dtype": "bfloat16"})
    assert load_model(dense).model.dtype == torch.bfloat16
    loaded = load_found(resolve(dense), None)
    assert loaded.model.dtype == torch.float32
    assert _run_dtype(loaded) == torch.bfloat16
