import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import models
from halve.checkpoint import durable
from halve.checkpoint.shards import build_header, read_shard, tensor_bytes
from halve.errors import (
    CorruptFileError,
    HalveError,
    InputError,
    PatternError,
    UnreadableFileError,
    UnsupportedModelError,
)
from halve.packed import write as packing
from halve.packed.read import unpack_checkpoint
from halve.packed.write import pack_checkpoint
from halve.pruning import prune
from halve.runtime.packed_matrix import PackedMatrix, pack, unpack
from halve.runtime.quantised_matrix import quantise
from halve.verification import check
from packed_models import edit_tensor, pruned, record_again, sums
from tiny_tokenizers import SENTENCES, byte_bpe

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def plain(tmp_path):
    return pruned(tmp_path)


@pytest.mark.parametrize("family", models.DECODERS)
def test_packs_what_the_record_lists_and_comes_back_byte_for_byte(family, tmp_path):
    plain = pruned(tmp_path, family)
    listed = [
        name for matrix in json.loads((plain / "halve.json").read_text())["matrices"] for name in matrix["tensors"]
    ]
    result = pack_checkpoint(plain, tmp_path / "packed")
    assert sorted(result.matrices) == sorted(listed)
    assert not result.left_dense
    assert result.matrix_bytes_after < result.matrix_bytes_before
    assert result.ratio == result.bytes_after / result.bytes_before < 1
    assert result.bytes_after == (tmp_path / "packed" / "packed.safetensors").stat().st_size
    assert unpack_checkpoint(tmp_path / "packed", tmp_path / "back") == sums(plain)
    assert sums(tmp_path / "back") == sums(plain)
    # without a record: the structure of the model says which, and the pattern is given
    (plain / "halve.json").unlink()
    assert sorted(pack_checkpoint(plain, tmp_path / "again", "2:4").matrices) == sorted(listed)


def test_the_file_holds_matrices_as_they_are_packed_and_the_rest_as_it_was(plain, tmp_path):
    pack_checkpoint(plain, tmp_path / "packed")
    before, after = load_file(plain / "model.safetensors"), load_file(tmp_path / "packed" / "packed.safetensors")
    assert UP not in after
    expected = pack(before[UP], "2:4")
    assert torch.equal(after[f"{UP}.mask"], expected.mask)
    assert torch.equal(after[f"{UP}.values"], expected.values)
    assert torch.equal(unpack(PackedMatrix(after[f"{UP}.mask"], after[f"{UP}.values"], (64, 32), "2:4")), before[UP])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    same = sums(tmp_path / "packed")
    assert {name: same[name] for name in same if not name.startswith(("packed", "halve-packed", "README"))} == {
        name: sha256 for name, sha256 in sums(plain).items() if name not in {"model.safetensors", "README.md"}
    }


def test_no_other_loader_takes_it_for_a_plain_checkpoint(plain, tmp_path):
    pack_checkpoint(plain, tmp_path / "packed")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_several_shards(tmp_path):
    plain = pruned(tmp_path, max_shard_size="40KB")
    result = pack_checkpoint(plain, tmp_path / "packed")
    files = sorted(path.name for path in (tmp_path / "packed").glob("*.safetensors"))
    assert len(files) == len(list(plain.glob("*.safetensors"))) > 2
    assert files[0] == f"packed-00001-of-{len(files):05d}.safetensors"
    assert result.bytes_after == sum((tmp_path / "packed" / name).stat().st_size for name in files)
    assert unpack_checkpoint(tmp_path / "packed", tmp_path / "back") == sums(plain)


