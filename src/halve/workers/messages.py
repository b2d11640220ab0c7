"""What travels between the driver and its workers: bytes of the safetensors format, with JSON in the header.

Ray pickles whatever it transports, and who can send a pickle can run code. So that nothing but Ray itself is trusted
with that, our messages are arrays of bytes, which are decoded here: no classes and no functions are in them.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from halve.checkpoint.shards import build_header, parse_header, parse_object, tensor_bytes
from halve.checkpoint.validated import validated, wrong
from halve.errors import CorruptFileError

Message = np.ndarray[Any, np.dtype[np.uint8]]
Content = TypeVar("Content", bound=Struct)
_LENGTH = 8
_CONTENT = "content"
_PLACE = Path("a message between driver and worker")
_REMEDY = "both must be of the same version of Halve, and nothing else may send to them"


def pack(content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Message:
    """Return a message.

    Args:
        content: plain JSON values.
        tensors: by name, on any device.
    """
    # Wide numbers first, so that all of them lie aligned.
    ordered = sorted((tensors or {}).items(), key=lambda item: -item[1].dtype.itemsize)
    header = build_header([(name, each.dtype, each.shape) for name, each in ordered], {_CONTENT: json.dumps(content)})
    message = np.empty(len(header) + sum(each.nbytes for _, each in ordered), dtype=np.uint8)
    message[: len(header)] = np.frombuffer(header, dtype=np.uint8)
    position = len(header)
    for _, tensor in ordered:
        message[position : position + tensor.nbytes] = np.frombuffer(tensor_bytes(tensor), dtype=np.uint8)
        position += tensor.nbytes
    return message


def unpack(message: Message, kind: type[Content]) -> tuple[Content, dict[str, Tensor]]:
    """Return what a message says.

    Args:
        message: that `pack` has made.
        kind: of its content.

    Returns:
        tuple[Content, dict[str, Tensor]]: the content, and the tensors by name: views of the message, which may be
        read-only.

    Raises:
        CorruptFileError: it is no such message.
    """
    if not isinstance(message, np.ndarray) or message.dtype != np.uint8 or message.ndim != 1:
        raise wrong(_PLACE, f"it is a {type(message).__name__}, not an array of bytes", _REMEDY)
    data = message.data
    length = int.from_bytes(data[:_LENGTH], "little")
    if not 2 <= length <= len(data) - _LENGTH:
        raise wrong(_PLACE, f"its header claims {length} bytes and it has {len(data)}", _REMEDY)
    text = bytes(data[_LENGTH : _LENGTH + length])
    entries = parse_header(text, _PLACE, len(data)).tensors
    inner = parse_object(text, _PLACE).get("__metadata__", {}).get(_CONTENT, "")
    content = validated(parse_object(inner.encode(), _PLACE), kind, _PLACE, _REMEDY)
    tensors = {}
    for entry in entries:
        if entry.start % entry.dtype.itemsize:
            raise CorruptFileError(f"{_PLACE} is malformed: tensor {entry.name!r} is not aligned; {_REMEDY}")
        part = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.end > entry.start:
            part = _view(message[entry.start : entry.end]).view(entry.dtype).reshape(entry.shape)
        tensors[entry.name] = part
    return content, tensors


def _view(part: Message) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(part.data, dtype=torch.uint8)
