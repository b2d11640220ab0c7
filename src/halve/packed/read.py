"""Packed checkpoints: open one that anybody may have written, read its matrices, verify it, restore the plain one.

``docs/packed-format.md`` describes the files. One matrix is held in memory at a time.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from halve.checkpoint.directory import (
    CONFIG,
    INDEX,
    MEASURED,
    PACKED,
    PAGE,
    RECORD,
    check_config,
    companions,
    contained,
)
from halve.checkpoint.durable import Content, file_chunks, filling, sha256_of
from halve.checkpoint.load import Source
from halve.checkpoint.room import check_destination
from halve.checkpoint.shards import Shard, TensorEntry, read_chunks, read_json, read_shard, read_tensor, tensor_bytes
from halve.errors import CorruptFileError, InputError
from halve.maths.pattern import Pattern
from halve.model.layers import Layout
from halve.packed.manifest import Manifest, PackedTensor, read_manifest
from halve.runtime.native import expand
from halve.runtime.packed_matrix import OVERREAD, PackedMatrix, kept_per_row, part_shapes

MASK = ".mask"
VALUES = ".values"
"""What is added to the name of a packed tensor for the names of its two parts."""
_OTHERS = (RECORD, MEASURED, PAGE, "README.md")


@dataclass(frozen=True)
class PackedCheckpoint:
    """A packed checkpoint whose files, headers and shapes have been checked; `open_packed` makes it.

    Attributes:
        directory: where it lies.
        manifest: what ``halve-packed.json`` says.
        plain: the weight files of the plain checkpoint: their headers, and the tensors in the order of their bytes.
        entries: every tensor in the packed files, by name.
        trust_remote_code: whether the user trusts the Python code in the directory.
    """

    directory: Path
    manifest: Manifest
    plain: tuple[Shard, ...]
    entries: Mapping[str, TensorEntry]
    trust_remote_code: bool = False

    @property
    def source(self) -> Source:
        """The directory, as what a model is loaded from."""
        packed = tuple(self.directory / shard.packed for shard in self.manifest.shards)
        return Source("packed", self.directory, str(self.directory), None, packed, self.trust_remote_code)

    def matrix(self, name: str) -> PackedMatrix:
        """Read one packed tensor as the matrix that it is multiplied as, its mask checked.

        Raises:
            CorruptFileError: the mask does not keep what the pattern keeps.
        """
        packed = self.manifest.matrices[name]
        mask, values = (read_tensor(self.entries[name + part]) for part in (MASK, VALUES))
        try:
            matrix = PackedMatrix(mask, values, packed.shape, Pattern(packed.pattern).text)
            matrix.check_mask()
        except InputError as error:
            raise CorruptFileError(
                f"tensor {name!r} in {self.directory} is corrupt: {error}; fetch it again"
            ) from error
        return matrix

    def tensor(self, entry: TensorEntry) -> Tensor:
        """Read one tensor of the plain checkpoint, unpacked if it is packed.

        Raises:
            CorruptFileError: as `matrix`.
        """
        packed = self.manifest.matrices.get(entry.name)
        if packed is None:
            return read_tensor(self.entries[entry.name])
        matrix = self.matrix(entry.name)
        return as_tensor(expand(matrix, 0, matrix.d_out), entry.shape, packed.layout)

    def plain_bytes(self, shard: Shard) -> Iterator[bytes | memoryview]:
        """Yield one weight file of the plain checkpoint, one of `plain`.

        Raises:
            CorruptFileError: as `matrix`.
        """
        yield shard.header
        for entry in shard.tensors:
            if entry.name in self.manifest.matrices:
                yield tensor_bytes(self.tensor(entry))
            else:
                yield from read_chunks(self.entries[entry.name])


def as_matrix(tensor: Tensor, layout: Layout) -> Tensor:
    """Return a tensor of two or more dimensions as (d_out, d_in), several matrices one below the other."""
    view = tensor if layout == "out_in" else tensor.transpose(-1, -2)
    return view.reshape(-1, view.shape[-1])


def as_tensor(matrix: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """Return the contiguous tensor that `as_matrix` turns into ``matrix``."""
    if layout == "out_in":
        return matrix.reshape(shape)
    return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()


def matrix_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """Return the shape of what `as_matrix` makes of a tensor; of one with fewer than two dimensions, (0, 0)."""
    if len(shape) < 2:
        return 0, 0
    d_out, d_in = shape[-2:] if layout == "out_in" else shape[:-3:-1]
    return math.prod(shape[:-2]) * d_out, d_in


def carried_files(directory: Path, *, code: bool) -> dict[str, Path]:
    """Return the files of a checkpoint that go with it unchanged, packed or not, by name: all but weights and index.

    Raises:
        CorruptFileError: one of them is a link that leaves the checkpoint, or no file.
    """
    names = [CONFIG, *(name for name in _OTHERS if (directory / name).exists())]
    own = [contained(directory, directory / name) for name in names]
    return {path.relative_to(directory).as_posix(): path for path in (*own, *companions(directory, code=code))}


def open_packed(directory: str | Path, *, trust_remote_code: bool = False) -> PackedCheckpoint:
    """Open a packed checkpoint: its manifest, headers, shapes, names and sizes are checked, no tensor is read.

    Args:
        directory: where it lies.
        trust_remote_code: whether to accept a model that comes with Python code of its own; none of it is run here.

    Raises:
        InputError: it is not a packed checkpoint.
        UnsupportedModelError: it is of a newer version; a field of the config is forbidden.
        CorruptFileError: a file is missing, malformed, of another size, a link that leaves the directory, or
            contradicts another one.
    """
    place = Path(directory).expanduser()
    if not (place / PACKED).exists():
        raise InputError(f"{directory} is no packed checkpoint, it has no {PACKED}: `halve pack` writes one")
    manifest = read_manifest(contained(place, place / PACKED))
    check_config(place, code=trust_remote_code)
    _check_files(place, manifest)
    plain = manifest.plain_shards(place)
    entries: dict[str, TensorEntry] = {}
    for shard, named in zip(plain, manifest.shards, strict=True):
        found = {entry.name: entry for entry in read_shard(place / named.packed).tensors}
        expected = _expected(place, shard, manifest)
        if odd := sorted(found.keys() ^ expected.keys()):
            raise CorruptFileError(
                f"{place / named.packed} and {PACKED} disagree about tensor {odd[0]!r}: fetch both again"
            )
        for name, (dtype, shape) in expected.items():
            if (found[name].dtype, found[name].shape) != (dtype, shape):
                raise CorruptFileError(
                    f"tensor {name!r} in {place / named.packed} is {found[name].dtype} of shape {found[name].shape}, "
                    f"not {dtype} of shape {shape}: fetch it again"
                )
        if again := entries.keys() & found.keys():
            raise CorruptFileError(f"{place} has tensor {min(again)!r} twice: fetch it again")
        entries |= found
    if unused := sorted(manifest.matrices.keys() - {entry.name for shard in plain for entry in shard.tensors}):
        raise CorruptFileError(f"{place / PACKED} packs {unused[0]!r}, which no weight file holds: fetch it again")
    return PackedCheckpoint(place, manifest, plain, entries, trust_remote_code)


def _check_files(place: Path, manifest: Manifest) -> None:
    packed = {shard.packed for shard in manifest.shards}
    carried = carried_files(place, code=True)  # listed whether or not it may be run
    listed = manifest.files.keys() - packed
    if extra := sorted(carried.keys() - listed):
        raise CorruptFileError(f"{place / extra[0]} is not among the files in {PACKED}: remove it")
    if missing := sorted(listed - carried.keys()):
        raise CorruptFileError(
            f"{place / missing[0]} is listed in {PACKED} and missing, or no file of a checkpoint: fetch it again"
        )
    for name, file in manifest.files.items():
        size = contained(place, place / name).stat().st_size
        if size != file.size:
            raise CorruptFileError(f"{place / name} has {size} bytes, not {file.size}: fetch it again")


def parts_of(name: str, packed: PackedTensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of the tensors that take a packed one's place, by name, in their order in a file."""
    d_out, d_in = packed.shape
    mask, values = part_shapes(d_out, d_in, kept_per_row(Pattern(packed.pattern), d_in))
    return {name + MASK: (torch.uint8, mask), name + VALUES: (packed.dtype, values)}


