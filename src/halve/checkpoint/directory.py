"""The files of a checkpoint directory that nobody here wrote: which belong to it, and which are refused."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from msgspec import Struct

from halve.checkpoint.shards import Shard, read_json, read_shard
from halve.checkpoint.validated import shown, validated
from halve.errors import CorruptFileError, HalveError, InputError, UnsupportedModelError, first_few, noting

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "halve.json"
"""The record: what was done to a checkpoint that Halve wrote, beside it."""
MEASURED = "halve-measured.json"
"""What was measured of the run."""
PAGE = "report.html"
"""The report: both, for people."""
PACKED = "halve-packed.json"
"""The manifest of a packed checkpoint, which only a packed one has."""
PACKED_WEIGHTS = "packed*.safetensors"
"""The weight files of a packed checkpoint."""
HOME = ".halve"
"""Name of the directory in an output directory that holds a run until it is complete."""
LAST = (INDEX, CONFIG)
"""The files that are written, or moved to their place, after all others: without them nothing can be loaded."""
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
TEMPLATES = "additional_chat_templates"
CODE = "*.py"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
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
_ELSEWHERE = "--"
"""What separates a repository from a class in ``auto_map``."""


def companions(directory: Path, *, code: bool = False) -> tuple[Path, ...]:
    """Return the files that belong to a model besides its weights, its index and its config, sorted.

    Tokenizer, templates, generation and preprocessor settings, licence; no README, pickles or other formats, and Python
    files only with ``code``.

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
    ]
    return tuple(sorted(kept))


