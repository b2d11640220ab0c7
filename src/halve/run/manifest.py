"""What a run knows to be on the disk, as one JSON file that carries its own hash."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halve.checkpoint.durable import write_file, writing
from halve.checkpoint.shards import read_json
from halve.errors import CorruptFileError
from halve.run.fingerprint import Fingerprint

MANIFEST = "run.json"
_FORMAT = 3


@dataclass
class Manifest:
    """What is known to be on the disk.

    Attributes:
        fingerprint: of the run.
        call: arguments of `halve.prune` that repeat it, None if they cannot be written down.
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


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        CorruptFileError: it was damaged, or written by another version.
    """
    remedy = f"no finished block can be trusted: remove {path.parent}, and .halve in the output, and begin again"
    try:
        outer = read_json(path)
        content = outer["content"]
        if outer["sha256"] != hash_of(content) or content.pop("format") != _FORMAT:
            raise CorruptFileError(f"{path} was damaged, or written by another version: {remedy}")
        blocks = [(str(name), str(sha256)) for name, sha256 in content.pop("blocks")]
        manifest = Manifest(**content, blocks=blocks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} was damaged ({type(error).__name__}): {remedy}") from error
    kept = (manifest.call, manifest.tokens, manifest.files, manifest.measured)
    if not isinstance(manifest.fingerprint, dict) or not all(isinstance(each, dict | None) for each in kept):
        raise CorruptFileError(f"{path} does not hold what a manifest holds: {remedy}")
    return manifest


def hash_of(content: Mapping[str, Any]) -> str:
    """Return the sha256 of plain JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
