import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import models
from halve.checkpoint import durable
from halve.checkpoint.load import load_model, resolve
from halve.errors import CorruptFileError, HalveError, InputError, UnsupportedModelError
from halve.packed.load import load
from halve.packed.read import as_matrix, as_tensor, matrix_shape, open_packed, unpack_checkpoint
from halve.packed.write import pack_checkpoint
from halve.verification import check
from packed_models import edit_tensor, packed, pruned, record_again, sums

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("made"))


@pytest.fixture
def directory(made, tmp_path):
    """A packed checkpoint to damage."""
    return shutil.copytree(made, tmp_path / "packed")


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8), (2, 3, 6, 8)])
def test_a_tensor_is_a_matrix_and_back(shape, layout):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    matrix = as_matrix(tensor, layout)
    assert tuple(matrix.shape) == matrix_shape(shape, layout)
    back = as_tensor(matrix, shape, layout)
    assert torch.equal(back, tensor)
    assert back.is_contiguous()
    experts, rows, columns = tensor.reshape(-1, *shape[-2:]).shape
    flat = tensor.reshape(experts, rows, columns)
    whole = torch.cat([one if layout == "out_in" else one.T for one in flat])
    assert torch.equal(matrix, whole)


def test_no_matrix_has_fewer_than_two_dimensions():
    assert matrix_shape((3,), "out_in") == matrix_shape((), "in_out") == (0, 0)


def test_a_fused_tensor_of_experts_is_packed_as_one(tmp_path):
    plain = pruned(tmp_path)
    weight = load_file(plain / "model.safetensors")[UP]
    fused = torch.stack([weight, weight.flip(0), weight]).transpose(-1, -2)  # (experts, d_in, d_out)
    edit_tensor(plain / "model.safetensors", UP, lambda tensor: fused)
    record_again(plain)
    record = json.loads((plain / "halve.json").read_text())
    next(matrix for matrix in record["matrices"] if matrix["tensors"] == [UP])["layout"] = "in_out"
    (plain / "halve.json").write_text(json.dumps(record))
    assert UP in pack_checkpoint(plain, tmp_path / "packed").matrices
    checkpoint = open_packed(tmp_path / "packed")
    assert checkpoint.manifest.matrices[UP].shape == (3 * 64, 32)
    assert (
        unpack_checkpoint(tmp_path / "packed", tmp_path / "back")["model.safetensors"]
        == sums(plain)["model.safetensors"]
    )


def test_a_sound_one_is_ok(made):
    result = check(made)
    assert result.ok, result.problems
    assert (result.pattern, result.matrices, result.tensors) == ("2:4", 21, 30)
    assert result.sparsity == pytest.approx(0.5, abs=0.01)


def test_the_restored_one_passes_the_check_of_plain_ones(made, tmp_path):
    assert unpack_checkpoint(made, tmp_path / "new" / "back") == sums(made.parent / "plain")
    assert check(tmp_path / "new" / "back").ok
    with pytest.raises(InputError, match="is not empty"):
        unpack_checkpoint(made, tmp_path / "new" / "back")
    with pytest.raises(InputError, match="lies in, the input"):
        unpack_checkpoint(made, made / "back")
    with pytest.raises(InputError, match="is no packed checkpoint"):
        unpack_checkpoint(made.parent / "plain", tmp_path / "back")


def test_is_checked_by_itself(made):
    with pytest.raises(InputError, match=r"pattern that halve-packed\.json names: leave that out \(--pattern\)"):
        check(made, pattern="2:4")
    with pytest.raises(InputError, match=r"leave that out \(--against\), or restore .* with `halve unpack"):
        check(made, against=made.parent / "dense")


def refused(directory, says, error=CorruptFileError):
    """Whatever opens it refuses it, and the check says why."""
    for call in (open_packed, load, lambda path: unpack_checkpoint(path, path.parent / "back")):
        with pytest.raises(error, match=says) as caught:
            call(directory)
        assert "\n" not in str(caught.value)
    assert not (directory.parent / "back").exists()
    (problem,) = check(directory).problems
    assert problem == str(caught.value)


def edit_manifest(directory, change):
    path = directory / "halve-packed.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refresh(directory):
    """Make the manifest agree with the files as they are now: only what they hold is wrong."""

    def change(content):
        for name in content["files"]:
            data = (directory / name).read_bytes()
            content["files"][name] = {"size": len(data), "sha256": durable.sha256_of(directory / name)}

    edit_manifest(directory, change)


