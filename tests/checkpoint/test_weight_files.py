"""What every ``*.safetensors`` of a checkpoint is: pruned, carried along byte for byte, or named in a refusal."""

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import halve
import models
from halve.checkpoint.load import load_model, resolve, source_files
from halve.checkpoint.weight_files import survey_weights
from halve.checkpoint.write import output_bytes
from halve.errors import CorruptFileError, InputError, UnsupportedModelError
from halve.provenance import source_fields
from packed_models import sums

INDEX = "model.safetensors.index.json"
MTP = {"mtp.layers.0.weight": torch.randn(8, 8), "mtp.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
ASKED = {"method": "magnitude", "refit": "none"}


def add(directory, name="mtp.safetensors", tensors=MTP):
    save_file({key: value.clone() for key, value in tensors.items()}, directory / name, {"of": "another"})
    return directory / name


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def beside_a_single_file(directory, *, main=True):
    """Let an index name a file beside ``model.safetensors``, and that too or not."""
    weights = dict.fromkeys(load_file(directory / "model.safetensors"), "model.safetensors") if main else {}
    write_index(directory, weights | dict.fromkeys(MTP, "mtp.safetensors"))


def in_no_index(directory):
    pass


def in_an_index_with_the_weights(directory):
    beside_a_single_file(directory)


def alone_in_an_index(directory):
    beside_a_single_file(directory, main=False)


def test_pickled_weights_are_refused_with_the_way_out(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin.*save_pretrained"):
        resolve(llama)
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="has neither"):
        resolve(llama)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", "", 3, "..", None]
)
def test_shard_names_must_be_plain(sharded, name):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    models.edit_json(index, weight_map={**weight_map, "model.norm.weight": name})
    with pytest.raises(CorruptFileError, match="not a plain"):
        resolve(sharded)


