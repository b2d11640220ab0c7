"""The manifest of a packed checkpoint, ``halve-packed.json``: what is packed, and what restores the plain checkpoint.

``docs/packed-format.md`` describes it. A manifest is untrusted input: types, names and ranges are checked here, and
`halve.packed.read` holds it to the files beside it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint.directory import INDEX, PACKED, WEIGHTS, check_agreement, check_weight_map, is_plain_name
from halve.checkpoint.shards import DTYPE_NAMES, Shard, parse_header, parse_object, read_json
from halve.errors import CorruptFileError, PatternError, UnsupportedModelError
from halve.maths.pattern import Pattern
from halve.model.layers import Layout
from halve.runtime.packed_matrix import DTYPES, kept_per_row

FORMAT = "halve-packed"
VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 1 << 40
_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in DTYPES}


@dataclass(frozen=True)
class PackedTensor:
    """How one tensor of the plain checkpoint is packed.

    Attributes:
        pattern: ``N:M`` or ``S%``.
        shape: (d_out, d_in) of the packed matrix; the matrices of experts that are one tensor lie one below the other.
        dtype: of its values, one of `halve.runtime.packed_matrix.DTYPES`.
        layout: how the tensor has it: its last two dimensions are (d_out, d_in), or the other way round.
    """

    pattern: str
    shape: tuple[int, int]
    dtype: torch.dtype
    layout: Layout


@dataclass(frozen=True)
class File:
    """Size in bytes and sha256, in hexadecimal, of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class PlainShard:
    """One weight file of the plain checkpoint.

    Attributes:
        name: its name there.
        packed: the file here that holds its tensors.
        header: its header, without the length field.
        file: its size and sha256.
    """

    name: str
    packed: str
    header: bytes
    file: File