def edit_part(directory, name, change):
    edit_tensor(directory / "packed.safetensors", name, change)
    refresh(directory)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (f"{UP}.mask", lambda tensor: None, rf"disagree about tensor '{UP}\.mask'"),
        ("model.norm.weight", lambda tensor: None, "disagree about tensor 'model.norm.weight'"),
        (f"{UP}.mask", lambda tensor: tensor[:-1], rf"'{UP}\.mask' in .* is torch\.uint8 of shape \(63, 8\), not"),
        (f"{UP}.mask", lambda tensor: tensor.to(torch.int8), r"is torch\.int8"),
        (f"{UP}.values", lambda tensor: tensor[:-64], r"of shape \(1024,\), not torch\.bfloat16 of shape \(1088,\)"),
        (f"{UP}.values", lambda tensor: tensor.half(), r"is torch\.float16"),
        ("model.norm.weight", lambda tensor: tensor[:-1], r"of shape \(31,\)"),
    ],
)
def test_tensors_that_are_missing_or_not_as_expected_are_refused(directory, name, change, says):
    edit_part(directory, name, change)
    refused(directory, says)


def test_an_extra_tensor_is_refused(directory):
    path = directory / "packed.safetensors"
    save_file({**load_file(path), "extra": torch.zeros(1)}, path, {"format": "pt"})
    refresh(directory)
    refused(directory, "disagree about tensor 'extra'")


def test_a_matrix_in_no_weight_file_is_refused(directory):
    edit_manifest(directory, lambda content: content["matrices"].update({"x": content["matrices"][UP]}))
    refused(directory, "packs 'x', which no weight file holds")


def test_a_shape_or_dtype_that_is_not_the_headers_is_refused(directory):
    edit_manifest(directory, lambda content: content["matrices"][UP].update(shape=[32, 64]))
    refused(directory, rf"packs '{UP}' as torch.bfloat16 of shape \(32, 64\), and its header has")


@pytest.mark.parametrize("name", ["packed.safetensors", "config.json", "tokenizer.json", "halve.json"])
def test_a_file_that_is_missing_or_of_another_size_is_refused(directory, name):
    path = directory / name
    path.write_bytes(path.read_bytes() + b" ")
    refused(directory, rf"{name} has \d+ bytes, not \d+")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorruptFileError, match=rf"{name} has \d+ bytes, not \d+"):
        open_packed(directory)
    path.unlink()
    with pytest.raises(HalveError, match=rf"{name}|has no config"):
        open_packed(directory)


def test_a_companion_that_is_not_listed_is_refused_and_anything_else_not_read(directory):
    (directory / "notes").write_text("of nobody's concern")
    assert check(directory).ok
    (directory / "added_tokens.json").write_text("{}")
    refused(directory, r"added_tokens\.json is not among the files in halve-packed\.json: remove it")


@pytest.mark.parametrize("name", ["packed.safetensors", "tokenizer.json", "halve-packed.json", "report.html"])
def test_links_out_of_the_directory_are_refused(directory, name):
    (directory / name).rename(directory.parent / "outside")
    (directory / name).symlink_to("../outside")
    refused(directory, "is a link that leaves the checkpoint")


def test_a_pipe_is_refused(directory):
    (directory / "packed.safetensors").unlink()
    os.mkfifo(directory / "packed.safetensors")
    refused(directory, "is not a regular file")


def test_a_config_that_asks_for_more_is_refused(directory):
    models.edit_json(directory / "config.json", transformers_weights="other.safetensors")
    refresh(directory)
    refused(directory, "has 'transformers_weights'", UnsupportedModelError)


def flip_mask(tensor):
    tensor[3, 1] ^= 1
    return tensor


def test_a_wrong_mask_is_refused_before_anything_is_multiplied(directory):
    edit_part(directory, f"{UP}.mask", flip_mask)
    for call in (load, lambda path: unpack_checkpoint(path, path.parent / "back")):
        with pytest.raises(CorruptFileError, match=rf"tensor '{UP}' in .* is corrupt: the mask"):
            call(directory)
    assert not (directory.parent / "back").exists()
    (problem,) = check(directory).problems
    assert "the mask of a packed matrix" in problem


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (f"{UP}.values", float("nan"), f"tensor '{UP}' holds NaN"),
        ("model.norm.weight", float("inf"), "'model.norm.weight'.* holds NaN"),
    ],
)
def test_values_that_are_not_finite_are_named(directory, name, value, says):
    def change(tensor):
        tensor[1] = value
        return tensor

    edit_part(directory, name, change)
    with pytest.raises(InputError, match=says):
        load(directory)
    assert any("holds NaN or infinity" in problem for problem in check(directory).problems)


def test_what_follows_the_values_is_zero(directory):
    def change(tensor):
        tensor[-1] = 1
        return tensor

    edit_part(directory, f"{UP}.values", change)
    assert check(directory).problems == (f"tensor '{UP}.values' does not end in 64 zeros",)