def test_every_tensor_begins_at_a_multiple_of_its_element_size(plain, tmp_path):
    path = plain / "model.safetensors"
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), **load_file(path), "wide": torch.ones(2)}  # in this order
    header = build_header([(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()])
    path.write_bytes(header + b"".join(tensor_bytes(tensor) for tensor in tensors.values()))
    record_again(plain)
    pack_checkpoint(plain, tmp_path / "packed")
    entries = read_shard(tmp_path / "packed" / "packed.safetensors").tensors
    assert {entry.dtype.itemsize for entry in entries} == {1, 2, 4}
    assert not any(entry.start % entry.dtype.itemsize for entry in entries)
    assert unpack_checkpoint(tmp_path / "packed", tmp_path / "back") == sums(plain)


def edit_weights(plain, change, name=UP):
    edit_tensor(plain / "model.safetensors", name, change)
    record_again(plain)


def test_a_listed_matrix_that_is_not_in_the_pattern_is_refused_by_name(plain, tmp_path):
    edit_weights(plain, torch.ones_like)
    with pytest.raises(InputError, match=rf"'{UP}' is not in pattern 2:4, though halve\.json lists it"):
        pack_checkpoint(plain, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    edit_weights(plain, lambda tensor: None)
    with pytest.raises(InputError, match=rf"lists tensor '{UP}' as pruned, and it is missing"):
        pack_checkpoint(plain, tmp_path / "packed")


def test_what_packing_would_not_keep_is_left_dense_and_named(plain, tmp_path):
    def with_negative_zeros(tensor):
        tensor[tensor == 0] = -0.0
        return tensor

    edit_weights(plain, with_negative_zeros)
    result = pack_checkpoint(plain, tmp_path / "packed")
    assert result.left_dense == {
        UP: "it has a -0.0 beyond the places of its group, which packing would not keep: make zeros +0.0, weight += 0.0"
    }
    assert UP not in result.matrices
    assert (
        unpack_checkpoint(tmp_path / "packed", tmp_path / "back")["model.safetensors"]
        == sums(plain)["model.safetensors"]
    )


def test_a_negative_zero_within_its_places_is_kept(plain, tmp_path):
    def with_one(tensor):
        tensor[0, :4] = torch.tensor([1.0, 0.0, -0.0, 0.0])
        return tensor

    edit_weights(plain, with_one)
    assert UP in pack_checkpoint(plain, tmp_path / "packed").matrices
    assert (
        unpack_checkpoint(tmp_path / "packed", tmp_path / "back")["model.safetensors"]
        == sums(plain)["model.safetensors"]
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensor: tensor.double(), "float64 is not packed"),
        (lambda tensor: tensor[:, :30], "it is not in the pattern"),
    ],
)
def test_without_a_record_what_cannot_be_packed_is_left_dense_and_named(plain, tmp_path, change, reason):
    (plain / "halve.json").unlink()
    edit_weights(plain, change)
    result = pack_checkpoint(plain, tmp_path / "packed", "2:4")
    assert result.left_dense == {UP: reason}
    assert len(result.matrices) == 20


def test_a_tensor_that_has_the_name_of_a_part_leaves_the_matrix_dense(plain, tmp_path):
    tensors = load_file(plain / "model.safetensors")
    save_file(tensors | {f"{UP}.mask": torch.zeros(1)}, plain / "model.safetensors", {"format": "pt"})
    record_again(plain)
    assert "of the name that a part" in pack_checkpoint(plain, tmp_path / "packed").left_dense[UP]


def test_what_failed_to_be_pruned_is_left_dense(plain, tmp_path):
    record = json.loads((plain / "halve.json").read_text())
    next(matrix for matrix in record["matrices"] if matrix["tensors"] == [UP])["status"] = "failed"
    (plain / "halve.json").write_text(json.dumps(record))
    assert pack_checkpoint(plain, tmp_path / "packed").left_dense == {UP: "pruning it failed"}


