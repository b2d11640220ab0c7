"""What a run knows to be on the disk, as one JSON file that carries its own hash."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msgspec import Struct

from halve.checkpoint.durable import write_file, writing
from halve.checkpoint.shards import read_json
from halve.checkpoint.validated import validated, wrong
from halve.provenance import Fingerprint

MANIFEST = "run.json"
_FORMAT = 3


@dataclass
class Manifest:
    """What is known to be on the disk.

    Attributes:
        fingerprint: of the run.
        call: what repeats it (`halve.run.call_record`), None if it cannot be written down.
        fallback: method for matrices that the asked one fails on.
        tokens: the file of the calibration tokens and how they were asked for, None if none are kept.
        blocks: file and sha256 of every finished block.
        files: sha256 of every file of the finished, verified checkpoint, by name; None before.
        measured: perplexities of the dense model and how they were asked for, None if none were measured.
    """

    fingerprint: Fingerprint
    call: dict[str, Any] | None
    fallback: str | None
    tokens: dict[str, Any] | None
    blocks: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, str] | None = None
    measured: dict[str, Any] | None = None

    def write(self, state: Path) -> None:
        """Replace the manifest in ``state``.

        Raises:
            HalveError: the volume is full or failed; the manifest of before is still there.
        """
        content = {"format": _FORMAT, **asdict(self)}
        text = json.dumps({"sha256": hash_of(content), "content": content}, indent=1)
        with writing(state):
            write_file(state / MANIFEST, [text.encode()], "manifest")


class _Cut(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    how: str
    encoder: int
    before: int
    after: int


class _TokenFacts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    source: str
    sha256: str
    documents: int
    separator: str = ""
    revision: str = ""
    bos: str = ""
    lead: int = 0
    cut: _Cut | None = None


class _Tokens(Struct, frozen=True, kw_only=True):
    sha256: str
    facts: _TokenFacts
    asked: dict[str, Any]


class _Measured(Struct, frozen=True, kw_only=True):
    asked: dict[str, Any]
    scores: list[dict[str, Any]]


class _Content(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    fingerprint: dict[str, str]
    call: dict[str, Any] | None
    fallback: str | None
    tokens: _Tokens | None
    blocks: list[tuple[str, str]]
    files: dict[str, str] | None
    measured: _Measured | None = None


class _Sealed(Struct, frozen=True, kw_only=True):
    sha256: str
    content: dict[str, Any]


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        CorruptFileError: it was damaged, or written by another version.
        UnreadableFileError: it cannot be read.
    """
    remedy = f"no finished block can be trusted: remove {path.parent}, and .halve in the output, and begin again"
    outer = validated(read_json(path), _Sealed, path, remedy)
    if outer.sha256 != hash_of(outer.content):
        raise wrong(path, "it does not have its own sha256", remedy)
    content = validated(outer.content, _Content, path, remedy, at="content")
    if content.format != _FORMAT:
        raise wrong(path, f"its format is {content.format}, and this version of Halve reads {_FORMAT}", remedy)
    return Manifest(
        fingerprint=content.fingerprint,
        call=content.call,
        fallback=content.fallback,
        tokens=None if content.tokens is None else outer.content["tokens"],
        blocks=content.blocks,
        files=content.files,
        measured=None if content.measured is None else outer.content["measured"],
    )


def hash_of(content: Mapping[str, Any]) -> str:
    """Return the sha256 of plain JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
