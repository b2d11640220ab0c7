"""The manifest of a packed checkpoint, ``halve-packed.json``: what is packed, and what restores the plain checkpoint.

``docs/packed-format.md`` describes it. A manifest is untrusted input: types, names and ranges are checked here, and
`halve.packed.read` holds it to the files beside it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from msgspec import UNSET, Meta, Struct, UnsetType

from halve.checkpoint.directory import INDEX, PACKED, WEIGHTS, is_plain_name
from halve.checkpoint.shards import DTYPE_NAMES, LARGEST, Shard, parse_header, parse_object, read_json
from halve.checkpoint.validated import validated, wrong
from halve.checkpoint.weight_files import check_weight_map, disagreements
from halve.errors import CorruptFileError, PatternError, UnsupportedModelError
from halve.maths.grid import Bits
from halve.maths.pattern import Pattern
from halve.model.layers import Layout
from halve.runtime.packed_matrix import DTYPES, kept_per_row
from halve.runtime.quantised_matrix import QUANTISED, why_not

FORMAT = "halve-packed"
_UNQUANTISED = 1
"""The version that knows of no integers."""
VERSION = 2
"""The newest: a directory without quantised matrices is written as version 1, which older versions of Halve read."""
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Size = Annotated[int, Meta(ge=0, lt=LARGEST)]
Dimension = Annotated[int, Meta(ge=1, lt=LARGEST)]
Part = TypeVar("Part")
_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in DTYPES}
_FAULT = "is malformed"
_REMEDY = "fetch it again, or pack the plain checkpoint again"


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """How one tensor of the plain checkpoint is packed.

    Attributes:
        pattern: ``N:M`` or ``S%``.
        shape: (d_out, d_in) of the packed matrix; the matrices of experts that are one tensor lie one below the other.
        dtype: of its values, one of `halve.runtime.packed_matrix.DTYPES`; where they are quantised, of those unpacked.
        layout: how the tensor has it: its last two dimensions are (d_out, d_in), or the other way round.
        bits: of the integers that the kept weights are; None where they are numbers of ``dtype``.
    """

    pattern: str
    shape: tuple[int, int]
    dtype: torch.dtype
    layout: Layout
    bits: Bits | None = None


class File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size in bytes and sha256, in hexadecimal, of a file."""

    size: Size
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``halve-packed.json`` says.

    Attributes:
        matrices: every packed tensor by its name in the plain checkpoint.
        left_dense: tensors that were asked for and not packed, and why.
        shards: the weight files of the plain checkpoint, in the order of their names.
        index: the plain checkpoint's index, as it is there; None where there is none.
        index_sha256: its sha256; empty where there is none.
        files: every file of the packed directory but the manifest; weight files that are carried along among them.
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
        return found if self.index is None else found | {INDEX: File(size=len(self.index), sha256=self.index_sha256)}

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
        named = set(weight_map.values())
        carried = named - names  # beside a single weight file, an index may name others, which are not loaded
        listed = self.files.keys() - {shard.packed for shard in self.shards}
        if not (carried <= listed if names == {WEIGHTS} else named == names):
            raise CorruptFileError(
                f"the weight files in {directory / PACKED} are not those of its index: pack it again"
            )
        for error in disagreements(shards, weight_map, directory / INDEX, carried):
            raise error
        return shards

    def to_bytes(self) -> bytes:
        """Return the file."""
        quantised = any(matrix.bits for matrix in self.matrices.values())
        content = {
            "format": FORMAT,
            "version": VERSION if quantised else _UNQUANTISED,
            "halve": version("halve"),
            "matrices": {
                name: {
                    "pattern": matrix.pattern,
                    "shape": list(matrix.shape),
                    "dtype": DTYPE_NAMES[matrix.dtype],
                    "layout": matrix.layout,
                }
                | ({"values": f"int{matrix.bits}"} if matrix.bits else {})
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


class _Shard(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    packed: str
    size: Size
    sha256: Sha256
    header: str


class _Index(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    text: str
    sha256: Sha256


class _Matrix(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pattern: str
    shape: tuple[Dimension, Dimension]
    dtype: Literal["F32", "F16", "BF16"]
    layout: Literal["out_in", "in_out"]  # convolutions are not packed
    values: Literal["int8", "int4"] | UnsetType = UNSET


class _Content(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file; its matrices and files are validated one by one, so that a message can name the one that is wrong."""

    format: str
    version: int
    halve: str
    matrices: dict[str, object]
    left_dense: dict[str, str]
    shards: Annotated[tuple[_Shard, ...], Meta(min_length=1)]
    index: _Index | None
    files: dict[str, object]


def read_manifest(path: Path) -> Manifest:
    """Read and validate a manifest; the files beside it are not looked at.

    Raises:
        CorruptFileError: it is malformed.
        UnreadableFileError: it cannot be read.
        UnsupportedModelError: it is of a newer version.
    """
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise _malformed(path, f"its format is {content.get('format')!r}, not {FORMAT!r}")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise _malformed(path, f"its version is {version!r}")
    if version > VERSION:
        raise UnsupportedModelError(
            f"{path} has version {version} of the packed format, and this version of Halve reads {VERSION}: upgrade "
            "Halve"
        )
    found = _part(path, content, _Content)
    manifest = Manifest(
        matrices={name: _matrix(path, name, entry) for name, entry in found.matrices.items()},
        left_dense=found.left_dense,
        shards=tuple(_shard(path, entry) for entry in found.shards),
        index=None if found.index is None else _encoded(path, found.index.text),
        index_sha256="" if found.index is None else found.index.sha256,
        files={name: _part(path, entry, File, f"files[{name!r}]") for name, entry in found.files.items()},
    )
    _check_names(path, manifest)
    if version == _UNQUANTISED and any(matrix.bits for matrix in manifest.matrices.values()):
        raise _malformed(path, f"its version is {version}, which knows of no integers, and it has some")
    return manifest


def _part(path: Path, content: object, kind: type[Part], at: str = "") -> Part:
    return validated(content, kind, path, _REMEDY, at=at, fault=_FAULT)


def _matrix(path: Path, name: str, entry: object) -> PackedTensor:
    found = _part(path, entry, _Matrix, f"matrices[{name!r}]")
    try:
        kept_per_row(Pattern(found.pattern), found.shape[1])
    except PatternError as error:
        raise _malformed(path, f"matrix {name!r}: {error}") from error
    bits = None if found.values is UNSET else QUANTISED[found.values]
    if bits is not None and (reason := why_not(Pattern(found.pattern))):
        raise _malformed(path, f"matrix {name!r}: {reason}")
    dtype = _DTYPES[found.dtype]
    return PackedTensor(pattern=found.pattern, shape=found.shape, dtype=dtype, layout=found.layout, bits=bits)


def _shard(path: Path, entry: _Shard) -> PlainShard:
    if not is_plain_name(entry.name):
        raise _malformed(path, f"{entry.name!r} under `shards` is not the name of a file")
    return PlainShard(
        name=entry.name,
        packed=entry.packed,
        header=_encoded(path, entry.header),
        file=File(size=entry.size, sha256=entry.sha256),
    )


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
            raise _malformed(path, f"{name!r} is not the name of a packed file that it lists")
    kept = manifest.files.keys() - set(packed)
    restored = [*names, *kept, *([INDEX] if manifest.index is not None else [])]
    if len(set(packed)) < len(packed) or len(set(restored)) < len(restored) or PACKED in {*restored, *packed}:
        raise _malformed(path, "two files have the same name")


def _malformed(path: Path, what: str) -> CorruptFileError:
    return wrong(path, what, _REMEDY, fault=_FAULT)