def test_the_pattern_is_asked_for_and_must_be_that_of_the_record(plain, tmp_path):
    with pytest.raises(InputError, match=r"are 2:4, not 4:8: leave the pattern out"):
        pack_checkpoint(plain, tmp_path / "packed", "4:8")
    (plain / "halve.json").rename(plain / "kept")
    with pytest.raises(InputError, match=r"has no halve\.json: give the pattern"):
        pack_checkpoint(plain, tmp_path / "packed")
    with pytest.raises(PatternError):
        pack_checkpoint(plain, tmp_path / "packed", "half")
    with pytest.raises(InputError, match=r"nothing to pack in .*: it is not in the pattern"):
        pack_checkpoint(plain, tmp_path / "packed", "1:8")
    (plain / "halve.json").write_text('{"pattern": null, "matrices": []}')
    with pytest.raises(HalveError, match=r"does not say what was pruned"):
        pack_checkpoint(plain, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_directories_that_are_in_the_way_or_none_are_refused(plain, tmp_path):
    with pytest.raises(InputError, match="is not empty"):
        pack_checkpoint(plain, tmp_path)
    with pytest.raises(InputError, match="lies in, the input"):
        pack_checkpoint(plain, plain / "packed")
    with pytest.raises(InputError, match="is not a directory"):
        pack_checkpoint(plain / "config.json", tmp_path / "packed")
    pack_checkpoint(plain, tmp_path / "packed")
    with pytest.raises(InputError, match=r"is a packed checkpoint: .*halve unpack"):
        pack_checkpoint(tmp_path / "packed", tmp_path / "again")
    models.edit_json(plain / "config.json", auto_map={"AutoModel": "a.B"})
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        pack_checkpoint(plain, tmp_path / "again")


def test_files_that_belong_to_no_model_are_named_and_stay_behind(plain, tmp_path):
    (plain / "pytorch_model.bin").write_bytes(b"\x80")
    (plain / "README.md").write_text("# A model\n")
    (plain / "evil.py").write_text("")
    result = pack_checkpoint(plain, tmp_path / "packed")
    assert result.left_out == ("evil.py", "pytorch_model.bin")
    assert (tmp_path / "packed" / "README.md").exists()


def test_a_full_disk_leaves_nothing(plain, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1))
        with pytest.raises(InputError, match="GB free"):
            pack_checkpoint(plain, tmp_path / "packed")
    for kind in ("packed.written", "companion.written", "packed-manifest.written"):

        def fail(name, kind=kind):
            if name == kind:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(durable, "crash_point", fail)
            with pytest.raises(HalveError, match="No space left"):
                pack_checkpoint(plain, tmp_path / "new" / "packed")
        assert not (tmp_path / "new").exists()


