"""The judge: re-read a checkpoint's bytes and say whether it is what it claims to be.

Nothing is taken from memory or from the run that wrote it, and one tensor is held at a time.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint.directory import CONFIG, PACKED, RECORD, forbidden_fields, is_unfinished, read_shards
from halve.checkpoint.durable import sha256_of
from halve.checkpoint.load import Source, load_model, resolve
from halve.checkpoint.shards import TensorEntry, read_chunks, read_json, read_shard, read_tensor, tensor_bytes
from halve.errors import CorruptFileError, HalveError, InputError, PatternError
from halve.maths.pattern import Pattern


@dataclass(frozen=True)
class CheckResult:
    """What was found.

    Attributes:
        ok: whether there are no problems.
        problems: what is wrong, a sentence each.
        notes: what could not be checked, and why.
        pattern: the pattern checked for, several with commas between them; None when nothing names one.
        matrices: number of tensors on disk that are in the pattern and are meant to be.
        sparsity: share of zeros in those, 0 to 1; 0.0 when there are none.
        tensors: number of tensors on disk.
        compared: number of tensors found equal to the original's.
    """

    ok: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    pattern: str | None
    matrices: int
    sparsity: float
    tensors: int
    compared: int


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    matrices: int = 0
    zeros: int = 0
    weights: int = 0
    tensors: int = 0
    compared: int = 0


def check(
    path: str | Path,
    *,
    against: str | Path | Source | None = None,
    pattern: str | Pattern | None = None,
    trust_remote_code: bool = False,
) -> CheckResult:
    """Check a checkpoint on disk.

    Checked: the files' sha256 and the matrices' pattern as ``halve.json`` records them, that every floating-point
    tensor is finite, that shards and index agree, that ``config.json`` is a plain one; with ``against`` also that
    every tensor of the original is there, and unchanged unless it was pruned or tuned. Of a packed checkpoint: the
    sha256 of its files, that every mask keeps what the pattern keeps, that all values are finite, and that the plain
    checkpoint would be restored byte for byte.

    Args:
        path: a directory of safetensors, or a packed one.
        against: the original: anything ``halve.checkpoint.load.resolve`` takes.
        pattern: what to check for instead of the pattern recorded; needed where there is no ``halve.json``, and then
            the tensors that have it are counted, along either of their last two dimensions.

        trust_remote_code: whether a model that comes with Python code of its own is accepted; none of it is run.

    Returns:
        CheckResult: a damaged checkpoint is a result, not an exception.

    Raises:
        InputError: ``path`` is not a directory; ``against`` or ``pattern`` is not usable, as with a packed checkpoint.
        HalveError: as ``halve.checkpoint.load.resolve``, about ``against``.
    """
    directory = _finished_directory(path)
    if (directory / PACKED).exists():
        return _check_packed(directory, alone=against is None and pattern is None, code=trust_remote_code)
    wanted = None if pattern is None else Pattern.parse(pattern)
    original = (
        against
        if isinstance(against, Source) or against is None
        else resolve(against, trust_remote_code=trust_remote_code)
    )
    found = _Findings()
    _check_config(directory, found, code=trust_remote_code)
    record = _read_record(directory, found)
    if wanted is None and record is not None:
        wanted = record.pattern
    try:
        shards = read_shards(directory)
    except HalveError as error:
        found.problems.append(str(error))
    else:
        entries = {entry.name: entry for shard in shards for entry in shard.tensors}
        found.tensors = len(entries)
        if record is not None:
            _check_files(directory, record, {shard.path.name for shard in shards}, found)
        changed = _check_tensors(entries, record, wanted, found) | set(() if record is None else record.tuned)
        if original is not None and original.kind == "gguf":
            _compare_dequantised(entries, original, changed, found)
        elif original is not None:
            _compare(entries, original, changed, found)
    return CheckResult(
        ok=not found.problems,
        problems=tuple(found.problems),
        notes=tuple(found.notes),
        pattern=None if wanted is None else wanted.text,
        matrices=found.matrices,
        sparsity=found.zeros / found.weights if found.weights else 0.0,
        tensors=found.tensors,
        compared=found.compared,
    )


def _finished_directory(path: str | Path) -> Path:
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise InputError(f"{path} is not a directory: give the directory of a checkpoint")
    if is_unfinished(directory):
        raise InputError(f"{path} holds an unfinished run: complete it with `halve resume {path}`")
    return directory


def _check_packed(directory: Path, *, alone: bool, code: bool) -> CheckResult:
    from halve.packed.read import open_packed, verify

    if not alone:
        raise InputError(
            f"{directory} is packed, and can be checked only by itself: restore the plain checkpoint with "
            f"`halve unpack {directory} --out DIR`, and check that"
        )
    try:
        checkpoint = open_packed(directory, trust_remote_code=code)
    except HalveError as error:
        return CheckResult(False, (str(error),), (), None, 0, 0.0, 0, 0)
    found = verify(checkpoint)
    matrices = checkpoint.manifest.matrices
    return CheckResult(
        ok=not found.problems,
        problems=tuple(found.problems),
        notes=(),
        pattern=", ".join(sorted({matrix.pattern for matrix in matrices.values()})) or None,
        matrices=len(matrices),
        sparsity=found.zeros / found.weights if found.weights else 0.0,
        tensors=sum(len(shard.tensors) for shard in checkpoint.plain),
        compared=0,
    )


@dataclass(frozen=True)
class _Record:
    """What ``halve.json`` claims: the pattern, the layout of every pruned tensor, and the sha256 of every file.

    ``tuned`` are the tensors that a reconstruction may have changed, pruned or not.
    """

    pattern: Pattern | None
    layouts: Mapping[str, str]
    tuned: Collection[str]
    files: Mapping[str, str]


def _check_config(directory: Path, found: _Findings, *, code: bool) -> None:
    try:
        config = read_json(directory / CONFIG)
    except CorruptFileError as error:
        found.problems.append(str(error))
        return
    for name in forbidden_fields(config, code=code):
        found.problems.append(f"{CONFIG} has {name!r}, which a plain checkpoint does not")


def _read_record(directory: Path, found: _Findings) -> _Record | None:
    if not (directory / RECORD).exists():
        found.notes.append(
            f"there is no {RECORD}: neither the files' sha256 nor which tensors were pruned is on record"
        )
        return None
    try:
        text = read_json(directory / RECORD)
        pattern = None if text.get("pattern") is None else Pattern(text["pattern"])
    except (CorruptFileError, PatternError) as error:
        found.problems.append(f"{RECORD} is not usable: {error}")
        return None
    files = text.get("files")
    if not isinstance(files, dict) or not files:
        found.problems.append(f"{RECORD} does not record the sha256 of the files")
        files = {}
    layouts = _recorded_layouts(text.get("matrices"), found)
    if pattern is None and layouts:
        found.problems.append(f"{RECORD} records pruned matrices and no pattern")
    return _Record(pattern, layouts, _recorded_tuning(text.get("blocks", []), found), files)


def _recorded_tuning(blocks: Any, found: _Findings) -> set[str]:
    tuned: set[str] = set()
    for block in blocks if isinstance(blocks, list) else [blocks]:
        match block:
            case {"tensors": [*names]} if all(isinstance(name, str) for name in names):
                tuned |= set(names)
            case _:
                found.problems.append(f"{RECORD} has a malformed entry under 'blocks': {str(block)[:80]}")
    return tuned


def _recorded_layouts(matrices: Any, found: _Findings) -> dict[str, str]:
    layouts: dict[str, str] = {}
    for matrix in matrices if isinstance(matrices, list) else [matrices]:
        match matrix:
            case {"status": "failed"}:
                pass  # reported as left dense
            case {"tensors": [*names], **rest} if all(isinstance(name, str) for name in names) and (
                rest.get("layout", "out_in") in {"out_in", "in_out"}
            ):
                layouts |= dict.fromkeys(names, rest.get("layout", "out_in"))
            case _:
                found.problems.append(f"{RECORD} has a malformed entry under 'matrices': {str(matrix)[:80]}")
    return layouts


def _check_files(directory: Path, record: _Record, shards: set[str], found: _Findings) -> None:
    if record.files:
        found.problems += [
            f"{name} is not among the files recorded in {RECORD}"
            for name in sorted({*shards, CONFIG} - record.files.keys())
        ]
    for name, expected in record.files.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            found.problems.append(f"{RECORD} records the file {name!r}, which is outside the directory")
        elif not path.is_file():
            found.problems.append(f"{name} is recorded in {RECORD} and is missing")
        elif sha256_of(path) != expected:
            found.problems.append(f"{name} does not have the sha256 recorded when it was written: it has been changed")


def _check_tensors(
    entries: Mapping[str, TensorEntry], record: _Record | None, pattern: Pattern | None, found: _Findings
) -> set[str]:
    """Judge every tensor by itself, and return the names of those that count as pruned."""
    layouts = {} if record is None else record.layouts
    found.problems += [
        f"tensor {name!r} is recorded as pruned and is missing" for name in sorted(layouts.keys() - entries.keys())
    ]
    pruned = set(layouts)
    for name, entry in entries.items():
        tensor = read_tensor(entry)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            found.problems.append(f"tensor {name!r} holds NaN or infinity")
        if pattern is None:
            continue
        if name in layouts:
            problem = _violation(tensor, pattern, layouts[name])
            if problem:
                found.problems.append(f"tensor {name!r} is not {pattern}: {problem}")
                continue
        elif record is None and _has_pattern(tensor, pattern):
            pruned.add(name)
        else:
            continue
        found.matrices += 1
        found.zeros += int((tensor == 0).sum())
        found.weights += tensor.numel()
    if pattern is not None and record is None and not pruned:
        found.problems.append(f"no tensor has the pattern {pattern}")
    return pruned


def _violation(tensor: Tensor, pattern: Pattern, layout: str) -> str:
    """Say how a tensor breaks the pattern; empty when it does not."""
    if tensor.ndim < 2:
        return f"it has shape {tuple(tensor.shape)}, which is no matrix"
    try:
        bad = pattern.violating_groups(tensor if layout == "out_in" else tensor.transpose(-1, -2))
    except PatternError as error:
        return str(error)
    return f"{int(bad.sum())} of {bad.numel()} groups have too many non-zeros" if bool(bad.any()) else ""


def _has_pattern(tensor: Tensor, pattern: Pattern) -> bool:
    return (
        tensor.ndim >= 2
        and tensor.is_floating_point()
        and bool((tensor != 0).any())
        and any(not _violation(tensor, pattern, layout) for layout in ("out_in", "in_out"))
    )


def _compare(entries: Mapping[str, TensorEntry], original: Source, changed: set[str], found: _Findings) -> None:
    """Compare with a safetensors original, byte by byte."""
    theirs = {entry.name: entry for path in original.shards for entry in read_shard(path).tensors}
    _compare_names(entries, theirs.keys(), found)
    for name, other in theirs.items():
        entry = entries.get(name)
        if entry is None:
            continue
        if (entry.dtype, entry.shape) != (other.dtype, other.shape):
            found.problems.append(
                f"tensor {name!r} is {entry.dtype} {entry.shape}, and {other.dtype} {other.shape} in the original"
            )
        elif all(ours == original for ours, original in zip(read_chunks(entry), read_chunks(other), strict=True)):
            found.compared += 1
        elif name not in changed:
            found.problems.append(f"tensor {name!r} was neither pruned nor tuned and differs from the original")


def _compare_dequantised(
    entries: Mapping[str, TensorEntry], original: Source, changed: set[str], found: _Findings
) -> None:
    """Compare with what a GGUF original dequantises to."""
    found.notes.append(
        f"{original.name} is a GGUF file, whose quantised bytes have no counterpart here: tensors were compared with "
        "its dequantised values, rounded to the dtype written; config and tokenizer were not compared"
    )
    layout = load_model(original).layout
    _compare_names(entries, layout.tensors.keys(), found)
    for parameters in layout.everything():
        for name, tensor in layout.convert(parameters[:1]):
            entry = entries.get(name)
            if entry is None:
                continue
            if entry.shape != tuple(tensor.shape):
                found.problems.append(
                    f"tensor {name!r} has shape {entry.shape}, and {tuple(tensor.shape)} in the original"
                )
            elif tensor_bytes(read_tensor(entry)) == tensor_bytes(tensor.to(entry.dtype)):
                found.compared += 1
            elif name not in changed:
                found.problems.append(f"tensor {name!r} was neither pruned nor tuned and differs from the original")


def _compare_names(entries: Mapping[str, TensorEntry], theirs: Collection[str], found: _Findings) -> None:
    found.problems += [f"tensor {name!r} of the original is missing" for name in sorted(set(theirs) - entries.keys())]
    found.problems += [f"tensor {name!r} is not in the original" for name in sorted(entries.keys() - set(theirs))]
