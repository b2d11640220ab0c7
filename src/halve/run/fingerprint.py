"""Everything that decides the bytes of a result, field by field: a run is only ever continued as it was begun."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint.durable import file_chunks, sha256_of
from halve.checkpoint.load import LoadedModel, Source, source_files
from halve.checkpoint.shards import hash_tensors
from halve.run.environment import environment
from halve.run.request import Request
from halve.run.serial import to_plain
from halve.text.calibration import CalibrationData
from halve.text.pairs import PairSet
from halve.text.tokens import TokenSet

Fingerprint = dict[str, str]
"""Field to value, both plain text; fields are dotted names such as ``options.beta`` or ``model.config.json``."""

_DIGEST = re.compile("[0-9a-f]{64}")
_ENVIRONMENT = (
    "halve",
    "torch",
    "transformers",
    "safetensors",
    "python",
    "platform",
    "cpu_capability",
    "threads",
    "prox_kernel",
    "prox_kernel_cuda",
)

_GROUPS = ("calibration", "placement", "loading")
WITHOUT_EFFECT = frozenset(
    {
        *("source", "samples", "seq_len", "text_field", "bos", "pair_fields", "span_corruption"),  # the tokens count
        *("revision", "trust_remote_code"),  # the files of the model do
        *("offload", "work"),  # where something is kept
        "least_prunable",  # whether a model is refused
        "fallback",  # may be added to a run that stopped without one, and is compared by itself
    }
)
"""Fields of what was asked for that cannot change a finished block by themselves, or that count otherwise."""


def fingerprint(loaded: LoadedModel, data: CalibrationData, request: Request) -> Fingerprint:
    """Return the fingerprint of a run that is about to start.

    Every field of what was asked for is in it but those of `WITHOUT_EFFECT` and what is measured before and after.

    Args:
        loaded: the dense model.
        data: calibration tokens, pairs or batches.
        request: what is asked for.
    """
    settings, device = request.settings, request.placement.target
    plain = to_plain(request)
    asked = plain["settings"]
    options = asked.pop("options") | settings.all_options
    others = {name: value for group in _GROUPS for name, value in plain[group].items()}
    fields: dict[str, Any] = {
        **_flat("model", _model(loaded)),
        **_flat("options", options),
        **_flat("", {name: value for name, value in (asked | others).items() if name not in WITHOUT_EFFECT}),
        "calibration": _calibration(data),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device,
        "forward_dtype": request.placement.precision,
        **_flat("environment", {key: value for key, value in environment().items() if key in _ENVIRONMENT}),
        "environment.deterministic": torch.are_deterministic_algorithms_enabled(),
        "environment.code": _code(),
    }
    return {name: str(value) for name, value in sorted(fields.items())}


def code_fields(source: Source) -> Fingerprint:
    """Return the part of the fingerprint that is of Python files beside a model: known before any of them is run."""
    return _hashes(source, [path for path in source_files(source) if path.suffix == ".py"])


def differences(begun: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return what two fingerprints differ in, a phrase a field."""
    found = []
    for name in sorted(begun.keys() | now.keys()):
        before, after = begun.get(name, "absent"), now.get(name, "absent")
        if before != after:
            found.append(f"{name} was {_short(before)} and is {_short(after)}")
    return found


def _short(value: str) -> str:
    return f"{value[:12]}…" if _DIGEST.fullmatch(value) else value


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            found |= _flat(dotted, value)
        else:
            found[dotted] = value
    return found


def files_sha256(fields: Mapping[str, str]) -> str:
    """Return one hash for all files of a model.

    Args:
        fields: of a fingerprint, or `source_fields`; those of other things are left out.
    """
    return _hash_text(json.dumps(sorted(item for item in fields.items() if item[0].startswith("model."))))


def source_fields(source: Source) -> Fingerprint:
    """Return the part of the fingerprint that is of the files a model is read from."""
    return _hashes(source, source_files(source))


def _hashes(source: Source, files: Sequence[Path]) -> Fingerprint:
    root = source.path if source.path.is_dir() else source.path.parent
    return {f"model.{path.relative_to(root)}": sha256_of(path) for path in files}


def _model(loaded: LoadedModel) -> dict[str, str]:
    """Hash the files a model was read from, or its tensors if it was built in memory."""
    if loaded.source is not None:
        return {name.removeprefix("model."): value for name, value in source_fields(loaded.source).items()}
    return {
        "class": type(loaded.model).__name__,
        "config": _hash_text(loaded.model.config.to_json_string()),
        "tensors": hash_tensors(sorted(loaded.model.state_dict().items())),
    }


def _calibration(data: CalibrationData) -> str:
    if isinstance(data, TokenSet | PairSet):
        return data.sha256
    return hash_tensors(named for batch in data for named in sorted(batch.items()))


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _code() -> str:
    """Hash this package, as it lies on the disk: versions do not tell one working tree from another."""
    root = Path(__file__).parents[1]  # of the whole package, not of this folder
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in {".py", ".so"}:
            digest.update(str(path.relative_to(root)).encode())
            for chunk in file_chunks(path):
                digest.update(chunk)
    return digest.hexdigest()