def _expected(place: Path, shard: Shard, manifest: Manifest) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor that the packed file of a plain one holds."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for entry in shard.tensors:
        packed = manifest.matrices.get(entry.name)
        if packed is None:
            parts = {entry.name: (entry.dtype, entry.shape)}
        else:
            if packed.dtype != entry.dtype or matrix_shape(entry.shape, packed.layout) != packed.shape:
                raise CorruptFileError(
                    f"{place / PACKED} packs {entry.name!r} as {packed.dtype} of shape {packed.shape}, and its header "
                    f"has {entry.dtype} of shape {entry.shape}: fetch it again"
                )
            parts = parts_of(entry.name, packed)
        if again := found.keys() & parts.keys():
            raise CorruptFileError(f"{place / PACKED} has tensor {min(again)!r} twice: fetch it again")
        found |= parts
    return found


@dataclass
class Verified:
    """What `verify` found.

    Attributes:
        problems: what is wrong, a sentence each.
        zeros: of the weights of the packed matrices.
        weights: their number.
    """

    problems: list[str] = field(default_factory=list)
    zeros: int = 0
    weights: int = 0


def verify(checkpoint: PackedCheckpoint) -> Verified:
    """Read everything: sums, masks, values, and that the plain checkpoint comes out with the sums that it had."""
    found = Verified()
    manifest, place = checkpoint.manifest, checkpoint.directory
    for name, file in manifest.files.items():
        if sha256_of(place / name) != file.sha256:
            found.problems.append(f"{name} does not have the sha256 in {PACKED}: it has been changed")
    for name in manifest.matrices:
        try:
            matrix = checkpoint.matrix(name)
        except CorruptFileError as error:
            found.problems.append(str(error))
        else:
            _verify_values(name, matrix, found)
    for name, entry in checkpoint.entries.items():
        if entry.dtype.is_floating_point and name.removesuffix(VALUES) not in manifest.matrices:
            tensor = read_tensor(entry)
            wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
            if not bool(torch.isfinite(wide).all()):
                found.problems.append(f"tensor {name!r} holds NaN or infinity")
    if not found.problems:  # else it does not, and the reason has been told
        found.problems += _restoring_problems(checkpoint)
    return found


