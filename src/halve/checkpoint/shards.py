"""The safetensors container, byte by byte: 8 bytes of header length, a JSON header, then the tensors back to back.

Headers are parsed here rather than by a library because a checkpoint is rewritten with its header kept to the byte,
because an attacker may have written it, and because a tensor must be readable alone, without mapping the file.
Format: https://huggingface.co/docs/safetensors.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta, Struct, ValidationError, convert
from torch import Tensor

from halve.errors import CorruptFileError, UnreadableFileError, UnsupportedModelError

MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_JSON = 1 << 28
CHUNK = 1 << 24
_LENGTH = 8
LARGEST = 1 << 40
"""Above this no dimension of a tensor is sound, not even of an empty one: products of a few must fit 64 bits."""

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
"""What safetensors calls each dtype."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``path``[``start``:``end``], in bytes from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header bytes (length field included), and its tensors in the order of their bytes."""

    path: Path
    header: bytes
    tensors: tuple[TensorEntry, ...]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one sentence which file could not be read.

    Raises:
        UnreadableFileError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UnreadableFileError(
            f"{path} cannot be read ({error.strerror or error}): make it readable, or fetch or write it again"
        ) from error


def read_shard(path: Path) -> Shard:
    """Read and validate the header of a safetensors file; the tensors themselves are not read.

    Raises:
        UnreadableFileError: the file cannot be read.
        CorruptFileError: the header is malformed, the tensors overlap, leave holes, or do not
            fill the file exactly.
        UnsupportedModelError: a tensor has a dtype this package does not know.
    """
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(_LENGTH), "little")
        if not 2 <= length <= min(MAX_HEADER, size - _LENGTH):
            raise _corrupt(path, f"its header claims {length} bytes and the file has {size}")
        text = file.read(length)
    return parse_header(text, path, size)


def parse_header(text: bytes, path: Path, size: int) -> Shard:
    """Validate the header of a safetensors file.

    Args:
        text: the header, without the length field.
        path: the file, for messages and for the entries; it is not read.
        size: of the whole file in bytes.

    Raises:
        CorruptFileError, UnsupportedModelError: as `read_shard`.
    """
    header = parse_object(text, path)
    try:
        convert(header.pop("__metadata__", {}), dict[str, str])
    except ValidationError as error:
        raise _corrupt(path, "its __metadata__ is not a map of strings") from error
    base = _LENGTH + len(text)
    entries = sorted((_entry(path, name, spec, base) for name, spec in header.items()), key=lambda e: (e.start, e.end))
    position = base
    for entry in entries:
        if entry.start != position:
            raise _corrupt(path, f"tensor {entry.name!r} starts at byte {entry.start}, not at {position}")
        position = entry.end
    if position != size:
        raise _corrupt(path, f"its tensors end at byte {position} and the file has {size}")
    return Shard(path, len(text).to_bytes(_LENGTH, "little") + text, tuple(entries))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 256 MiB.

    Raises:
        UnreadableFileError: it cannot be read.
        CorruptFileError: it is too large, or is not a JSON object.
    """
    with reading(path), path.open("rb") as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise CorruptFileError(f"{path} is larger than {MAX_JSON >> 20} MiB, which no JSON file of a model is")
    return parse_object(text, path)


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """Parse untrusted JSON: an object, without repeated keys, nested within reason.

    Raises:
        CorruptFileError: it is none; the message names ``path``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is repeated")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its JSON is malformed ({error})") from error
    if not isinstance(value, dict):
        raise _corrupt(path, f"its JSON is a {type(value).__name__}, not an object")
    return value


def read_tensor(entry: TensorEntry) -> Tensor:
    """Return one tensor, of the entry's shape and dtype, in memory of its own.

    Raises:
        CorruptFileError: the file has become shorter since its header was read.
        UnreadableFileError: it cannot be read.
    """
    buffer = bytearray(entry.end - entry.start)
    with reading(entry.path), entry.path.open("rb") as file:
        file.seek(entry.start)
        got = file.readinto(buffer)
    if got != len(buffer):
        raise _corrupt(entry.path, f"tensor {entry.name!r} ends beyond the file")
    if not buffer:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)


def read_chunks(entry: TensorEntry) -> Iterator[bytes]:
    """Yield the raw bytes of one tensor, at most 16 MiB at a time.

    Raises:
        CorruptFileError: as `read_tensor`.
    """
    left = entry.end - entry.start
    with reading(entry.path), entry.path.open("rb") as file:
        file.seek(entry.start)
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise _corrupt(entry.path, f"tensor {entry.name!r} ends beyond the file")
            left -= len(chunk)
            yield chunk


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as safetensors stores them: row-major, little-endian."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return one SHA-256, in hexadecimal, of the names, dtypes, shapes and bytes of tensors, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def build_header(
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the header, length field included, of a file holding these (name, dtype, shape) in this order.

    Args:
        tensors: name, dtype and shape of each.
        metadata: texts to keep with them, besides the format.

    Raises:
        UnsupportedModelError: a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, dtype, shape in tensors:
        if dtype not in DTYPE_NAMES:
            raise UnsupportedModelError(f"tensor {name!r} has dtype {dtype}, which safetensors cannot store")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # the tensors start aligned
    return len(text).to_bytes(_LENGTH, "little") + text


def file_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """Yield the content of a safetensors file of tensors in memory, in their order, one tensor at a time.

    Args:
        tensors: by name, on any device.
        metadata: texts to keep with them, besides the format.

    Raises:
        UnsupportedModelError: a dtype that the format does not have.
    """
    yield build_header([(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()], metadata)
    for tensor in tensors.values():
        yield tensor_bytes(tensor)


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in a header."""

    dtype: str
    shape: list[Annotated[int, Meta(ge=0, lt=LARGEST)]]
    data_offsets: tuple[int, int]


def _entry(path: Path, name: str, spec: object, base: int) -> TensorEntry:
    try:
        found = convert(spec, _Entry)
    except (ValidationError, UnicodeError) as error:
        raise _corrupt(path, f"the header entry of tensor {name!r} is malformed") from error
    begin, end = found.data_offsets
    if not 0 <= begin <= end:
        raise _corrupt(path, f"the header entry of tensor {name!r} is malformed")
    dtype = _TORCH_DTYPES.get(found.dtype)
    if dtype is None:
        raise UnsupportedModelError(
            f"tensor {name!r} in {path} has dtype {found.dtype}: convert the checkpoint to a plain floating-point one"
        )
    if end - begin != math.prod(found.shape) * dtype.itemsize:
        raise _corrupt(
            path, f"tensor {name!r} has {end - begin} bytes, which {found.dtype} of shape {found.shape} does not"
        )
    return TensorEntry(name, dtype, tuple(found.shape), path, base + begin, base + end)


def _corrupt(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"{path} is corrupt: {what}; fetch or write it again")
