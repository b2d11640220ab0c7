"""The files of a checkpoint directory that nobody here wrote: which belong to it, and which are refused."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from halve.checkpoint.shards import read_json
from halve.errors import CorruptFileError, InputError, UnsupportedModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "halve.json"
"""The record: what was done to a checkpoint that Halve wrote, beside it."""
MEASURED = "halve-measured.json"
"""What was measured of the run."""
PAGE = "report.html"
"""The report: both, for people."""
CARD = "README.md"
"""The model card, in the hub's format."""
BASE_CARD = "BASE_MODEL_README.md"
"""The card of the model that a checkpoint was made from, as it was there."""
PACKED = "halve-packed.json"
"""The manifest of a packed checkpoint, which only a packed one has."""
PACKED_WEIGHTS = "packed*.safetensors"
"""The weight files of a packed checkpoint."""
HOME = ".halve"
"""Name of the directory in an output directory that holds a run until it is complete."""
TRAINING = "training.json"
"""Name of the manifest in that directory, where what is not complete is a training."""
LAST = (INDEX, CONFIG)
"""The files that are written, or moved to their place, after all others: without them nothing can be loaded."""
_TERMS = tuple(
    "".join(f"[{letter}{letter.swapcase()}]" if letter.isalpha() else letter for letter in name) + "*"
    for name in ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
)
"""What files with terms of use are called, in capitals or not, for `Path.glob` and the hub's client alike."""
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", *_TERMS, BASE_CARD)
TEMPLATES = "additional_chat_templates"
CODE = "*.py"
_FORBIDDEN = {
    "auto_map": "it needs Python code from its own directory, which is not run: read it, and if you trust it give "
    "trust_remote_code (--trust-remote-code)",
    "quantization_config": "it is quantised; prune the unquantised checkpoint instead",
    "compression_config": "it is compressed; prune the plain checkpoint instead",
    "sparsity_config": "it is already stored in a sparse format; prune the plain checkpoint instead",
    "transformers_weights": "it redirects the loading of weights to another file; remove that entry",
    "_attn_implementation_internal": "it sets internals of transformers; remove that entry",
    "_experts_implementation_internal": "it sets internals of transformers; remove that entry",
}
_DTYPES = {"float32", "bfloat16", "float16", "float64", "auto"}
_ELSEWHERE = "--"
"""What separates a repository from a class in ``auto_map``."""
_SEAL = "<!-- Written by Halve; as long as nothing above is changed, its sha256 is {}. -->\n"
_HEADING = b"\n# "
_ABOUT_PACKED = b"""
> **This is the packed form of the checkpoint that is described below**: matrices are stored as their kept values and
> where these are, so that `from_pretrained` finds no weights here. `halve.load("DIR")` loads it, `halve check DIR`
> checks it, and `halve unpack DIR --out PLAIN` restores the ordinary checkpoint and its card. Of that one, PLAIN, holds
> what is said below of loading it, of `--against`, and of the room that it takes.
"""
"""What stands above the heading of a packed checkpoint's card; unpacking takes it out again."""
_LONGEST_CARD = 1 << 20
"""Bytes; Halve writes no card that is longer."""


def companions(directory: Path, *, code: bool = False) -> tuple[Path, ...]:
    """Return the files that belong to a model besides its weights, its index and its config, sorted.

    Tokenizer, templates, generation and preprocessor settings, licence, the card of the model that it was made from; no
    README (`card_of_base`), pickles or other formats, and Python files only with ``code``.

    Raises:
        CorruptFileError: one of them is a link that leaves the checkpoint.
    """
    return tuple(contained(directory, path) for path in companion_paths(directory, code=code))


