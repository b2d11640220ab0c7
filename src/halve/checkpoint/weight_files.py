"""The weight files of a checkpoint directory that nobody here wrote: what each ``*.safetensors`` in it is.

transformers loads ``model.safetensors`` or, without one, what the index names. Whatever else lies there belongs to the
checkpoint all the same: a file with tensors of its own is carried along as it is; a second copy of the weights, which
would lie dense beside the pruned ones, and an adapter are told apart from it.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Struct

from halve.checkpoint.directory import INDEX, WEIGHTS, contained, in_hub_cache, is_plain_name
from halve.checkpoint.shards import Shard, read_json, read_shard
from halve.checkpoint.validated import shown, validated
from halve.errors import CorruptFileError, HalveError, InputError, UnsupportedModelError, first_few, noting

ADAPTERS = "adapter_model"
"""How the weight files of an adapter begin."""
COPIES = "consolidated*.safetensors"
"""Mistral's second copy of the same weights, under names of its own, which transformers does not load."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PREFIXES = ("model.", "transformer.")
"""What a tensor's name may begin with, or not, and be the same tensor for transformers."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weight files of a checkpoint, as far as they can be read.

    Attributes:
        shards: the headers of those that transformers loads, in the order of their names.
        carried: the headers of those that it does not, with tensors of their own: an index may name them or not.
        copies: files with a second copy of what is in ``shards``; their headers are not held to anything.
        unsound: names of the files of the first two kinds that cannot be read.
        weight_map: the file of every tensor, as the index has it; empty where there is none, or none to be trusted.
        index: whether the index belongs to these files; one that names no file that is here does not.
        faults: what is wrong, in the order in which it was found.
    """

    shards: tuple[Shard, ...]
    carried: tuple[Shard, ...]
    copies: tuple[Path, ...]
    unsound: frozenset[str]
    weight_map: Mapping[str, str]
    index: bool
    faults: tuple[HalveError, ...]

    def told(self, tensor: str) -> bool:
        """Whether `faults` say already why a tensor is not there: its file cannot be read, or does not hold it."""
        return tensor in self.weight_map or bool(self.unsound and not self.weight_map)

    @property
    def names(self) -> set[str]:
        """Names of all files that belong to the checkpoint, readable or not."""
        return {*self.unsound, *(shard.path.name for shard in (*self.shards, *self.carried))}


def read_weights(directory: Path) -> Weights:
    """Read the headers of the safetensors files of a checkpoint directory, and check them against the index.

    Raises:
        InputError: there are none, or there are two sets of weights.
        UnsupportedModelError: the weights are pickled, or of an unknown dtype; there is an adapter beside them.
        CorruptFileError: a file is absent, malformed, outside the directory, or contradicts the index.
        UnreadableFileError: a file cannot be read.
    """
    weights = survey_weights(directory)
    if weights.faults:
        raise weights.faults[0]
    return weights


def survey_weights(directory: Path) -> Weights:
    """Do what `read_weights` does, and go on after what is wrong.

    Where there is no index to be trusted, all safetensors files of the directory are taken for weight files.
    """
    faults: list[HalveError] = []
    weight_map: dict[str, str] = {}
    present = {path.name for path in directory.glob("*.safetensors") if not path.name.startswith(".")}
    with noting(faults.append):
        if (directory / INDEX).exists():
            weight_map = weight_map_of(contained(directory, directory / INDEX))
        elif WEIGHTS not in present:
            raise _no_weights(directory)
    named = set(weight_map.values())
    if WEIGHTS in present and not named & present:
        named, weight_map = set(), {}
    main = {WEIGHTS} if WEIGHTS in present else named or present  # the first, where both are there, as transformers
    found: dict[str, Shard] = {}
    copies = {path.name for path in directory.glob(COPIES)} - main - named
    for name in sorted((main | named | present) - copies):
        with noting(faults.append):
            if name.startswith(ADAPTERS) and name not in main:
                raise _adapter(directory / name)
            found[name] = read_shard(contained(directory, directory / name))
    if (directory / f"{ADAPTERS}.bin").exists():
        faults.append(_adapter(directory / f"{ADAPTERS}.bin"))
    shards = [found[name] for name in sorted(main & found.keys())]
    repeating = _repeating(shards, [found[name] for name in sorted(found.keys() - main)])
    if WEIGHTS in main - named and named & repeating:
        faults.append(_two_candidates(directory, sorted(named & repeating)))
        named, weight_map = set(), {}
    copies |= repeating - named
    bound = [shard for name, shard in found.items() if name in main | named]
    unsound = (main | named | present) - copies - found.keys()
    faults += disagreements(bound, weight_map, directory / INDEX, unsound)
    return Weights(
        shards=tuple(shards),
        carried=tuple(found[name] for name in sorted(found.keys() - main - copies)),
        copies=tuple(directory / name for name in sorted(copies)),
        unsound=frozenset(unsound),
        weight_map=weight_map,
        index=bool(weight_map),
        faults=tuple(faults),
    )


def refuse_copies(directory: Path, copies: Sequence[Path]) -> None:
    """Refuse second copies of the weights where the weights are going to be changed.

    In the hub's cache, whose files other programs use too, they are left where they are: Halve fetches none there.

    Raises:
        InputError: there are some.
    """
    if copies and not in_hub_cache(directory):
        raise InputError(
            f"{directory} holds the weights a second time in {first_few([path.name for path in copies])}, which "
            "transformers does not load and which would stay as it is beside the pruned ones: move it out of the "
            "directory"
        )


def _repeating(shards: Sequence[Shard], others: Sequence[Shard]) -> set[str]:
    """Return the names of the other files that hold a tensor of the weights once more."""
    held = {_bare(entry.name) for shard in shards for entry in shard.tensors}
    return {shard.path.name for shard in others if any(_bare(entry.name) in held for entry in shard.tensors)}


def _bare(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _two_candidates(directory: Path, others: Sequence[str]) -> InputError:
    return InputError(
        f"{directory} has two sets of weights, {WEIGHTS} and what {INDEX} names ({first_few(others)}), of which "
        f"transformers loads {WEIGHTS}: move the one that is not meant out of the directory, the index with its files"
    )


def _adapter(path: Path) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} is an adapter beside the weights of its base model: merge it into them, or move it out of the "
        "directory to use the base model alone"
    )


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


def _no_weights(directory: Path) -> InputError | UnsupportedModelError:
    pickles = [path.name for path in sorted(directory.iterdir()) if path.suffix in _PICKLES]
    if pickles:
        return UnsupportedModelError(
            f"{directory} has only pickled weights ({pickles[0]}), which can run code when read: convert them where "
            "you trust them, with transformers' from_pretrained(...).save_pretrained(...)"
        )
    return InputError(f"{directory} has neither {WEIGHTS} nor {INDEX}: give the directory of a safetensors model")
