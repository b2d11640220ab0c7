"""Packing a plain checkpoint: which of its matrices, and the files of the packed one.

Nothing is selected or changed: what is packed has the pattern already, and every matrix is unpacked again and compared
before it is written, every weight file restored and compared before the manifest is.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from halve.checkpoint.directory import INDEX, PACKED, PACKED_WEIGHTS, RECORD, contained, refuse_unfinished
from halve.checkpoint.disk_layout import DiskLayout, DiskTensor
from halve.checkpoint.durable import file_chunks, filling, hashed, sha256_of
from halve.checkpoint.load import Source, resolve, skeleton
from halve.checkpoint.room import check_space
from halve.checkpoint.shards import (
    Shard,
    TensorEntry,
    build_header,
    read_chunks,
    read_shard,
    read_tensor,
    reading,
    tensor_bytes,
)
from halve.checkpoint.validated import wrong
from halve.checkpoint.weight_files import refuse_copies
from halve.errors import CorruptFileError, InputError
from halve.maths.pattern import Pattern
from halve.model.layers import Layout, is_conv1d, is_fused, is_linear
from halve.model.stacks import find_stacks
from halve.packed.manifest import File, Manifest, PackedTensor, PlainShard
from halve.packed.read import (
    MASK,
    VALUES,
    PackedCheckpoint,
    as_matrix,
    carried_files,
    check_new,
    matrix_shape,
    parts_of,
)
from halve.recorded import REMEDY, Record, change_of, pattern_of, read_record
from halve.runtime.native import expand
from halve.runtime.packed_matrix import DTYPES, PackedMatrix, pack

_DENSER = "it is not in the pattern"
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What was packed, and what it takes.

    Attributes:
        out: the directory written.
        matrices: names of the packed tensors.
        left_dense: names of tensors that could have been packed, and why they were not.
        left_out: names in the source directory that belong to no model and were not taken along.
        matrix_bytes_before: of the packed tensors, before.
        matrix_bytes_after: after.
        bytes_before: of all weight files, before.
        bytes_after: after.
    """

    out: Path
    matrices: tuple[str, ...] = field(repr=False)
    left_dense: Mapping[str, str] = field(repr=False)
    left_out: tuple[str, ...]
    matrix_bytes_before: int
    matrix_bytes_after: int
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Size of the weight files after packing, as a share of what it was."""
        return self.bytes_after / self.bytes_before


def pack_checkpoint(
    directory: str | Path,
    out: str | Path,
    pattern: str | Pattern | None = None,
    *,
    trust_remote_code: bool = False,
) -> PackResult:
    """Pack the pruned matrices of a checkpoint; everything else is taken along as it is.

    Args:
        directory: of a plain checkpoint.
        out: the directory to write, absent or empty; taken back if anything fails.
        pattern: that the matrices have, where no ``halve.json`` says which were pruned, and to what. Then the weights
            of all linear layers in the model's blocks that have it are packed.
        trust_remote_code: whether to accept a model that comes with Python code of its own.

    Raises:
        InputError: no matrix to pack; a matrix that was pruned is not in the pattern; ``pattern`` is missing, or is not
            that of ``halve.json``; ``out`` is in use or overlaps the input, or its volume is too full.
        UnsupportedModelError: as `halve.checkpoint.load.resolve`.
        CorruptFileError: as `halve.checkpoint.load.resolve`; ``halve.json`` is damaged, or has another sha256 of
            a file; the input changes meanwhile.
        HalveError: the volume is full, or failed.
    """
    place, target = Path(directory).expanduser(), Path(out).expanduser()
    if not place.is_dir():
        raise InputError(f"{directory} is not a directory: give the directory of a pruned checkpoint")
    refuse_unfinished(place)
    source = resolve(place, trust_remote_code=trust_remote_code)
    refuse_copies(source.path, source.copies)
    _refuse_names(source)
    check_new(target, source, 0)
    shards = tuple(read_shard(path) for path in source.shards)
    entries = {entry.name: entry for shard in shards for entry in shard.tensors}
    record = read_record(source.path, Record) if (source.path / RECORD).exists() else None
    weights = {path.name for path in (*source.shards, *source.carried)}
    if record is not None:
        _refuse_changed(record, source.path, (record.files or {}).keys() - weights)
    wanted = None if pattern is None else Pattern.parse(pattern)
    chosen, left = _choose(_asked(source, record, entries, wanted), entries)
    if record is not None:  # the large files last: a matrix that is not in the pattern says more
        _refuse_changed(record, source.path, weights)
    if not chosen:
        reasons = ", ".join(sorted(set(left.values()))) or "the model has no linear layers in its blocks"
        raise InputError(f"nothing to pack in {directory}: {reasons}")
    headers = [build_header(_parts(shard, chosen)) for shard in shards]
    sizes = [len(header) + _size(_parts(shard, chosen)) for header, shard in zip(headers, shards, strict=True)]
    carried = carried_files(source.path, code=trust_remote_code) | {path.name: path for path in source.carried}
    check_space(target, sum(sizes) + sum(path.stat().st_size for path in carried.values()))
    _write(target, source, shards, headers, carried, chosen, left)
    packed = [entry for shard in shards for entry in shard.tensors if entry.name in chosen]
    return PackResult(
        out=target,
        matrices=tuple(entry.name for entry in packed),
        left_dense=left,
        left_out=_left_out(source.path, shards, carried),
        matrix_bytes_before=sum(entry.end - entry.start for entry in packed),
        matrix_bytes_after=sum(_size(_parts_of(entry, chosen)) for entry in packed),
        bytes_before=source.size,
        bytes_after=sum(sizes) + sum(path.stat().st_size for path in source.carried),
    )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What to pack.

    Attributes:
        pattern: of all of it.
        layouts: the layouts to try, for each tensor by name.
        left: tensors that are left dense whatever they hold, and why.
        recorded: whether ``halve.json`` says that they are in the pattern, so that it is an error if one is not.
    """

    pattern: Pattern
    layouts: Mapping[str, tuple[Layout, ...]]
    left: Mapping[str, str]
    recorded: bool