def test_shards_and_index_must_agree(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    models.edit_json(index, weight_map={**weight_map, "ghost": first})
    with pytest.raises(CorruptFileError, match="'ghost'"):
        resolve(sharded)
    models.edit_json(index, weight_map={**weight_map, "lm_head.weight": "absent.safetensors"})
    with pytest.raises(CorruptFileError, match=r"absent\.safetensors is missing"):
        resolve(sharded)
    models.edit_json(index, weight_map=weight_map)
    shutil.copy(sharded / first, sharded / second)
    with pytest.raises(CorruptFileError, match="is in both"):
        resolve(sharded)
    models.edit_json(index, weight_map={})
    with pytest.raises(CorruptFileError, match="no weight_map"):
        resolve(sharded)


@pytest.mark.parametrize("cut", [1, 1000, -4, -200])
def test_truncated_shards_are_found(sharded, cut):
    path = sorted(sharded.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with pytest.raises(CorruptFileError, match=path.name):
        resolve(sharded)


@pytest.fixture
def extended(request, llama, sharded):
    """A checkpoint with a file that transformers does not load."""
    directory = sharded if request.param == "sharded" else llama
    add(directory)
    if request.param != "sharded":
        request.param(directory)
    return directory


EXTENDED = pytest.mark.parametrize(
    "extended", ["sharded", in_no_index, in_an_index_with_the_weights, alone_in_an_index], indirect=True
)


@EXTENDED
def test_what_transformers_does_not_load_is_carried_byte_for_byte(extended, tmp_path):
    source = resolve(extended)
    assert [path.name for path in source.carried] == ["mtp.safetensors"]
    assert source.index == (extended / INDEX if (extended / INDEX).exists() else None)
    halve.prune(extended, tmp_path / "out", **ASKED)
    before, after = sums(extended), sums(tmp_path / "out")
    assert before.keys() <= after.keys()
    assert after["mtp.safetensors"] == before["mtp.safetensors"]
    assert after.get(INDEX) == before.get(INDEX)
    assert json.loads((tmp_path / "out" / "halve.json").read_text())["files"]["mtp.safetensors"]
    verdict = halve.check(tmp_path / "out", against=extended)
    held = {name for path in extended.glob("*.safetensors") for name in load_file(path)}
    assert verdict.ok
    assert verdict.tensors == len(held)
    _, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


@EXTENDED
def test_it_counts_for_the_room_and_for_the_run(extended):
    loaded = load_model(extended)
    assert output_bytes(loaded) == sum(path.stat().st_size for path in extended.glob("*.safetensors"))
    assert "model.mtp.safetensors" in source_fields(resolve(extended))
    assert ((extended / INDEX) in source_files(resolve(extended))) == (extended / INDEX).exists()


@EXTENDED
def test_check_accounts_for_every_tensor_of_it(extended, tmp_path):
    out = tmp_path / "out"
    halve.prune(extended, out, **ASKED)
    (out / "halve.json").unlink()
    add(out, tensors={**MTP, "mtp.norm.weight": MTP["mtp.norm.weight"] * 2})
    (problem,) = halve.check(out, against=extended, pattern="2:4").problems
    assert problem == "tensor 'mtp.norm.weight' was neither pruned nor tuned and differs from the original"
    add(out, tensors={"mtp.norm.weight": MTP["mtp.norm.weight"], "mtp.own": torch.ones(1)})
    problems = halve.check(out, against=extended, pattern="2:4").problems
    assert "tensor 'mtp.layers.0.weight' of the original is missing, with mtp.safetensors" in problems
    assert "tensor 'mtp.own' in mtp.safetensors is not in the original" in problems
    (out / "mtp.safetensors").unlink()
    assert any("mtp" in problem for problem in halve.check(out, against=extended, pattern="2:4").problems)


@EXTENDED
def test_it_is_packed_and_unpacked_byte_for_byte(extended, tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    halve.prune(extended, plain, **ASKED)
    result = halve.pack(plain, packed)
    assert result.left_out == ()
    assert result.bytes_before == sum(path.stat().st_size for path in plain.glob("*.safetensors"))
    assert result.bytes_after == sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    assert (packed / "mtp.safetensors").read_bytes() == (plain / "mtp.safetensors").read_bytes()
    assert halve.check(packed).ok
    model = halve.load(packed).model
    assert model.lm_head.weight.shape == (models.VOCAB, 32)
    assert halve.unpack(packed, tmp_path / "again") == sums(plain)
    (packed / "mtp.safetensors").write_bytes(bytes((plain / "mtp.safetensors").stat().st_size))
    assert any("mtp.safetensors does not have the sha256" in problem for problem in halve.check(packed).problems)
    (packed / "other.safetensors").write_bytes(b"")
    assert any("other.safetensors is not among the files" in problem for problem in halve.check(packed).problems)


def test_a_name_that_packed_weights_have_is_not_carried_into_a_packed_checkpoint(llama, tmp_path):
    add(llama, "packed-mtp.safetensors")
    halve.prune(llama, tmp_path / "plain", **ASKED)
    with pytest.raises(InputError, match=r"packed-mtp\.safetensors has a name that packed weights have: rename it"):
        halve.pack(tmp_path / "plain", tmp_path / "packed")


def test_a_single_file_beside_shards_is_refused_and_both_are_named(sharded, tmp_path):
    models.save(models.decoder("llama", seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", sharded)
    first = min(path.name for path in sharded.glob("model-*"))
    with pytest.raises(InputError, match=rf"two sets of weights, model\.safetensors and what .*{first}.* move the one"):
        halve.prune(sharded, tmp_path / "out", **ASKED)
    assert not (tmp_path / "out").exists()
    assert any("two sets of weights" in problem for problem in halve.check(sharded, pattern="2:4").problems)


def test_an_index_of_files_that_are_gone_does_not_matter(llama, tmp_path):
    write_index(llama, dict.fromkeys(load_file(llama / "model.safetensors"), "model-00001-of-00001.safetensors"))
    assert resolve(llama).index is None
    halve.prune(llama, tmp_path / "out", **ASKED)
    assert not (tmp_path / "out" / INDEX).exists()


def test_an_index_that_names_a_missing_file_beside_the_weights_is_refused(llama):
    beside_a_single_file(llama)
    with pytest.raises(CorruptFileError, match=r"mtp\.safetensors is missing"):
        resolve(llama)
    add(llama, tensors={"mtp.norm.weight": torch.ones(8)})
    with pytest.raises(CorruptFileError, match=r"'mtp\.layers\.0\.weight' is in mtp\.safetensors, which does not"):
        resolve(llama)


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("model.fp16.safetensors", str),
        ("old-00001-of-00001.safetensors", str),
        ("bare.safetensors", lambda name: name.removeprefix("model.")),
        ("consolidated.safetensors", lambda name: f"mistrals.{name}"),
        ("consolidated.00.safetensors", lambda name: f"mistrals.{name}"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "sharded"])
def test_a_second_copy_of_the_weights_is_never_left_dense_beside_the_pruned(kind, name, rename, request, tmp_path):
    directory = request.getfixturevalue(kind)
    weights = {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}
    out = tmp_path / "out"
    halve.prune(directory, out, **ASKED)
    add(directory, name, {rename(key): value.half() for key, value in weights.items()})
    with pytest.raises(InputError, match=rf"holds the weights a second time in {name}, which .* move it out"):
        halve.prune(directory, tmp_path / "again", **ASKED)
    assert not (tmp_path / "again").exists()
    pruned = halve.prune(directory, **ASKED)  # nothing is written
    assert pruned.out is None
    verdict = halve.check(out, against=directory)
    assert verdict.ok
    assert any(name in note and "not compared" in note for note in verdict.notes)
    shutil.copy(directory / name, out)
    assert any(f"{name} is not among the files recorded" in problem for problem in halve.check(out).problems)
    (out / "halve.json").unlink()
    with pytest.raises(InputError, match="a second time"):
        halve.pack(out, tmp_path / "packed", "2:4")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors"])
def test_an_adapter_beside_the_weights_is_refused(llama, name):
    path = add(llama, name, {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)})
    with pytest.raises(UnsupportedModelError, match=f"{name} is an adapter beside the weights.*merge it"):
        load_model(llama)
    path.rename(llama / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"adapter_model\.bin is an adapter beside the weights.*merge it"):
        load_model(llama)


def test_what_cannot_be_carried_is_named(llama, tmp_path):
    (llama / "mtp.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CorruptFileError, match=r"mtp\.safetensors is corrupt"):
        resolve(llama)
    assert survey_weights(llama).unsound == {"mtp.safetensors"}
    (llama / "mtp.safetensors").unlink()
    (llama / "mtp.safetensors").symlink_to(add(tmp_path))
    with pytest.raises(CorruptFileError, match=r"mtp\.safetensors is a link that leaves"):
        resolve(llama)
    (llama / "mtp.safetensors").unlink()
    (llama / "._model.safetensors").write_bytes(b"of a file system that is not this one")
    assert resolve(llama).carried == ()