def test_the_manifest_is_written_last(plain, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(durable, "crash_point", lambda name: seen.append(name) if name.endswith(".renamed") else None)
    pack_checkpoint(plain, tmp_path / "packed")
    assert seen[0] == "packed.renamed"
    assert seen.index("packed-manifest.renamed") == len(seen) - 1


def test_a_source_that_changes_meanwhile_is_refused(plain, tmp_path, monkeypatch):
    data = bytearray((plain / "model.safetensors").read_bytes())
    data[-1] ^= 1

    def change(name):
        if name == "companion.start":
            (plain / "model.safetensors").write_bytes(data)

    monkeypatch.setattr(durable, "crash_point", change)
    with pytest.raises(HalveError, match="has been changed while it was packed"):
        pack_checkpoint(plain, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def vanish(monkeypatch, path, when):
    """Remove a file as a crash point is passed."""
    monkeypatch.setattr(durable, "crash_point", lambda name: path.unlink(missing_ok=True) if name == when else None)


@pytest.mark.parametrize(
    ("when", "name"),
    [
        ("packed.start", "model.safetensors"),  # read tensor by tensor
        ("packed.start", "config.json"),  # carried along
        ("companion.start", "model.safetensors"),  # summed
    ],
)
def test_a_source_that_cannot_be_read_is_named_and_not_the_output(plain, tmp_path, monkeypatch, when, name):
    vanish(monkeypatch, plain / name, when)
    with pytest.raises(UnreadableFileError, match=rf"plain/{name} cannot be read \(No such file or directory\)"):
        pack_checkpoint(plain, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_an_index_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    plain = pruned(tmp_path, max_shard_size="40KB")
    index = plain / "model.safetensors.index.json"
    contained = packing.contained

    def then_gone(directory, path):
        found = contained(directory, path)
        if path == index:
            index.unlink()
        return found

    monkeypatch.setattr(packing, "contained", then_gone)
    with pytest.raises(UnreadableFileError, match=r"index\.json cannot be read \(No such file or directory\)"):
        pack_checkpoint(plain, tmp_path / "packed")


@pytest.mark.parametrize("name", ["packed.safetensors", "tokenizer.json"])
def test_a_packed_checkpoint_that_cannot_be_read_is_named_and_not_the_output(plain, tmp_path, monkeypatch, name):
    pack_checkpoint(plain, tmp_path / "packed")
    vanish(monkeypatch, tmp_path / "packed" / name, "unpacked.start")
    with pytest.raises(UnreadableFileError, match=rf"packed/{name} cannot be read \(No such file or directory\)"):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_record_with_no_pattern_that_can_be_is_named(plain, tmp_path):
    models.edit_json(plain / "halve.json", pattern="4:2")
    with pytest.raises(
        CorruptFileError, match=r"halve\.json is not as Halve writes it: pattern '4:2' is not understood"
    ):
        pack_checkpoint(plain, tmp_path / "packed")


class Alive(TorchDispatchMode):
    """Follows the memory of every tensor from the first operation on it until it is freed."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage):
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._sizes.pop, storage._cdata)
            self.peak = max(self.peak, sum(self._sizes.values()))


def test_one_matrix_is_in_memory_at_a_time(plain, tmp_path):
    with Alive() as packing:
        result = pack_checkpoint(plain, tmp_path / "packed")
    with Alive() as unpacking:
        unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    entries = read_shard(plain / "model.safetensors").tensors
    largest = max(entry.end - entry.start for entry in entries if entry.name in result.matrices)
    for peak in (packing.peak, unpacking.peak):
        # One as it is read, packed, unpacked again, and bits spread out; all of them are 13.5 times the largest.
        assert largest < peak <= 4 * largest < result.matrix_bytes_before / 3


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "config.json", "model.safetensors"])
def test_what_was_changed_since_pruning_is_refused_by_name(plain, tmp_path, name):
    path = plain / name
    if name == "model.safetensors":
        edit_tensor(path, "model.norm.weight", lambda tensor: tensor * 2)
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    says = rf"{name} does not have the sha256 recorded .*: it has been changed; restore it, or, .* remove halve\.json"
    with pytest.raises(CorruptFileError, match=says):
        pack_checkpoint(plain, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    (plain / "halve.json").unlink()
    assert pack_checkpoint(plain, tmp_path / "packed", "2:4").matrices


def test_what_is_missing_since_pruning_is_refused_by_name(plain, tmp_path):
    (plain / "generation_config.json").unlink()
    with pytest.raises(CorruptFileError, match=r"generation_config\.json is recorded in halve\.json and is missing"):
        pack_checkpoint(plain, tmp_path / "packed")


def test_a_damaged_record_is_refused_by_its_field(plain, tmp_path):
    record = json.loads((plain / "halve.json").read_text())
    record["matrices"][3]["tensors"] = [1]
    (plain / "halve.json").write_text(json.dumps(record))
    with pytest.raises(CorruptFileError, match=r"`matrices\[3\]\.tensors\[0\]`: expected `str`, got `int`; restore it"):
        pack_checkpoint(plain, tmp_path / "packed")


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_weights_come_back_rounded_and_the_record_is_theirs(family, values, tmp_path):
    plain = pruned(tmp_path, family)
    result = pack_checkpoint(plain, tmp_path / "packed", values=values)
    assert result.matrix_bytes_after < {"int8": 2, "int4": 1}[values] * result.matrix_bytes_before  # rows are short
    back = tmp_path / "back"
    restored = unpack_checkpoint(tmp_path / "packed", back)
    before, after = sums(plain), sums(back)
    assert restored == after
    assert before.keys() - after.keys() == {"halve-measured.json", "report.html"}  # of the weights before
    assert {name for name in after if before[name] != after[name]} == {"model.safetensors", "halve.json"}
    record = json.loads((back / "halve.json").read_text())
    assert record["files"]["model.safetensors"] == after["model.safetensors"]
    assert "were rounded to" in record["warnings"][-1]
    (how,) = record["quantised"]
    assert how == {"values": values, "weights_before": {"model.safetensors": before["model.safetensors"]}}
    for directory in (tmp_path / "packed", back):
        checked = check(directory)
        assert checked.ok, checked.problems
    exact, rounded = load_file(plain / "model.safetensors"), load_file(back / "model.safetensors")
    changes = sum(float((rounded[name].double() - exact[name].double()).square().sum()) for name in result.matrices)
    weights = sum(float(exact[name].double().square().sum()) for name in result.matrices)
    assert result.error == pytest.approx((changes / weights) ** 0.5, rel=1e-4)
    for name, tensor in exact.items():
        if name not in result.matrices:
            assert torch.equal(rounded[name], tensor)
            continue
        assert not rounded[name][tensor == 0].any()
        off = (rounded[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert 0 < off < {"int8": 0.01, "int4": 0.15}[values]


def test_quantised_parts_lie_where_the_format_says(plain, tmp_path):
    pack_checkpoint(plain, tmp_path / "packed", values="int4")
    matrix = load_file(plain / "model.safetensors")[UP]
    expected = quantise(pack(matrix, "2:4"), 4)
    found = load_file(tmp_path / "packed" / "packed.safetensors")
    for part in ("places", "scales", "codes"):
        assert torch.equal(found[f"{UP}.{part}"], getattr(expected, part))
    assert not {f"{UP}.values", f"{UP}.mask"} & found.keys()
    manifest = json.loads((tmp_path / "packed" / "halve-packed.json").read_text())
    assert manifest["version"] == 2
    assert manifest["matrices"][UP]["values"] == "int4"
    pack_checkpoint(plain, tmp_path / "own")
    assert json.loads((tmp_path / "own" / "halve-packed.json").read_text())["version"] == 1


def test_quantising_without_a_record_and_twice(plain, tmp_path):
    pack_checkpoint(plain, tmp_path / "packed", values="int8")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    pack_checkpoint(tmp_path / "back", tmp_path / "again", values="int4")
    record = json.loads((tmp_path / "again" / "halve.json").read_text())
    assert [how["values"] for how in record["quantised"]] == ["int8", "int4"]
    (plain / "halve.json").unlink()
    pack_checkpoint(plain, tmp_path / "alone", "2:4", values="int8")
    assert check(tmp_path / "alone").ok


def test_what_cannot_be_quantised_is_refused_before_anything_is_written(tmp_path):
    plain = pruned(tmp_path, dtype=torch.float32)
    with pytest.raises(InputError, match=r"values is 'int2': give own, bf16, int8 or int4"):
        pack_checkpoint(plain, tmp_path / "packed", values="int2")
    with pytest.raises(InputError, match=r"is float32, not bfloat16: leave its weights as they are"):
        pack_checkpoint(plain, tmp_path / "packed", values="bf16")
    edit_weights(plain, lambda tensor: tensor * 1e9)
    with pytest.raises(InputError, match=rf"tensor '{UP}': weights are not finite, or too large to be quantised"):
        pack_checkpoint(plain, tmp_path / "packed", values="int8")
    (plain / "halve.json").unlink()
    with pytest.raises(InputError, match=r"weights are quantised at 2:4 alone, not at 50%"):
        pack_checkpoint(plain, tmp_path / "packed", "50%", values="int8")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_refit_has_made_integers_of_is_packed_without_another_loss(family, tmp_path):
    dense = models.save(models.decoder(family, vocab_size=320).to(torch.bfloat16), tmp_path / "dense")
    byte_bpe().save_pretrained(dense)
    (tmp_path / "text.txt").write_text("\n\n".join(SENTENCES * 40))
    options = {"method": "wanda", "refit": "int4", "samples": 8, "seq_len": 16, "calibration": tmp_path / "text.txt"}
    prune(dense, tmp_path / "plain", **options)
    result = pack_checkpoint(tmp_path / "plain", tmp_path / "packed", values="int4")
    assert result.error == 0
    unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert sums(tmp_path / "back") == sums(tmp_path / "plain")  # the report among it: nothing has moved
    pack_checkpoint(tmp_path / "back", tmp_path / "again", values="int4")
    assert sums(tmp_path / "again") == sums(tmp_path / "packed")
    with pytest.raises(InputError, match=r"refit int4 makes integers of the kept weights, and reconstructing"):
        prune(dense, tmp_path / "other", **options, reconstruct="block")


def test_several_shards_of_integers_come_back_as_they_are_on_record(tmp_path):
    plain = pruned(tmp_path, max_shard_size="40KB")
    pack_checkpoint(plain, tmp_path / "packed", values="int8")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert check(tmp_path / "packed").ok
    assert check(tmp_path / "back").ok
    assert pack_checkpoint(plain, tmp_path / "own", values="bf16").error == 0
