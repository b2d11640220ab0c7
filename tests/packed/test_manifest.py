import json
from dataclasses import replace

import pytest
import torch

from halve.checkpoint.shards import build_header
from halve.errors import CorruptFileError, UnsupportedModelError
from halve.packed.manifest import File, Manifest, PackedTensor, PlainShard, read_manifest

SUM = "0" * 64
HEADER = build_header([("a", torch.bfloat16, (8, 16)), ("é", torch.float32, (2,))])[8:]
SIZE = 8 + len(HEADER) + 2 * 8 * 16 + 4 * 2
INDEX = b'{"weight_map": {"a": "model-1.safetensors", "\xc3\xa9": "model-1.safetensors"}}\n'


def file(size=SIZE):
    return File(size=size, sha256=SUM)


def plain_shard(name, packed, header=HEADER, size=SIZE):
    return PlainShard(name=name, packed=packed, header=header, file=file(size))


def manifest(**changes):
    made = Manifest(
        matrices={"a": PackedTensor(pattern="2:4", shape=(8, 16), dtype=torch.bfloat16, layout="out_in")},
        left_dense={"b": "a reason"},
        shards=(plain_shard("model.safetensors", "packed.safetensors"),),
        index=None,
        index_sha256="",
        files={"config.json": file(1), "packed.safetensors": file(2)},
    )
    return replace(made, **changes)


def indexed(**changes):
    shard = plain_shard("model-1.safetensors", "packed.safetensors")
    return manifest(shards=(shard,), index=INDEX, index_sha256=SUM, **changes)


def written(tmp_path, made, **changes):
    path = tmp_path / "halve-packed.json"
    path.write_bytes(made.to_bytes())
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize("made", [manifest(), indexed()])
def test_comes_back_as_it_was_written(made, tmp_path):
    found = read_manifest(written(tmp_path, made))
    assert found == made
    (shard,) = found.plain_shards(tmp_path)
    assert (shard.header[8:], [entry.name for entry in shard.tensors]) == (HEADER, ["a", "é"])


def test_names_what_is_restored():
    assert set(manifest().restored()) == {"config.json", "model.safetensors"}
    assert indexed().restored()["model.safetensors.index.json"] == file(len(INDEX))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 1}, "its format is 1, not 'halve-packed'"),
        ({"version": 0}, "its version is 0"),
        ({"version": "1"}, "its version is '1'"),
        ({"more": 1}, "object contains unknown field `more`"),
        ({"matrices": []}, "`matrices`: expected `object`, got `array`"),
        ({"left_dense": {"a": 1}}, "`left_dense[...]`: expected `str`, got `int`"),
        ({"index": {"text": 1, "sha256": SUM}}, "`index.text`: expected `str`, got `int`"),
        ({"shards": []}, "`shards`: expected `array` of length >= 1"),
        ({"shards": [1]}, "`shards[0]`: expected `object`, got `int`"),
        (
            {"shards": [{"name": "model.safetensors", "packed": "p", "header": "{}", "size": 1}]},
            "`shards[0]`: object missing",
        ),
        ({"matrices": {"a": {"pattern": "2:4"}}}, "`matrices['a']`: object missing required field `shape`"),
        (
            {"matrices": {"a": {"pattern": "2:4", "shape": [8, 18], "dtype": "BF16", "layout": "out_in"}}},
            "matrix 'a': pattern 2:4 needs d_in divisible by 4",
        ),
        (
            {"matrices": {"a": {"pattern": "2:4", "shape": [8, 16], "dtype": "BF16", "layout": "up"}}},
            "`matrices['a'].layout`",
        ),
        (
            {
                "matrices": {
                    "a": {"pattern": "2:4", "shape": [8, 16], "dtype": "F32", "layout": "out_in", "values": "i8"}
                }
            },
            "`matrices['a'].values`",
        ),
        ({"files": {}}, "'packed.safetensors' is not the name of a packed file that it lists"),
        ({"files": {"config.json": 1}}, "`files['config.json']`: expected `object`, got `int`"),
        (
            {"files": {"packed.safetensors": {"size": True, "sha256": SUM}}},
            "`files['packed.safetensors'].size`: expected `int`",
        ),
        ({"files": {"packed.safetensors": {"size": 1, "sha256": "x"}}}, "`files['packed.safetensors'].sha256`"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(changes, says, tmp_path):
    with pytest.raises(CorruptFileError, match=r"halve-packed\.json is malformed") as caught:
        read_manifest(written(tmp_path, manifest(), **changes))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_version_asks_for_a_newer_halve(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"version 3 of the packed format, .* reads 2: upgrade"):
        read_manifest(written(tmp_path, manifest(), version=3, anything=None))


def test_half_of_a_surrogate_pair_is_refused(tmp_path):
    path = written(tmp_path, indexed())
    path.write_text(path.read_text().replace('"text": "{', '"text": "\\ud800{'))
    with pytest.raises(CorruptFileError, match="surrogate"):
        read_manifest(path)


def two(first, second):
    shards = tuple(plain_shard(*names) for names in (first, second))
    files = {shard.packed: file(1) for shard in shards}
    return indexed(files={"config.json": file(1), **files}), shards


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("a.safetensors", "packed-1"), ("a.safetensors", "packed-2")),
        (("a.safetensors", "packed-1"), ("b.safetensors", "packed-1")),
        (("config.json", "packed-1"), ("b.safetensors", "packed-2")),
        (("model.safetensors.index.json", "packed-1"), ("b.safetensors", "packed-2")),
        (("halve-packed.json", "packed-1"), ("b.safetensors", "packed-2")),
    ],
)
def test_no_file_is_written_over_another(first, second, tmp_path):
    made, shards = two(first, second)
    with pytest.raises(CorruptFileError, match="two files have the same name"):
        read_manifest(written(tmp_path, replace(made, shards=shards)))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (replace(manifest(), shards=indexed().shards), "the weight files in .* are not those of its index"),
        (replace(indexed(), shards=manifest().shards), "the weight files in .* are not those of its index"),
        (replace(indexed(), index=INDEX.replace(b'"a"', b'"c"')), "says that tensor 'c' is in model-1"),
        (replace(indexed(), index=INDEX.replace(b"model-1", b"../model")), "is not a plain"),
        (replace(indexed(), index=b"[]"), "its JSON is a list"),
        (manifest(shards=(plain_shard("model.safetensors", "p", size=SIZE + 1),)), "its tensors end"),
        (manifest(shards=(plain_shard("model.safetensors", "p", b"[]"),)), "its JSON is a list"),
    ],
)
def test_headers_and_index_must_agree(made, says, tmp_path):
    with pytest.raises(CorruptFileError, match=says):
        made.plain_shards(tmp_path)
