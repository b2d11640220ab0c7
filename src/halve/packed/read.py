"""Packed checkpoints: open one that anybody may have written, read its matrices, restore the plain one.

``docs/packed-format.md`` describes the files. One matrix is held in memory at a time.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halve.checkpoint.directory import (
    CARD,
    CONFIG,
    INDEX,
    MEASURED,
    PACKED,
    PACKED_WEIGHTS,
    PAGE,
    RECORD,
    check_config,
    companion_paths,
    contained,
    is_packed,
    plain_card,
)
from halve.checkpoint.durable import Content, file_chunks, filling, hashed
from halve.checkpoint.load import Source
from halve.checkpoint.room import check_destination, refuse_contents
from halve.checkpoint.shards import Shard, TensorEntry, read_chunks, read_shard, read_tensor, reading, tensor_bytes
from halve.errors import CorruptFileError, HalveError, InputError, first_few, noting
from halve.maths.pattern import Pattern
from halve.model.layers import Layout
from halve.packed.manifest import File, Manifest, PackedTensor, read_manifest
from halve.runtime.native import AnyPacked, expand
from halve.runtime.packed_matrix import PackedMatrix, kept_per_row, part_shapes
from halve.runtime.quantised_matrix import QuantisedMatrix, quantised_part_shapes

MASK = ".mask"
VALUES = ".values"
PLACES, SCALES, CODES = ".places", ".scales", ".codes"
PARTS = (MASK, VALUES, PLACES, SCALES, CODES)
"""What is added to the name of a packed tensor for the names of its parts: a mask and values, or, where it is
quantised, places, scales and codes."""
_OTHERS = (RECORD, MEASURED, PAGE, CARD)


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

    def matrix(self, name: str) -> AnyPacked:
        """Read one packed tensor as the matrix that it is multiplied as, its mask and its scales checked.

        Raises:
            CorruptFileError: the mask does not keep what the pattern keeps; scales or integers are out of range.
        """
        packed = self.manifest.matrices[name]
        parts = {part.removeprefix(name): read_tensor(self.entries[part]) for part in parts_of(name, packed)}
        pattern = Pattern(packed.pattern).text
        matrix: AnyPacked
        try:
            if packed.bits is None:
                matrix = PackedMatrix(parts[MASK], parts[VALUES], packed.shape, pattern)
                matrix.check_mask()
            else:
                quantised = parts[PLACES], parts[CODES], parts[SCALES]
                matrix = QuantisedMatrix(*quantised, packed.shape, packed.bits, packed.dtype)
                matrix.check()
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

    Weight files that transformers does not load go with it too, but only the manifest of a packed one tells which.

    Raises:
        CorruptFileError: one of them is a link that leaves the checkpoint, or no file.
    """
    return {
        path.relative_to(directory).as_posix(): contained(directory, path)
        for path in (directory / CONFIG, *_carried(directory, code=code))
    }