@dataclass(frozen=True)
class Manifest:
    """What ``halve-packed.json`` says.

    Attributes:
        matrices: every packed tensor by its name in the plain checkpoint.
        left_dense: tensors that were asked for and not packed, and why.
        shards: the weight files of the plain checkpoint, in the order of their names.
        index: the plain checkpoint's index, as it is there; None where there is none.
        index_sha256: its sha256; empty where there is none.
        files: every file of the packed directory but the manifest.
    """

    matrices: Mapping[str, PackedTensor]
    left_dense: Mapping[str, str]
    shards: tuple[PlainShard, ...]
    index: bytes | None
    index_sha256: str
    files: Mapping[str, File]

    def restored(self) -> dict[str, File]:
        """Return every file of the plain checkpoint by name."""
        packed = {shard.packed for shard in self.shards}
        found = {name: file for name, file in self.files.items() if name not in packed}
        found |= {shard.name: shard.file for shard in self.shards}
        return found if self.index is None else found | {INDEX: File(len(self.index), self.index_sha256)}

    def plain_shards(self, directory: Path) -> tuple[Shard, ...]:
        """Return the headers of the plain checkpoint's weight files, checked against each other and its index.

        Args:
            directory: for messages.

        Raises:
            CorruptFileError: a header or the index is malformed, or they contradict each other.
            UnsupportedModelError: a tensor has a dtype that this package does not know.
        """
        shards = tuple(parse_header(shard.header, directory / shard.name, shard.file.size) for shard in self.shards)
        names = {shard.name for shard in self.shards}
        weight_map: Mapping[str, str] = {}
        if self.index is not None:
            weight_map = check_weight_map(parse_object(self.index, directory / INDEX), directory / INDEX)
        if names != (set(weight_map.values()) or {WEIGHTS}):
            raise CorruptFileError(
                f"the weight files in {directory / PACKED} are not those of its index: pack it again"
            )
        check_agreement(shards, weight_map, directory / INDEX)
        return shards

    def to_bytes(self) -> bytes:
        """Return the file."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "halve": version("halve"),
            "matrices": {
                name: {
                    "pattern": matrix.pattern,
                    "shape": list(matrix.shape),
                    "dtype": DTYPE_NAMES[matrix.dtype],
                    "layout": matrix.layout,
                }
                for name, matrix in self.matrices.items()
            },
            "left_dense": dict(self.left_dense),
            "shards": [
                {
                    "name": shard.name,
                    "packed": shard.packed,
                    "size": shard.file.size,
                    "sha256": shard.file.sha256,
                    "header": shard.header.decode(),
                }
                for shard in self.shards
            ],
            "index": None if self.index is None else {"text": self.index.decode(), "sha256": self.index_sha256},
            "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in self.files.items()},
        }
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(path: Path) -> Manifest:
    """Read and validate a manifest; the files beside it are not looked at.

    Raises:
        CorruptFileError: it is malformed.
        UnsupportedModelError: it is of a newer version.
    """
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise _malformed(path, f"its format is {_short(content.get('format'))}, not {FORMAT!r}")
    found = content.get("version")
    if type(found) is not int or found < 1:
        raise _malformed(path, f"its version is {_short(found)}")
    if found > VERSION:
        raise UnsupportedModelError(
            f"{path} has version {found} of the packed format, and this version of Halve reads {VERSION}: upgrade Halve"
        )
    match content:
        case {
            "halve": str(),
            "matrices": dict(matrices),
            "left_dense": dict(left),
            "shards": [_, *_] as shards,
            "index": None | {"text": str(), "sha256": str()} as index,
            "files": dict(files),
            "format": _,
            "version": _,
            **rest,
        } if not rest and all(isinstance(reason, str) for reason in left.values()):
            pass
        case _:
            raise _malformed(path, "a key is missing, not known, or has a value of the wrong type")
    plain = tuple(_shard(path, entry) for entry in shards)
    manifest = Manifest(
        {name: _matrix(path, name, entry) for name, entry in matrices.items()},
        left,
        plain,
        None if index is None else _encoded(path, index["text"]),
        "" if index is None else index["sha256"],
        {name: _file(path, name, entry) for name, entry in files.items()},
    )
    _check_names(path, manifest)
    return manifest


def _matrix(path: Path, name: str, entry: Any) -> PackedTensor:
    match entry:
        case {
            "pattern": str(pattern),
            "shape": [int(d_out), int(d_in)],
            "dtype": str(dtype),
            "layout": "out_in" | "in_out" as layout,
            **rest,
        } if not rest and dtype in _DTYPES and 1 <= d_out < _MOST and 1 <= d_in < _MOST:
            pass
        case _:
            raise _malformed(path, f"the entry of matrix {_short(name)} is {_short(entry)}")
    try:
        kept_per_row(Pattern(pattern), d_in)
    except PatternError as error:
        raise _malformed(path, f"matrix {_short(name)}: {error}") from error
    return PackedTensor(pattern, (int(d_out), int(d_in)), _DTYPES[dtype], layout)


def _shard(path: Path, entry: Any) -> PlainShard:
    match entry:
        case {"name": str(name), "packed": str(packed), "header": str(header), **rest} if is_plain_name(name):
            return PlainShard(name, packed, _encoded(path, header), _file(path, name, rest))
        case _:
            raise _malformed(path, f"the entry {_short(entry)} under 'shards' is not one")


def _file(path: Path, name: str, entry: Any) -> File:
    match entry:
        case {"size": int(size), "sha256": str(sha256), **rest} if (
            not rest and type(size) is int and 0 <= size < _MOST and _SHA256.fullmatch(sha256)
        ):
            return File(size, sha256)
        case _:
            raise _malformed(path, f"the entry of file {_short(name)} is {_short(entry)}")


def _encoded(path: Path, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _malformed(path, "it holds half of a surrogate pair") from error


def _check_names(path: Path, manifest: Manifest) -> None:
    """Check that files have names of their own: what is restored must not write one over another."""
    packed = [shard.packed for shard in manifest.shards]
    names = [shard.name for shard in manifest.shards]
    for name in packed:
        if not is_plain_name(name) or not name.startswith("packed") or name not in manifest.files:
            raise _malformed(path, f"{_short(name)} is not the name of a packed file that it lists")
    kept = manifest.files.keys() - set(packed)
    restored = [*names, *kept, *([INDEX] if manifest.index is not None else [])]
    if len(set(packed)) < len(packed) or len(set(restored)) < len(restored) or PACKED in {*restored, *packed}:
        raise _malformed(path, "two files have the same name")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _malformed(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"{path} is malformed: {what}; fetch it again, or pack the plain checkpoint again")