def _asked(
    source: Source, record: Record | None, entries: Mapping[str, TensorEntry], pattern: Pattern | None
) -> _Asked:
    if record is not None:
        return _recorded(record, source.path, entries, pattern)
    if pattern is None:
        raise InputError(f"{source.name} has no {RECORD}: give the pattern of its matrices (--pattern 2:4)")
    return _Asked(pattern=pattern, layouts=_linear_tensors(source, entries), left={}, recorded=False)


def _recorded(record: Record, directory: Path, entries: Mapping[str, TensorEntry], pattern: Pattern | None) -> _Asked:
    """Return what ``halve.json`` lists."""
    path = directory / RECORD
    recorded = pattern_of(record, directory)
    if recorded is None:
        raise wrong(path, "it does not say what was pruned, and to what", REMEDY)
    if pattern is not None and pattern != recorded:
        raise InputError(f"{path} says that the matrices are {recorded}, not {pattern}: leave the pattern out")
    if missing := sorted({*record.layouts, *record.failed} - entries.keys()):
        raise InputError(f"{path} lists tensor {missing[0]!r} as pruned, and it is missing: prune the model again")
    layouts = {name: (layout,) for name, layout in record.layouts.items()}
    return _Asked(
        pattern=recorded, layouts=layouts, left=dict.fromkeys(record.failed, "pruning it failed"), recorded=True
    )


