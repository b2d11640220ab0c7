import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from halve.errors import CorruptFileError, HalveError, InputError, UnreadableFileError
from halve.learning.mask_files import put_masks, read_masks, write_masks
from halve.maths.pattern import Pattern
from learned import Mixed, targets


def random_masks(model, pattern="2:4", seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for target in targets(model):
        scores = torch.rand(target.inputs_last(target.tensor).shape, generator=generator)
        found[target.name] = target.inputs_last(Pattern(pattern).keep_mask(scores))
    return found


def written(path, model, pattern="2:4"):
    masks = random_masks(model, pattern)
    write_masks(path, masks, Pattern(pattern), {"name": "tiny", "sha256": "00"})
    return masks


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "8:16"])
def test_masks_come_back(tmp_path, pattern):
    model = Mixed()
    masks = written(tmp_path / "masks.safetensors", model, pattern)
    found = read_masks(tmp_path / "masks.safetensors", targets(model))
    assert str(found.pattern) == pattern
    assert found.model == {"name": "tiny", "sha256": "00"}
    assert found.masks.keys() == masks.keys()
    assert all(torch.equal(found.masks[name], mask) for name, mask in masks.items())


def test_one_bit_a_weight_first_entry_lowest(tmp_path):
    model = Mixed()
    masks = written(tmp_path / "masks", model)
    tensors = load_file(tmp_path / "masks")
    for name, mask in masks.items():
        expected = [
            sum(int(bit) << place for place, bit in enumerate(mask.flatten().tolist()[start : start + 8]))
            for start in range(0, mask.numel(), 8)
        ]
        assert tensors[name].tolist() == expected
    weights = sum(mask.numel() for mask in masks.values())
    assert sum(each.nbytes for each in tensors.values()) == weights / 8
    assert (tmp_path / "masks").stat().st_size < weights / 8 + 1024


def test_what_is_pruned_becomes_zero_and_the_rest_keeps_its_bits(tmp_path):
    model, dense = Mixed(), Mixed()
    with torch.no_grad():
        model.first.weight.neg_()
    masks = written(tmp_path / "masks", model)
    put_masks(targets(model), read_masks(tmp_path / "masks", targets(model)).masks)
    for target in targets(model):
        mask = masks[target.name]
        assert not bool((target.tensor[~mask] != 0).any() | target.tensor[~mask].signbit().any())
    assert torch.equal(model.first.weight[masks["first.weight"]], -dense.first.weight[masks["first.weight"]])


def changed(path, out, tensors=None, **metadata):
    """Write a file of masks again, with something else in it."""
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["halve_masks"])
    described |= metadata
    save_file({**load_file(path), **(tensors or {})}, out, {"halve_masks": json.dumps(described)})
    return out


@pytest.mark.parametrize(
    ("metadata", "kind", "message"),
    [
        ({"version": 2}, InputError, "version 2"),
        ({"version": "1"}, CorruptFileError, "expected `int`"),
        ({"pattern": "4:2"}, CorruptFileError, "'4:2' is not understood"),
        ({"pattern": "50%"}, CorruptFileError, "no groups"),
        ({"pattern": "1:4"}, CorruptFileError, "does not keep 1 of every 4"),
        ({"pattern": "5:10"}, CorruptFileError, "does not keep 5 of every 10"),
        ({"shapes": {}}, InputError, "another model"),
        ({"shapes": {"first.weight": [-1, 4]}}, CorruptFileError, "expected `int` >= 1"),
        ({"model": {"name": 3}}, CorruptFileError, "expected `str`"),
        ({"code": "x"}, CorruptFileError, "unknown field"),
    ],
)
def test_hostile_metadata_are_refused(tmp_path, metadata, kind, message):
    model = Mixed()
    written(tmp_path / "masks", model)
    with pytest.raises(kind, match=message):
        read_masks(changed(tmp_path / "masks", tmp_path / "other", **metadata), targets(model))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), "not one bit for each of 512 weights"),
        (torch.zeros(64, dtype=torch.int8), "not one bit for each of 512 weights"),
        (torch.zeros(64, dtype=torch.uint8), "does not keep 2 of every 4"),
        (torch.full((64,), 255, dtype=torch.uint8), "does not keep 2 of every 4"),
    ],
)
def test_hostile_tensors_are_refused(tmp_path, tensor, message):
    model = Mixed()
    written(tmp_path / "masks", model)
    other = changed(tmp_path / "masks", tmp_path / "other", {"first.weight": tensor})
    with pytest.raises(CorruptFileError, match=message):
        read_masks(other, targets(model))


def test_masks_of_another_model_are_refused(tmp_path):
    model = Mixed()
    written(tmp_path / "masks", model)
    fewer = targets(model, {"first.weight": "out_in", "experts": "out_in"})
    with pytest.raises(InputError, match=r"another model: second\.weight is only in one of the two"):
        read_masks(tmp_path / "masks", fewer)
    model.first = torch.nn.Linear(16, 24)
    with pytest.raises(InputError, match=r"first\.weight has shape \(32, 16\) there and \(24, 16\) here"):
        read_masks(tmp_path / "masks", targets(model))


def test_a_tensor_more_or_a_file_of_something_else_is_refused(tmp_path):
    model = Mixed()
    written(tmp_path / "masks", model)
    extra = changed(tmp_path / "masks", tmp_path / "extra", {"more": torch.zeros(1, dtype=torch.uint8)})
    with pytest.raises(CorruptFileError, match="not those that its metadata name"):
        read_masks(extra, targets(model))
    save_file({"first.weight": torch.zeros(4)}, tmp_path / "plain")
    with pytest.raises(InputError, match="has no masks that Halve wrote"):
        read_masks(tmp_path / "plain", targets(model))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CorruptFileError, match="its header claims"):
        read_masks(tmp_path / "text", targets(model))
    with pytest.raises(UnreadableFileError, match="absent"):
        read_masks(tmp_path / "absent", targets(model))


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    model = Mixed()
    written(tmp_path / "masks", model)
    content = (tmp_path / "masks").read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(HalveError):
            read_masks(tmp_path / "cut", targets(model))


def test_a_volume_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    model = Mixed()
    with pytest.raises(HalveError, match=r"^writing .* failed"):
        written(tmp_path / "file" / "masks", model)