def _verify_values(name: str, matrix: PackedMatrix, found: Verified) -> None:
    kept, rest = matrix.values[:-OVERREAD], matrix.values[-OVERREAD:]
    found.weights += math.prod(matrix.shape)
    found.zeros += math.prod(matrix.shape) - int(kept.count_nonzero())
    if not bool(torch.isfinite(kept).all()):
        found.problems.append(f"tensor {name!r} holds NaN or infinity")
    if any(tensor_bytes(rest)):
        found.problems.append(f"tensor {name + VALUES!r} does not end in {OVERREAD} zeros")


def _restoring_problems(checkpoint: PackedCheckpoint) -> Iterator[str]:
    manifest, place = checkpoint.manifest, checkpoint.directory
    sums = {name: file.sha256 for name, file in manifest.restored().items()}
    found = {shard.path.name: hashed(checkpoint.plain_bytes(shard)) for shard in checkpoint.plain}
    if manifest.index is not None:
        found[INDEX] = hashed([manifest.index])
    for name, sha256 in found.items():
        if sha256 != sums[name]:
            yield f"{name} would not be restored with the sha256 in {PACKED}"
    if not (place / RECORD).exists():
        return
    try:
        recorded = read_json(place / RECORD).get("files")
    except CorruptFileError as error:
        yield str(error)
        return
    for name, sha256 in recorded.items() if isinstance(recorded, dict) else ():
        if sums.get(name) != sha256:
            yield f"{name} was not packed with the sha256 recorded in {RECORD}: the plain checkpoint had been changed"


def hashed(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the sha256 of all chunks together, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def unpack_checkpoint(directory: str | Path, out: str | Path, *, trust_remote_code: bool = False) -> dict[str, str]:
    """Restore the plain checkpoint that was packed, byte for byte.

    Args:
        directory: of the packed checkpoint.
        out: the directory to write, absent or empty; taken back if anything fails.
        trust_remote_code: whether to accept a model that comes with Python code of its own; none of it is run.

    Returns:
        dict[str, str]: sha256, in hexadecimal, of every file written, by its name; each is what it was before packing.

    Raises:
        InputError: it is no packed checkpoint; ``out`` is in use or overlaps it, or its volume is too full.
        UnsupportedModelError: as `open_packed`.
        CorruptFileError: as `open_packed`, or a file does not come out as it was packed.
        HalveError: the volume is full, or failed.
    """
    checkpoint = open_packed(directory, trust_remote_code=trust_remote_code)
    place, manifest, target = checkpoint.directory, checkpoint.manifest, Path(out).expanduser()
    expected = manifest.restored()
    check_new(target, checkpoint.source, sum(file.size for file in expected.values()))
    plan: dict[str, Content] = {shard.path.name: checkpoint.plain_bytes(shard) for shard in checkpoint.plain}
    plan |= {name: file_chunks(place / name) for name in expected if name not in {*plan, INDEX, CONFIG}}
    if manifest.index is not None:
        plan[INDEX] = [manifest.index]
    plan[CONFIG] = file_chunks(place / CONFIG)  # last: without it nothing loads what is there
    with filling(target) as write:
        sums = {}
        for name, chunks in plan.items():
            sums[name] = write(name, chunks, "unpacked")
            if sums[name] != expected[name].sha256:
                raise CorruptFileError(
                    f"{name} of {place} does not come out with the sha256 in {PACKED}: the packed checkpoint has been "
                    "changed, fetch it again"
                )
    return sums


def check_new(out: Path, source: Source, bytes_needed: int) -> None:
    """Check that a directory made of ``source`` can be written, absent or empty now.

    Raises:
        InputError: it cannot; see `halve.checkpoint.room.check_destination`.
    """
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: give a new directory, or empty this one")
    check_destination(out, source, bytes_needed)