def _refuse_changed(record: Record, directory: Path, names: Collection[str]) -> None:
    """Refuse files that are not those that ``halve.json`` records: what is packed would not be what was pruned.

    Args:
        record: what it says.
        directory: that it is in.
        names: of the files to look at, of those on record.
    """
    for name in sorted((record.files or {}).keys() & names):
        if change := change_of(directory, name, (record.files or {})[name]):
            raise CorruptFileError(
                f"{directory}: {change}; restore it, or, if the change is meant, remove {RECORD} and give the pattern "
                "(--pattern)"
            )


def _refuse_names(source: Source) -> None:
    """Refuse files to be carried along whose names are those of packed files."""
    for path in source.carried:
        if path.match(PACKED_WEIGHTS):
            raise InputError(f"{path} has a name that packed weights have: rename it, and its entries in {INDEX}")


def _linear_tensors(source: Source, entries: Mapping[str, TensorEntry]) -> dict[str, tuple[Layout, ...]]:
    """Return the tensors on disk that hold weights of linear layers in the blocks, and the layouts they may have."""
    model = skeleton(source)
    disk = DiskLayout(model, [DiskTensor(entry.name, entry.dtype, entry.shape) for entry in entries.values()])
    found: dict[str, tuple[Layout, ...]] = {}
    inside = (pair for stack in find_stacks(model) for pair in stack.blocks.named_modules(prefix=stack.name))
    for path, module in inside:
        for leaf, parameter in module.named_parameters(recurse=False):
            plain = is_linear(module) and leaf == "weight"
            if not plain and not is_fused(module, parameter):
                continue
            location = disk.locate(f"{path}.{leaf}")
            swapped = is_conv1d(module) != location.transposed
            layouts: tuple[Layout, ...] = ("in_out",) if swapped else ("out_in",)
            found |= dict.fromkeys(location.tensors, layouts if plain else ("out_in", "in_out"))
    return found


def _choose(asked: _Asked, entries: Mapping[str, TensorEntry]) -> tuple[dict[str, PackedTensor], dict[str, str]]:
    """Return how each tensor is packed that can be with all its bits, and why the others cannot."""
    chosen, left = {}, dict(asked.left)
    for name, layouts in asked.layouts.items():
        entry = entries[name]
        if entry.dtype not in DTYPES:
            left[name] = f"{str(entry.dtype).removeprefix('torch.')} is not packed"
            continue
        reasons = {layout: _reason(entry, asked.pattern, layout, entries) for layout in layouts}
        packable = next((layout for layout, reason in reasons.items() if not reason), None)
        if packable is not None:
            shape = matrix_shape(entry.shape, packable)
            chosen[name] = PackedTensor(pattern=asked.pattern.text, shape=shape, dtype=entry.dtype, layout=packable)
            continue
        left[name] = next((reason for reason in reasons.values() if reason != _DENSER), _DENSER)
        if asked.recorded and left[name] == _DENSER:
            raise InputError(
                f"tensor {name!r} is not in pattern {asked.pattern}, though {RECORD} lists it: the checkpoint was "
                "changed after pruning, prune it again"
            )
    return chosen, left


def _reason(entry: TensorEntry, pattern: Pattern, layout: Layout, entries: Mapping[str, TensorEntry]) -> str:
    """Say why a tensor cannot be packed; empty if it can."""
    d_out, d_in = matrix_shape(entry.shape, layout)
    if not d_out or not pattern.fits(d_in):
        return _DENSER
    if {entry.name + MASK, entry.name + VALUES} & entries.keys():
        return "the checkpoint has a tensor of the name that a part of it would have"
    weight = as_matrix(read_tensor(entry), layout).contiguous()
    if pattern.satisfied_by(weight.view(_BITS[entry.dtype.itemsize])):  # what has a bit set is what packing keeps
        return ""
    if pattern.satisfied_by(weight):
        return (
            "it has a -0.0 beyond the places of its group, which packing would not keep: make zeros +0.0, weight += 0.0"
        )
    return _DENSER