def is_unfinished(directory: Path) -> bool:
    """Whether a directory holds a run that was not completed."""
    return (directory / HOME).is_dir()


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


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weight files of a checkpoint, as far as they can be read.

    Attributes:
        shards: the headers of those that can, in the order of their names.
        unsound: names of the others.
        weight_map: the file of every tensor, as the index has it; empty where there is none, or none to be trusted.
        faults: what is wrong, in the order in which it was found.
    """

    shards: tuple[Shard, ...]
    unsound: frozenset[str]
    weight_map: Mapping[str, str]
    faults: tuple[HalveError, ...]

    def told(self, tensor: str) -> bool:
        """Whether `faults` say already why a tensor is not there: its file cannot be read, or does not hold it."""
        return tensor in self.weight_map or bool(self.unsound and not self.weight_map)


def read_shards(directory: Path) -> tuple[Shard, ...]:
    """Read the headers of the safetensors files of a checkpoint directory, and check them against the index.

    Raises:
        InputError: there are none.
        UnsupportedModelError: the weights are pickled, or of an unknown dtype.
        CorruptFileError: a file is absent, malformed, outside the directory, or contradicts the index.
        UnreadableFileError: a file cannot be read.
    """
    weights = survey_weights(directory)
    if weights.faults:
        raise weights.faults[0]
    return weights.shards


def survey_weights(directory: Path) -> Weights:
    """Do what `read_shards` does, and go on after what is wrong.

    Where there is no index to be trusted, all safetensors files of the directory are taken for weight files.
    """
    faults: list[HalveError] = []
    weight_map: dict[str, str] = {}
    if (directory / WEIGHTS).exists():  # first, as transformers has it
        names = {WEIGHTS}
    else:
        with noting(faults.append):
            weight_map = _index_of(directory)
        names = set(weight_map.values()) or {path.name for path in directory.glob("*.safetensors")}
    shards: list[Shard] = []
    for name in sorted(names):
        with noting(faults.append):
            shards.append(read_shard(contained(directory, directory / name)))
    unsound = names - {shard.path.name for shard in shards}
    faults += disagreements(shards, weight_map, directory / INDEX, unsound)
    return Weights(shards=tuple(shards), unsound=frozenset(unsound), weight_map=weight_map, faults=tuple(faults))


def _index_of(directory: Path) -> dict[str, str]:
    if not (directory / INDEX).exists():
        raise _no_weights(directory)
    return weight_map_of(contained(directory, directory / INDEX))


def disagreements(
    shards: Sequence[Shard], weight_map: Mapping[str, str], index: Path, unsound: Collection[str] = ()
) -> Iterator[CorruptFileError]:
    """Say of every two shards that they hold the same tensors, and of every other that it lacks some of the index's.

    Args:
        shards: all of them that can be read.
        weight_map: the file of every tensor, empty where there is no index.
        index: for messages.
        unsound: names of the files that cannot be read, of which nothing is said.
    """
    holder: dict[str, str] = {}
    twice: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for shard in shards:
        for entry in shard.tensors:
            if entry.name in holder:
                twice[holder[entry.name], shard.path.name].append(repr(entry.name))
            holder[entry.name] = shard.path.name
    for (one, other), names in twice.items():
        yield CorruptFileError(f"tensor {first_few(names)} is in both {one} and {other}: fetch them again")
    told = {*unsound, *(name for pair in twice for name in pair)}
    lacking: defaultdict[str, list[str]] = defaultdict(list)
    for tensor, name in weight_map.items():
        if name not in told and holder.get(tensor) != name:
            lacking[name].append(repr(tensor))
    for name, tensors in lacking.items():
        yield CorruptFileError(
            f"{index} says that tensor {first_few(tensors)} is in {name}, which does not hold it: fetch both again"
        )


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
            for field, reason in forbidden_fields(read_json(contained(directory, path)), code=code).items():
                raise UnsupportedModelError(f"{path} has {field!r}: {reason}")
        elif name == CONFIG:
            if any(directory.glob("*.gguf")):
                raise InputError(f"{directory} holds GGUF files and no {CONFIG}: give one .gguf file by its own path")
            if is_packed(directory):
                raise CorruptFileError(f"{directory} is a packed checkpoint without its {CONFIG}: fetch it again")
            if (directory / "adapter_config.json").exists():
                raise UnsupportedModelError(f"{directory} is an adapter: merge it into its base model, then prune that")
            raise InputError(f"{directory} has no {CONFIG}: give the directory of a model saved by transformers")


def weight_map_of(index: Path) -> dict[str, str]:
    """Return the file of every tensor.

    Raises:
        CorruptFileError: the index is malformed, or names what is no plain file name.
        UnreadableFileError: it cannot be read.
    """
    return check_weight_map(read_json(index), index)


class _Index(Struct, frozen=True, kw_only=True):
    weight_map: dict[str, object] = {}  # checked name by name, to name the one that is wrong


def check_weight_map(content: Mapping[str, Any], index: Path) -> dict[str, str]:
    """Return the file of every tensor, of an index that has been read from ``index``.

    Raises:
        CorruptFileError: as `weight_map_of`.
    """
    found: dict[str, str] = {}
    for tensor, name in validated(content, _Index, index, "fetch it again", fault="is malformed").weight_map.items():
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise CorruptFileError(
                f"{index} names the weight file {shown(repr(name))}, which is not a plain *.safetensors name"
            )
        found[tensor] = name
    if not found:
        raise CorruptFileError(f"{index} has no weight_map: fetch it again")
    return found


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


def _no_weights(directory: Path) -> InputError | UnsupportedModelError:
    pickles = [path.name for path in sorted(directory.iterdir()) if path.suffix in _PICKLES]
    if pickles:
        return UnsupportedModelError(
            f"{directory} has only pickled weights ({pickles[0]}), which can run code when read: convert them where "
            "you trust them, with transformers' from_pretrained(...).save_pretrained(...)"
        )
    return InputError(f"{directory} has neither {WEIGHTS} nor {INDEX}: give the directory of a safetensors model")


def contained(directory: Path, path: Path) -> Path:
    """Return ``path`` if it is a regular file that really lies in ``directory``, or in the same hub cache."""
    try:
        real, root = path.resolve(strict=True), directory.resolve()
    except (OSError, RuntimeError) as error:
        raise CorruptFileError(f"{path} is missing: fetch the checkpoint again") from error
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        repository = root.parent.parent
        # A snapshot links to the blobs of its repository, which link to blobs shared by the whole cache.
        roots += [repository / "blobs", repository.parent / "blobs"]
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise CorruptFileError(f"{path} is a link that leaves the checkpoint: replace it by the file itself")
    if not real.is_file():
        raise CorruptFileError(f"{path} is not a regular file: fetch it again")
    return path
