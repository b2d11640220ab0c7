"""The safetensors container against the safetensors library, and against crafted files."""

import json

import pytest
import safetensors.torch
import torch

from halve.checkpoint import shards
from halve.checkpoint.shards import build_header, read_chunks, read_json, read_shard, read_tensor, tensor_bytes
from halve.errors import CorruptFileError, UnreadableFileError, UnsupportedModelError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.bf16": torch.tensor([[1.5, -0.0], [float("nan"), 3.0]], dtype=torch.bfloat16),
    "c.empty": torch.empty(0, 4),
    "d.scalar": torch.tensor(7, dtype=torch.int64),
    "e.bool": torch.tensor([True, False, True]),
    "f.fp8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
}


def craft(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def spec(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata={"format": "pt", "note": "ü"})
    shard = read_shard(path)
    assert {entry.name for entry in shard.tensors} == set(TENSORS)
    assert [entry.start for entry in shard.tensors] == sorted(entry.start for entry in shard.tensors)
    for entry in shard.tensors:
        expected = TENSORS[entry.name]
        got = read_tensor(entry)
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape == entry.shape
        assert bytes(tensor_bytes(got)) == bytes(tensor_bytes(expected)) == b"".join(read_chunks(entry))
    whole = shard.header + b"".join(chunk for entry in shard.tensors for chunk in read_chunks(entry))
    assert whole == path.read_bytes()


def test_the_library_reads_what_we_write(tmp_path):
    path = tmp_path / "model.safetensors"
    header = build_header([(name, tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()])
    assert len(header) % 8 == 0
    path.write_bytes(header + b"".join(bytes(tensor_bytes(tensor)) for tensor in TENSORS.values()))
    read = safetensors.torch.load_file(path)
    assert list(read) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert bytes(tensor_bytes(read[name])) == bytes(tensor_bytes(tensor))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_bytes_are_row_major():
    tensor = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert bytes(tensor_bytes(tensor.T)) == torch.tensor([0, 3, 1, 4, 2, 5], dtype=torch.int16).numpy().tobytes()


def test_header_refuses_a_dtype_the_format_lacks():
    with pytest.raises(UnsupportedModelError, match="complex128"):
        build_header([("x", torch.complex128, (1,))])


@pytest.mark.parametrize("cut", [1, 20, "header", "length"])
def test_truncation_is_found(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    content = path.read_bytes()
    size = {"header": 40, "length": 5}.get(cut) or len(content) - cut
    path.write_bytes(content[:size])
    with pytest.raises(CorruptFileError, match="corrupt"):
        read_shard(path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"[1, 2]", b""),
        (b"not json", b""),
        (b"\xff\xfe{}", b""),
        (b"[" * 100_000 + b"]" * 100_000, b""),
        (
            (
                b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                b' "a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
            ),
            bytes(4),
        ),
        ({"__metadata__": {"n": 1}}, b""),
        ({"a": spec()}, bytes(5)),
        ({"a": spec(4, 8)}, bytes(8)),
        ({"a": spec(), "b": spec(8, 12)}, bytes(12)),
        ({"a": spec(), "b": spec(2, 6)}, bytes(6)),
        ({"a": spec(shape=(2,))}, bytes(4)),
        ({"a": spec(shape=(-1,))}, bytes(4)),
        ({"a": spec(0, 0, shape=(0, 1 << 64))}, b""),
        ({"a": spec(shape=(True,))}, bytes(4)),
        ({"a": spec(4, 0)}, bytes(4)),
        ({"a": {**spec(), "data_offsets": [0]}}, bytes(4)),
        ({"a": "F32"}, b""),
    ],
)
def test_malformed_headers_are_found(tmp_path, header, data):
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is corrupt"):
        read_shard(craft(tmp_path / "model.safetensors", header, data))


@pytest.mark.parametrize("length", [0, 1, 1 << 40, (1 << 64) - 1])
def test_absurd_header_lengths_are_found(tmp_path, length):
    with pytest.raises(CorruptFileError, match="claims"):
        read_shard(craft(tmp_path / "x.safetensors", {}, length=length))


def test_unknown_dtype_is_named(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"'a'.*F4"):
        read_shard(craft(tmp_path / "x.safetensors", {"a": spec(dtype="F4")}, bytes(4)))


def test_missing_file_and_a_file_cut_after_its_header_was_read(tmp_path):
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        read_shard(tmp_path / "absent.safetensors")
    path = craft(tmp_path / "x.safetensors", {"a": spec()}, bytes(4))
    entry = read_shard(path).tensors[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="ends beyond"):
        read_tensor(entry)
    with pytest.raises(CorruptFileError, match="ends beyond"):
        list(read_chunks(entry))
    path.unlink()
    for read in (read_tensor, lambda entry: list(read_chunks(entry))):
        with pytest.raises(
            UnreadableFileError, match=r"x\.safetensors cannot be read \(No such file or directory\): make it readable"
        ):
            read(entry)


def test_json_is_read_within_limits(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    monkeypatch.setattr(shards, "MAX_JSON", 4)
    with pytest.raises(CorruptFileError, match="larger"):
        read_json(path)
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        read_json(tmp_path / "absent.json")