def companion_paths(directory: Path, *, code: bool = False) -> tuple[Path, ...]:
    """Return the paths of `companions`, links that leave the checkpoint among them."""
    found = {path for pattern in COMPANIONS for path in directory.glob(pattern)}
    found |= set(directory.glob(f"{TEMPLATES}/*.jinja"))
    found |= set(directory.glob(CODE)) if code else set()
    kept = [
        path
        for path in found
        if path.name not in {CONFIG, RECORD, MEASURED, PACKED, "adapter_config.json", "requirements.txt"}
        and not path.name.endswith(".index.json")
        and path.is_file()
        and (code or path.suffix != ".py")
    ]
    return tuple(sorted(kept))


def card_of_base(directory: Path) -> tuple[Path | None, str]:
    """Find the model card that goes along with what is made from a checkpoint, to be called `BASE_CARD` there.

    It is the checkpoint's own card, or the one that it carries along itself where Halve wrote its own.

    Returns:
        tuple[Path | None, str]: the card, None where there is none that can be taken along; and why not, a sentence,
            empty where there is nothing to say.
    """
    own, carried = directory / CARD, directory / BASE_CARD
    if carried.exists() and ((directory / RECORD).exists() or is_sealed(own)):
        if is_sealed(own) or not own.is_file():
            return carried, ""
        said = f"the model card {own} was not taken along: it is not as Halve wrote it, and {BASE_CARD} beside it is"
        return carried, f"{said}; what you wrote into it has to be written again"
    if not (own.is_symlink() or own.exists()) or is_sealed(own):
        return None, ""
    reason = ""
    try:
        contained(directory, own)
    except CorruptFileError:
        reason = "it is a link that leaves the checkpoint, or no file"
    if not reason and not os.access(own, os.R_OK):
        reason = "it cannot be read"
    return (None, f"the model card {own} was not taken along: {reason}") if reason else (own, "")


def sealed(text: str) -> bytes:
    """Return the content of a card that Halve writes: at its end is the sum by which a later change shows."""
    content = f"{text.rstrip()}\n".encode(errors="replace")
    return content + _SEAL.format(hashlib.sha256(content).hexdigest()).encode()


def is_sealed(path: Path) -> bool:
    """Whether a card is one that Halve wrote and nobody changed since, so that it may be replaced."""
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_CARD + 1)
    except OSError:
        return False
    return _unsealed(content) is not None


def _unsealed(content: bytes) -> bytes | None:
    """Return the text of a card without its last line; None where that is not its seal."""
    text = content[: content.rfind(b"\n", 0, -1) + 1]
    return text if content == text + _SEAL.format(hashlib.sha256(text).hexdigest()).encode() else None


def packed_card(content: bytes) -> bytes:
    """Return the card of a packed checkpoint: the plain one's, under a paragraph that says what this one is.

    Args:
        content: of a card that Halve wrote.
    """
    text = _unsealed(content)
    if text is None:
        raise ValueError("the card is not sealed")
    head, heading, rest = text.partition(_HEADING)
    return sealed(b"".join([head, _ABOUT_PACKED, heading, rest]).decode()) if heading else content


def plain_card(content: bytes, sha256: str) -> bytes | None:
    """Return what `packed_card` was made of; None where the content is none, or has another sha256 than on record."""
    text = _unsealed(content) if hashlib.sha256(content).hexdigest() == sha256 else None
    if text is None or _ABOUT_PACKED not in text:
        return None
    return sealed(text.replace(_ABOUT_PACKED, b"", 1).decode())


def is_unfinished(directory: Path) -> bool:
    """Whether a directory holds a run that was not completed."""
    return (directory / HOME).is_dir()


def is_training(directory: Path) -> bool:
    """Whether a directory holds a training that was not completed."""
    return (directory / HOME / TRAINING).exists()


def refuse_unfinished(directory: Path) -> None:
    """Refuse a directory in which a run was not completed, where a finished checkpoint is needed.

    Raises:
        InputError: it is one.
    """
    if is_unfinished(directory):
        raise InputError(f"{directory} holds an unfinished run: complete it with `halve resume {directory}`")