def _parts_of(entry: TensorEntry, chosen: Mapping[str, PackedTensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Return name, dtype and shape of what one tensor becomes."""
    packed = chosen.get(entry.name)
    if packed is None:
        return [(entry.name, entry.dtype, entry.shape)]
    return [(name, dtype, shape) for name, (dtype, shape) in parts_of(entry.name, packed).items()]


def _parts(shard: Shard, chosen: Mapping[str, PackedTensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [part for entry in _ordered(shard) for part in _parts_of(entry, chosen)]


def _ordered(shard: Shard) -> list[TensorEntry]:
    """Return the tensors in the order of the packed file: wide elements first, so that all are aligned.

    A mask is a multiple of 8 bytes long.
    """
    return sorted(shard.tensors, key=lambda entry: -entry.dtype.itemsize)


def _size(parts: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in parts)


def _write(
    out: Path,
    source: Source,
    shards: tuple[Shard, ...],
    headers: list[bytes],
    carried: Mapping[str, Path],
    chosen: Mapping[str, PackedTensor],
    left: Mapping[str, str],
) -> None:
    """Write the directory, restore the weight files from it in memory, and write the manifest if all is well."""
    count = len(shards)
    names = [f"packed-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["packed.safetensors"]
    index = None if source.index is None else b"".join(file_chunks(contained(source.path, source.index)))
    with filling(out) as write:
        sums = {}
        for name, header, shard in zip(names, headers, shards, strict=True):
            sums[name] = write(name, _packed_bytes(header, shard, chosen), "packed")
        for name, path in carried.items():
            sums[name] = write(name, file_chunks(path), "companion")
        plain = tuple(
            PlainShard(name=shard.path.name, packed=name, header=shard.header[8:], file=_as_file(shard.path))
            for name, shard in zip(names, shards, strict=True)
        )
        files = {name: File(size=(out / name).stat().st_size, sha256=sha256) for name, sha256 in sums.items()}
        manifest = Manifest(
            matrices=chosen,
            left_dense=left,
            shards=plain,
            index=index,
            index_sha256="" if index is None else hashed([index]),
            files=files,
        )
        entries = {entry.name: entry for name in names for entry in read_shard(out / name).tensors}
        written = PackedCheckpoint(out, manifest, shards, entries)
        for shard, expected in zip(shards, plain, strict=True):
            if hashed(written.plain_bytes(shard)) != expected.file.sha256:
                raise CorruptFileError(f"{shard.path} has been changed while it was packed: pack it again")
        write(PACKED, [manifest.to_bytes()], "packed-manifest")


def _as_file(path: Path) -> File:
    with reading(path):
        return File(size=path.stat().st_size, sha256=sha256_of(path))


def _packed_bytes(header: bytes, shard: Shard, chosen: Mapping[str, PackedTensor]) -> Iterator[bytes | memoryview]:
    yield header
    for entry in _ordered(shard):
        if entry.name not in chosen:
            yield from read_chunks(entry)
            continue
        packed = _packed(entry, chosen[entry.name])
        yield tensor_bytes(packed.mask)
        yield tensor_bytes(packed.values)


def _packed(entry: TensorEntry, how: PackedTensor) -> PackedMatrix:
    """Pack one tensor, and compare what unpacking it gives."""
    matrix = as_matrix(read_tensor(entry), how.layout).contiguous()
    packed = pack(matrix, how.pattern)
    if not _same_bits(expand(packed, 0, packed.d_out), matrix):
        raise CorruptFileError(f"tensor {entry.name!r} in {entry.path} has been changed while it was packed")
    return packed


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = _BITS[one.dtype.itemsize]
    return torch.equal(one.view(bits), other.view(bits))


def _left_out(directory: Path, shards: Iterable[Shard], carried: Iterable[str]) -> tuple[str, ...]:
    taken = {INDEX, *(shard.path.name for shard in shards), *(Path(name).parts[0] for name in carried)}
    return tuple(sorted({path.name for path in directory.iterdir()} - taken))