def test_a_flipped_bit_is_found_by_the_sums(directory):
    path = directory / "packed.safetensors"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    assert check(directory).problems[0].startswith("packed.safetensors does not have the sha256")
    with pytest.raises(CorruptFileError, match=r"model\.safetensors of .* does not come out with the sha256"):
        unpack_checkpoint(directory, directory.parent / "back")
    refresh(directory)  # a manifest that was made to agree does not help
    assert check(directory).problems == (
        "model.safetensors would not be restored with the sha256 in halve-packed.json",
    )
    assert not (directory.parent / "back").exists()


def test_a_plain_checkpoint_that_had_been_changed_is_told(directory):
    models.edit_json(directory / "generation_config.json", temperature=0.5)
    refresh(directory)
    (problem,) = check(directory).problems
    assert problem.startswith("generation_config.json was not packed with the sha256 recorded in halve.json")
    (directory / "halve.json").write_text("[]")
    refresh(directory)
    assert "its JSON is a list" in check(directory).problems[0]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless(made, tmp_path, data):
    name = data.draw(st.sampled_from(["packed.safetensors", "halve-packed.json", "config.json", "halve.json"]))
    original = (made / name).read_bytes()
    ends = st.integers(0, min(len(original) - 1, 6000)) | st.integers(0, len(original) - 1)
    position = data.draw(ends)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    damaged = bytearray(original)
    if kind == "flip":
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del damaged[position:]
    else:
        damaged.insert(position, data.draw(st.integers(0, 255)))
    directory, back = tmp_path / "damaged", tmp_path / "back"
    for path in (directory, back):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(made, directory)
    (directory / name).write_bytes(damaged)
    sound = check(directory).ok
    try:
        unpack_checkpoint(directory, back)
    except HalveError:
        assert not sound
        assert not back.exists()
    else:
        assert sums(back) == sums(made.parent / "plain")


def test_loads_what_the_plain_one_is(made):
    x = models.tokens(2, 8)
    with torch.no_grad():
        assert_close(
            load(made).model(x).logits, load_model(made.parent / "plain").model(x).logits, rtol=0.05, atol=0.05
        )


@pytest.fixture
def sharded(tmp_path):
    return packed(tmp_path, max_shard_size="10KB")


def test_every_damaged_file_is_told_and_the_others_are_judged(sharded):
    first, second, third, *_ = sorted(sharded.glob("packed-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    data = bytearray(third.read_bytes())
    data[2] = 255  # the length of the header
    third.write_bytes(data)
    (sharded / "tokenizer.json").unlink()
    path = sharded / "generation_config.json"
    path.write_bytes(path.read_bytes().replace(b"{", b"["))
    whole, result = check(packed(sharded.parent / "whole", max_shard_size="10KB")), check(sharded)
    for text in (
        f"{first.name} has ",
        f"{second.name} is missing",
        f"{third.name} is corrupt: its header claims",
        f"{third.name} does not have the sha256",
        "tokenizer.json is listed in halve-packed.json and missing",
        "generation_config.json does not have the sha256",
    ):
        assert sum(text in problem for problem in result.problems) == 1, (text, result.problems)
    assert len(result.problems) == 6
    assert (result.matrices, result.tensors) == (whole.matrices, whole.tensors)
    assert result.sparsity > 0.4  # of the matrices in sound files


@pytest.mark.parametrize("recorded", [True, False])
def test_without_its_manifest_it_is_still_no_plain_checkpoint(directory, recorded):
    (directory / "halve-packed.json").unlink()
    if not recorded:
        (directory / "halve.json").unlink()
    for call in (open_packed, load):
        with pytest.raises(
            CorruptFileError, match=r"is a packed checkpoint without its halve-packed\.json: fetch that"
        ):
            call(directory)
    with pytest.raises(InputError, match="is a packed checkpoint: restore the plain one"):
        resolve(directory)
    (problem,) = check(directory).problems
    assert "is a packed checkpoint without its halve-packed.json" in problem
    (directory / "config.json").unlink()
    (directory / "packed.safetensors").write_bytes(b"")
    manifest, config, weights = check(directory).problems
    assert "without its halve-packed.json" in manifest
    assert "without its config.json" in config
    assert "packed.safetensors is corrupt" in weights


def test_without_its_config_it_is_told_as_what_it_is(directory):
    (directory / "config.json").unlink()
    with pytest.raises(CorruptFileError, match=r"is a packed checkpoint without its config\.json"):
        open_packed(directory)
    (problem,) = check(directory).problems
    assert "is a packed checkpoint without its config.json: fetch it again" in problem