def _carried(directory: Path, *, code: bool) -> tuple[Path, ...]:
    """Return what is there of `carried_files`, links that leave the directory among it."""
    own = (directory / name for name in (CONFIG, *_OTHERS))
    return (*(path for path in own if path.exists()), *companion_paths(directory, code=code))


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
        UnreadableFileError: a file cannot be read.
    """
    place = Path(directory).expanduser()
    if not is_packed(place):
        raise InputError(f"{directory} is no packed checkpoint, it has no {PACKED}: `halve pack` writes one")
    checkpoint, faults = survey_packed(place, trust_remote_code=trust_remote_code)
    if faults or checkpoint is None:
        raise faults[0]
    return checkpoint


def survey_packed(
    place: Path, *, trust_remote_code: bool = False
) -> tuple[PackedCheckpoint | None, tuple[HalveError, ...]]:
    """Do what `open_packed` does, and go on after what is wrong.

    Returns:
        tuple[PackedCheckpoint | None, tuple[HalveError, ...]]: the checkpoint as far as it can be read, with the
        tensors of sound files alone, None without a manifest; and what is wrong, in the order in which it was found.
    """
    faults: list[HalveError] = []
    manifest: Manifest | None = None
    with noting(faults.append):
        manifest = _manifest_of(place)
    with noting(faults.append):
        check_config(place, code=trust_remote_code)
    if manifest is None:
        for path in sorted(place.glob(PACKED_WEIGHTS)):
            with noting(faults.append):
                read_shard(contained(place, path))
        return None, tuple(faults)
    unsound = set()
    for name, error in _file_faults(place, manifest):
        unsound.add(name)
        faults.append(error)
    plain: tuple[Shard, ...] = ()
    with noting(faults.append):
        plain = manifest.plain_shards(place)
    entries: dict[str, TensorEntry] = {}
    for index, named in enumerate(manifest.shards):
        if named.packed not in unsound:
            with noting(faults.append):
                found = {entry.name: entry for entry in read_shard(contained(place, place / named.packed)).tensors}
                if again := entries.keys() & found.keys():
                    faults.append(CorruptFileError(f"{place} has tensor {min(again)!r} twice: fetch it again"))
                entries |= _agreed(place / named.packed, found, plain[index], manifest, faults) if plain else found
    held = {entry.name for shard in plain for entry in shard.tensors}
    if plain and (unused := sorted(manifest.matrices.keys() - held)):
        faults.append(
            CorruptFileError(f"{place / PACKED} packs {unused[0]!r}, which no weight file holds: fetch it again")
        )
    return PackedCheckpoint(place, manifest, plain, entries, trust_remote_code), tuple(faults)


def _manifest_of(place: Path) -> Manifest:
    if not (place / PACKED).exists():
        raise CorruptFileError(f"{place} is a packed checkpoint without its {PACKED}: fetch that again")
    return read_manifest(contained(place, place / PACKED))


def _file_faults(place: Path, manifest: Manifest) -> Iterator[tuple[str, HalveError]]:
    """Yield the files that are not listed, or missing, of another size, or links that leave the directory; and why."""
    packed = {shard.packed for shard in manifest.shards}
    listed = manifest.files.keys() - packed
    others = {path.relative_to(place).as_posix() for path in _carried(place, code=True)}  # may be run or not
    weights = {path.name for path in place.glob("*.safetensors") if not path.name.startswith(".")} - packed
    known = others | weights
    for name in sorted(others - listed):
        yield name, CorruptFileError(f"{place / name} is not among the files in {PACKED}: remove it")
    for name in sorted(listed - known - {CONFIG}):  # which `check_config` has missed already
        yield (
            name,
            CorruptFileError(
                f"{place / name} is listed in {PACKED} and missing, or no file of a checkpoint: fetch it again"
            ),
        )
    for name in sorted(manifest.files.keys() - (listed - known)):
        try:
            with reading(place / name):
                size = contained(place, place / name).stat().st_size
        except HalveError as error:
            yield name, error
        else:
            if size != (expected := manifest.files[name].size):
                yield name, CorruptFileError(f"{place / name} has {size} bytes, not {expected}: fetch it again")
    for name in sorted(weights - listed):
        yield name, CorruptFileError(f"{place / name} is not among the files in {PACKED}: remove it")


def _agreed(
    path: Path, found: Mapping[str, TensorEntry], plain: Shard, manifest: Manifest, faults: list[HalveError]
) -> dict[str, TensorEntry]:
    """Return the tensors of a packed file that are what its manifest says, and add to ``faults`` which are not."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    left = dict(found)
    for entry in plain.tensors:
        with noting(faults.append):
            for part in ("", *PARTS):  # one message is enough
                left.pop(entry.name + part, None)
            parts = _expected(path.parent, entry, manifest)
            if again := expected.keys() & parts.keys():
                raise CorruptFileError(f"{path.parent / PACKED} has tensor {min(again)!r} twice: fetch it again")
            expected |= parts
    if odd := sorted(left.keys() | (expected.keys() - found.keys())):
        faults.append(
            CorruptFileError(
                f"{path} and {PACKED} disagree about tensor {first_few([repr(name) for name in odd])}: fetch both again"
            )
        )
    agreed = {}
    for name in expected.keys() & found.keys():
        entry, (dtype, shape) = found[name], expected[name]
        if (entry.dtype, entry.shape) == (dtype, shape):
            agreed[name] = entry
        else:
            faults.append(
                CorruptFileError(
                    f"tensor {name!r} in {path} is {entry.dtype} of shape {entry.shape}, not {dtype} of shape {shape}: "
                    "fetch it again"
                )
            )
    return agreed


def parts_of(name: str, packed: PackedTensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of the tensors that take a packed one's place, by name, in their order in a file."""
    d_out, d_in = packed.shape
    if packed.bits is None:
        mask, values = part_shapes(d_out, d_in, kept_per_row(Pattern(packed.pattern), d_in))
        return {name + MASK: (torch.uint8, mask), name + VALUES: (packed.dtype, values)}
    places, codes, scales = quantised_part_shapes(d_out, d_in, packed.bits)
    return {
        name + PLACES: (torch.uint8, places),
        name + SCALES: (torch.float16, scales),
        name + CODES: (torch.uint8, codes),
    }


def _expected(place: Path, entry: TensorEntry, manifest: Manifest) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of what a packed file holds for one tensor of the plain checkpoint."""
    packed = manifest.matrices.get(entry.name)
    if packed is None:
        return {entry.name: (entry.dtype, entry.shape)}
    if packed.dtype != entry.dtype or matrix_shape(entry.shape, packed.layout) != packed.shape:
        raise CorruptFileError(
            f"{place / PACKED} packs {entry.name!r} as {packed.dtype} of shape {packed.shape}, and its header "
            f"has {entry.dtype} of shape {entry.shape}: fetch it again"
        )
    return parts_of(entry.name, packed)


def unpack_checkpoint(directory: str | Path, out: str | Path, *, trust_remote_code: bool = False) -> dict[str, str]:
    """Restore the plain checkpoint that was packed, byte for byte, or with its rounded weights.

    Args:
        directory: of the packed checkpoint.
        out: the directory to write, absent or empty; taken back if anything fails.
        trust_remote_code: whether to accept a model that comes with Python code of its own; none of it is run.

    Returns:
        dict[str, str]: sha256, in hexadecimal, of every file written, by its name; each is what the packed
            checkpoint has on record. A card that Halve wrote loses what it says of packing.

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
    if CARD in plan and (card := plain_card(b"".join(file_chunks(place / CARD)), expected[CARD].sha256)) is not None:
        plan[CARD], expected[CARD] = [card], File(size=len(card), sha256=hashed([card]))
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
    refuse_contents(out)
    check_destination(out, source, bytes_needed)