def forbidden_fields(config: Mapping[str, Any], *, code: bool = False) -> dict[str, str]:
    """Return the fields of a config, at any depth, that a plain checkpoint must not have, and why.

    Args:
        config: what was read.
        code: whether code from the checkpoint's own directory is trusted; code from elsewhere never is.
    """
    found: dict[str, str] = {}
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            named = {key: inner for key, inner in value.items() if key in _FORBIDDEN and inner is not None}
            if code and "auto_map" in named:
                elsewhere = _ELSEWHERE in json.dumps(named.pop("auto_map"))
                found |= {"auto_map": "its code lies in another repository: copy it here first"} if elsewhere else {}
            found |= {key: _FORBIDDEN[key] for key in named}
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return found


def check_config(directory: Path, *, code: bool = False) -> None:
    """Refuse settings that a plain checkpoint does not have; ``code`` as for `forbidden_fields`.

    Raises:
        InputError: there is no config.
        UnsupportedModelError: a field is forbidden, or the directory is an adapter.
        CorruptFileError: a file is malformed, or a link that leaves the directory.
    """
    for name in (CONFIG, "tokenizer_config.json"):
        path = directory / name
        if path.exists():
            content = read_json(contained(directory, path))
            for field, reason in forbidden_fields(content, code=code).items():
                raise UnsupportedModelError(f"{path} has {field!r}: {reason}")
            named = content.get("dtype", content.get("torch_dtype")) if name == CONFIG else None
            if named is not None and str(named).removeprefix("torch.") not in _DTYPES:
                raise UnsupportedModelError(
                    f"{path} names the dtype {str(named)!r}, in which no plain model is loaded: name one of "
                    f"{', '.join(sorted(_DTYPES))}"
                )
        elif name == CONFIG:
            if any(directory.glob("*.gguf")):
                raise InputError(f"{directory} holds GGUF files and no {CONFIG}: give one .gguf file by its own path")
            if is_packed(directory):
                raise CorruptFileError(f"{directory} is a packed checkpoint without its {CONFIG}: fetch it again")
            if (directory / "adapter_config.json").exists():
                raise UnsupportedModelError(f"{directory} is an adapter: merge it into its base model, then prune that")
            raise InputError(f"{directory} has no {CONFIG}: give the directory of a model saved by transformers")


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether this is the name of a file in the directory itself, fit to be shown."""
    return isinstance(name, str) and name.isprintable() and name == Path(name).name


def is_packed(directory: Path) -> bool:
    """Whether a directory holds a packed checkpoint, even one that has lost its manifest."""
    plain = (directory / WEIGHTS).exists() or (directory / INDEX).exists()
    return (directory / PACKED).exists() or (not plain and any(directory.glob(PACKED_WEIGHTS)))


def refuse_packed(directory: Path) -> None:
    """Refuse a packed checkpoint where a plain one is needed.

    Raises:
        InputError: it is one.
    """
    if is_packed(directory):
        raise InputError(
            f"{directory} is a packed checkpoint: restore the plain one with `halve unpack {directory} --out DIR`, and "
            "give that"
        )


def contained(directory: Path, path: Path) -> Path:
    """Return ``path`` if it is a regular file that really lies in ``directory``, or in the same hub cache."""
    try:
        real, root = path.resolve(strict=True), directory.resolve()
    except (OSError, RuntimeError) as error:
        raise CorruptFileError(f"{path} is missing: fetch the checkpoint again") from error
    roots = [root]
    if in_hub_cache(directory):
        repository = root.parent.parent
        # A snapshot links to the blobs of its repository, which link to blobs shared by the whole cache.
        roots += [repository / "blobs", repository.parent / "blobs"]
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise CorruptFileError(f"{path} is a link that leaves the checkpoint: replace it by the file itself")
    if not real.is_file():
        raise CorruptFileError(f"{path} is not a regular file: fetch it again")
    return path


def in_hub_cache(directory: Path) -> bool:
    """Whether a directory is what the hub's client has fetched of a model into its cache."""
    root = directory.resolve()
    return root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")
