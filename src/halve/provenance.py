"""Where a result comes from: files, code, versions and facts of the machine that decide its bytes."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint.durable import file_chunks, sha256_of
from halve.checkpoint.load import Source, source_files
from halve.maths import kernels
from halve.versions import package_version, versions

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


def environment() -> dict[str, Any]:
    """Return versions and machine facts that can change the result."""
    return {
        **versions(),
        "safetensors": package_version("safetensors"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "prox_kernel": kernels.describe(),
        **({"prox_kernel_cuda": kernels.describe("cuda")} if torch.cuda.is_available() else {}),
    }


def deciding_environment() -> dict[str, Any]:
    """Return what of the environment decides bytes, and the hash of this package's own code."""
    kept = {key: value for key, value in environment().items() if key in _ENVIRONMENT}
    return {**kept, "deterministic": torch.are_deterministic_algorithms_enabled(), "code": _code()}


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


def flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values under dotted names, each beginning with ``prefix`` where there is one."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            found |= flat(dotted, value)
        else:
            found[dotted] = value
    return found


def files_sha256(fields: Mapping[str, str]) -> str:
    """Return one hash for all files of a model.

    Args:
        fields: of a fingerprint, or `source_fields`; those of other things are left out.
    """
    return hash_text(json.dumps(sorted(item for item in fields.items() if item[0].startswith("model."))))


def source_fields(source: Source) -> Fingerprint:
    """Return the part of the fingerprint that is of the files a model is read from."""
    return _hashes(source, source_files(source))


def code_fields(source: Source) -> Fingerprint:
    """Return the part of the fingerprint that is of Python files beside a model: known before any of them is run."""
    return _hashes(source, [path for path in source_files(source) if path.suffix == ".py"])


def _hashes(source: Source, files: Sequence[Path]) -> Fingerprint:
    root = source.path if source.path.is_dir() else source.path.parent
    return {f"model.{path.relative_to(root)}": sha256_of(path) for path in files}


def hash_text(text: str) -> str:
    """Return the sha256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _code() -> str:
    """Hash this package, as it lies on the disk: versions do not tell one working tree from another."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in {".py", ".so"}:
            digest.update(str(path.relative_to(root)).encode())
            for chunk in file_chunks(path):
                digest.update(chunk)
    return digest.hexdigest()
