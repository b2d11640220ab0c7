"""Packing a plain checkpoint: the files of the packed one.

Nothing is selected or changed, unless weights are to be quantised: what is packed has the pattern already, and every
matrix is unpacked again and compared before it is written, every weight file restored and compared before the manifest
is. Where weights are quantised, what can be restored is the checkpoint with their rounded weights, and the record that
goes along is that one's.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from halve.checkpoint.directory import (
    CARD,
    INDEX,
    MEASURED,
    PACKED,
    PACKED_WEIGHTS,
    PAGE,
    RECORD,
    contained,
    is_sealed,
    packed_card,
    refuse_unfinished,
)
from halve.checkpoint.durable import Content, file_chunks, filling, hashed, sha256_of
from halve.checkpoint.load import Source, resolve
from halve.checkpoint.room import check_space
from halve.checkpoint.shards import (
    Shard,
    TensorEntry,
    build_header,
    read_chunks,
    read_json,
    read_shard,
    read_tensor,
    reading,
    tensor_bytes,
)
from halve.checkpoint.weight_files import refuse_copies
from halve.errors import CorruptFileError, InputError
from halve.maths.linalg import in_parts
from halve.maths.pattern import Pattern
from halve.packed.choosing import BITS, asked_for, choose
from halve.packed.manifest import File, Manifest, PackedTensor, PlainShard
from halve.packed.read import (
    PackedCheckpoint,
    as_matrix,
    carried_files,
    check_new,
    parts_of,
)
from halve.recorded import Record, change_of, read_record
from halve.runtime.native import AnyPacked, expand
from halve.runtime.packed_matrix import pack
from halve.runtime.quantised_matrix import QuantisedMatrix, Values, bits_of, check_values, quantise

Listen = Callable[[int, int, str], None]
_ABOUT_WEIGHTS = {RECORD, MEASURED, PAGE, CARD}
"""What tells of the weights: changed, or left out, where they are rounded."""


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
        error: how far quantising has moved the kept weights: the root of the sum of the squared changes over that of
            the squared weights; 0 where they are as they were.
        moved: names of the tensors whose weights it has moved: they were not on the grid of integers before.
        notes: what to know besides, sentences.
    """

    out: Path
    matrices: tuple[str, ...] = field(repr=False)
    left_dense: Mapping[str, str] = field(repr=False)
    left_out: tuple[str, ...]
    matrix_bytes_before: int
    matrix_bytes_after: int
    bytes_before: int
    bytes_after: int
    error: float = 0.0
    moved: tuple[str, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Size of the weight files after packing, as a share of what it was."""
        return self.bytes_after / self.bytes_before


def pack_checkpoint(
    directory: str | Path,
    out: str | Path,
    pattern: str | Pattern | None = None,
    *,
    values: Values = "own",
    trust_remote_code: bool = False,
    card: Callable[[], tuple[bytes | None, str]] | None = None,
    listen: Listen | None = None,
) -> PackResult:
    """Pack the pruned matrices of a checkpoint, and quantise them if asked; everything else is taken along as it is.

    Args:
        directory: of a plain checkpoint.
        out: the directory to write, absent or empty; taken back if anything fails.
        pattern: that the matrices have, where no ``halve.json`` says which were pruned, and to what. Then the weights
            of all linear layers in the model's blocks that have it are packed.
        values: ``own`` keeps the weights as they are, ``bf16`` does and refuses others. ``int8`` and ``int4`` round
            each to the nearest integer of a scale that 64 columns share, see
            `halve.runtime.quantised_matrix.quantise`.
        trust_remote_code: whether to accept a model that comes with Python code of its own.
        card: called where rounding has moved weights and the model card is as Halve wrote it; gives another card, None
            where there can be none, and what there is to say of it. None takes the card along that is there.
        listen: told after every matrix how many are packed, how many there are, and its name.

    Raises:
        InputError: no matrix to pack; a matrix that was pruned is not in the pattern; ``pattern`` is missing, or is not
            that of ``halve.json``; it cannot be quantised, or weights are too large for that; ``values`` is unknown;
            ``out`` is in use or overlaps the input, or its volume is too full.
        UnsupportedModelError: as `halve.checkpoint.load.resolve`.
        CorruptFileError: as `halve.checkpoint.load.resolve`; ``halve.json`` is damaged, or has another sha256 of
            a file; the input changes meanwhile.
        HalveError: the volume is full, or failed.
    """
    check_values(values)
    wanted = None if pattern is None else Pattern.parse(pattern)
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
    asked = asked_for(source, record, entries, wanted)
    bits = bits_of(values, asked.pattern)
    chosen, left = choose(asked, entries, bits)
    if record is not None:  # the large files last: a matrix that is not in the pattern says more
        _refuse_changed(record, source.path, weights)
    if not chosen:
        reasons = ", ".join(sorted(set(left.values()))) or "the model has no linear layers in its blocks"
        raise InputError(f"nothing to pack in {directory}: {reasons}")
    if values == "bf16":
        _refuse_others(chosen)
    headers = [build_header(_parts(shard, chosen)) for shard in shards]
    sizes = [len(header) + _size(_parts(shard, chosen)) for header, shard in zip(headers, shards, strict=True)]
    carried = carried_files(source.path, code=trust_remote_code) | {path.name: path for path in source.carried}
    check_space(target, sum(sizes) + sum(path.stat().st_size for path in carried.values()))
    moved = _Moved(len(chosen), listen)
    notes = _write(target, source, shards, headers, carried, chosen, left, moved, card)
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
        error=moved.share,
        moved=tuple(moved.names),
        notes=notes,
    )


def _refuse_others(chosen: Mapping[str, PackedTensor]) -> None:
    for name, packed in chosen.items():
        if packed.dtype != torch.bfloat16:
            raise InputError(
                f"tensor {name!r} is {str(packed.dtype).removeprefix('torch.')}, not bfloat16: leave its weights as "
                "they are (--values own)"
            )


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


def _write(
    out: Path,
    source: Source,
    shards: tuple[Shard, ...],
    headers: list[bytes],
    carried: Mapping[str, Path],
    chosen: Mapping[str, PackedTensor],
    left: Mapping[str, str],
    moved: "_Moved",
    card: Callable[[], tuple[bytes | None, str]] | None,
) -> tuple[str, ...]:
    """Write the directory, restore the weight files from it in memory, and write the manifest if all is well.

    Returns:
        tuple[str, ...]: what there is to say of the card, sentences.
    """
    notes: list[str] = []
    count = len(shards)
    names = [f"packed-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["packed.safetensors"]
    index = None if source.index is None else b"".join(file_chunks(contained(source.path, source.index)))
    with filling(out) as write:
        sums = {}
        for name, header, shard in zip(names, headers, shards, strict=True):
            sums[name] = write(name, _packed_bytes(header, shard, chosen, moved), "packed")
        for name, path in carried.items():
            if name not in _ABOUT_WEIGHTS:
                sums[name] = write(name, file_chunks(path), "companion")
        before = [_as_file(shard.path) for shard in shards]
        entries = {entry.name: entry for name in names for entry in read_shard(out / name).tensors}
        alone = Manifest(matrices=chosen, left_dense={}, shards=(), index=None, index_sha256="", files={})
        written = PackedCheckpoint(out, alone, shards, entries)
        after = [
            File(size=file.size, sha256=hashed(written.plain_bytes(shard)))
            for shard, file in zip(shards, before, strict=True)
        ]
        bits = next(iter(chosen.values())).bits
        changed = [shard for shard, old, new in zip(shards, before, after, strict=True) if old.sha256 != new.sha256]
        if changed and bits is None:
            raise CorruptFileError(f"{changed[0].path} has been changed while it was packed: pack it again")
        restored = {shard.path.name: file.sha256 for shard, file in zip(shards, after, strict=True)}
        for name in sorted(_ABOUT_WEIGHTS & carried.keys()):
            content: Content | None = file_chunks(carried[name])
            if changed and name in {MEASURED, PAGE}:
                continue
            if changed and name == RECORD:
                content = [_record_of_quantised(carried[name], restored, f"int{bits}")]
            elif name == CARD:
                content, said = _card(carried[name], card, changed=bool(changed))
                notes += filter(None, [said])
            if content is not None:
                sums[name] = write(name, content, "companion")
        manifest = Manifest(
            matrices=chosen,
            left_dense=left,
            shards=tuple(
                PlainShard(name=shard.path.name, packed=name, header=shard.header[8:], file=file)
                for name, shard, file in zip(names, shards, after, strict=True)
            ),
            index=index,
            index_sha256="" if index is None else hashed([index]),
            files={name: File(size=(out / name).stat().st_size, sha256=sha256) for name, sha256 in sums.items()},
        )
        write(PACKED, [manifest.to_bytes()], "packed-manifest")
    return tuple(notes)


def _card(
    path: Path, rounded: Callable[[], tuple[bytes | None, str]] | None, *, changed: bool
) -> tuple[Content | None, str]:
    """Return the card of the packed checkpoint, None where there can be none, and what there is to say of it."""
    if not is_sealed(path):
        more = ", nor that kept weights were rounded: what it says of scores was measured before" if changed else ""
        said = (
            f"the model card {path} goes along as it is, because it is not as Halve wrote it: it does not say that the "
            f"checkpoint is packed{more}"
        )
        return file_chunks(path), said
    content: bytes | None = b"".join(file_chunks(path))
    note = ""
    if changed and rounded is not None:
        content, note = rounded()
    return (None if content is None else [packed_card(content)]), note


def _record_of_quantised(path: Path, restored: Mapping[str, str], values: str) -> bytes:
    """Return the record of a checkpoint whose weights were rounded: the one before, which it names by its sums."""
    record = read_json(path)
    files = record.get("files") or {}
    before = {name: files[name] for name in restored if name in files}
    record["files"] = files | {name: restored[name] for name in before}
    record["quantised"] = [*record.get("quantised", []), {"values": values, "weights_before": before}]
    told = f"the kept weights were rounded to {values} after all else that stands here was measured"
    record["warnings"] = [*record.get("warnings", []), told]
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


@dataclass
class _Moved:
    """How many matrices are packed, and how far quantising has moved their weights."""

    matrices: int
    listen: Listen | None
    finished: int = 0
    changes: float = 0.0
    weights: float = 0.0
    names: list[str] = field(default_factory=list)

    def finish(self, name: str) -> None:
        """Count another matrix."""
        self.finished += 1
        if self.listen is not None:
            self.listen(self.finished, self.matrices, name)

    def note(self, name: str, matrix: Tensor, quantised: QuantisedMatrix) -> None:
        """Take another matrix in, dense and quantised."""
        start, before = 0, self.changes
        for rows in in_parts(matrix):
            exact, rounded = rows.float(), expand(quantised, start, start + len(rows)).float()
            self.weights += float(exact.square().sum(dtype=torch.float64))
            self.changes += float((rounded - exact).square_().sum(dtype=torch.float64))
            start += len(rows)
        if self.changes > before:
            self.names.append(name)

    @property
    def share(self) -> float:
        """The root of the squared changes over the squared weights."""
        return (self.changes / self.weights) ** 0.5 if self.weights else 0.0


def _as_file(path: Path) -> File:
    with reading(path):
        return File(size=path.stat().st_size, sha256=sha256_of(path))


def _packed_bytes(
    header: bytes, shard: Shard, chosen: Mapping[str, PackedTensor], moved: _Moved
) -> Iterator[bytes | memoryview]:
    yield header
    for entry in _ordered(shard):
        if entry.name not in chosen:
            yield from read_chunks(entry)
            continue
        packed = _packed(entry, chosen[entry.name], moved)
        if isinstance(packed, QuantisedMatrix):
            yield from map(tensor_bytes, (packed.places, packed.scales, packed.codes))
        else:
            yield from map(tensor_bytes, (packed.mask, packed.values))
        moved.finish(entry.name)


def _packed(entry: TensorEntry, how: PackedTensor, moved: _Moved) -> AnyPacked:
    """Pack one tensor, and compare what unpacking it gives; then quantise it, if that is asked for."""
    matrix = as_matrix(read_tensor(entry), how.layout).contiguous()
    packed = pack(matrix, how.pattern)
    if not _same_bits(expand(packed, 0, packed.d_out), matrix):
        raise CorruptFileError(f"tensor {entry.name!r} in {entry.path} has been changed while it was packed")
    if how.bits is None:
        return packed
    try:
        quantised = quantise(packed, how.bits)
    except InputError as error:
        raise InputError(f"tensor {entry.name!r}: {error}") from error
    moved.note(entry.name, matrix, quantised)
    return quantised


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = BITS[one.dtype.itemsize]
    return torch.equal(one.view(bits), other.view(bits))


def _left_out(directory: Path, shards: Iterable[Shard], carried: Iterable[str]) -> tuple[str, ...]:
    taken = {INDEX, *(shard.path.name for shard in shards), *(Path(name).parts[0] for name in carried)}
    return tuple(sorted({path.name for path in directory.iterdir()} - taken))
