import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from halve.errors import CorruptFileError, InputError
from halve.workers import terms
from halve.workers.messages import pack, unpack


class Note(Struct, kw_only=True):
    word: str
    numbers: list[float] = []


def test_content_and_tensors_of_all_kinds_come_back():
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "halves": torch.randn(3, 5).to(torch.bfloat16),
        "ids": torch.arange(7),
        "none": torch.empty(0, 4),
        "turned": torch.randn(4, 6).T,
        "wide": torch.randn(2, 2, dtype=torch.float64),
    }
    content, found = unpack(pack({"word": "ü", "numbers": [1.5, float("nan")]}, tensors), Note)
    assert content.word == "ü"
    assert content.numbers[0] == 1.5
    assert content.numbers[1] != content.numbers[1]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_message_that_cannot_be_written_to_is_read_without_a_copy():
    message = pack({"word": "a"}, {"x": torch.arange(4.0)})
    message.flags.writeable = False
    _, found = unpack(message, Note)
    assert torch.equal(found["x"], torch.arange(4.0))
    assert message.ctypes.data < found["x"].data_ptr() < message.ctypes.data + message.nbytes


@pytest.mark.parametrize(
    "content", [{}, {"word": 1}, {"word": "a", "numbers": ["b"]}, {"word": "a", "numbers": [[1.0]]}]
)
def test_content_of_another_kind_is_refused(content):
    with pytest.raises(CorruptFileError, match="a message between driver and worker"):
        unpack(pack(content), Note)


def header(text):
    return np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8)


@pytest.mark.parametrize(
    "message",
    [
        b"a pickle",
        np.zeros(3, dtype=np.float32),
        np.zeros((2, 8), dtype=np.uint8),
        np.zeros(0, dtype=np.uint8),
        np.full(64, 255, dtype=np.uint8),
        header(b"[]"),
        header(b'{"__metadata__":{"content":"[1]"}}'),
        header(b'{"__metadata__":{"content":"{}"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        np.concatenate([header(json.dumps({"__metadata__": {"content": '{"word": "a"}'}}).encode()), [np.uint8(0)]]),
    ],
)
def test_anything_else_is_refused(message):
    with pytest.raises(CorruptFileError):
        unpack(message, Note)


def test_a_tensor_that_is_not_aligned_is_refused():
    spec = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"content": '{"word": "a"}'}}
    text = json.dumps(spec).encode()
    text += b" " * (1 + -len(text) % 8)
    message = np.concatenate([header(text), np.zeros(4, dtype=np.uint8)])
    with pytest.raises(CorruptFileError, match="'x' is not aligned"):
        unpack(message, Note)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data):
    with pytest.raises(CorruptFileError):
        unpack(np.frombuffer(data, dtype=np.uint8), Note)


def test_an_error_travels_as_its_kind_and_its_sentence():
    answer, _ = unpack(terms.failed(InputError("no")), terms.Answer)
    with pytest.raises(InputError, match=r"^no$"):
        terms.check(answer)
    terms.check(unpack(pack({}), terms.Answer)[0])
