"""The judge: re-read a checkpoint's bytes and say whether it is what it claims to be.

Nothing is taken from memory or from the run that wrote it, and one tensor is held at a time.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from halve.checkpoint.directory import (
    CONFIG,
    PACKED,
    RECORD,
    forbidden_fields,
    is_packed,
    refuse_unfinished,
)
from halve.checkpoint.load import Source, load_model, resolve
from halve.checkpoint.shards import TensorEntry, read_chunks, read_json, read_shard, read_tensor, tensor_bytes
from halve.checkpoint.validated import shown
from halve.checkpoint.weight_files import Weights, survey_weights
from halve.errors import HalveError, InputError, PatternError, counted, first_few, noting
from halve.maths.linalg import in_parts, is_finite
from halve.maths.pattern import Pattern
from halve.model.layers import Layout, inputs_last
from halve.model.plan import place_of
from halve.order.undoing import Undoing
from halve.provenance import files_sha256, source_fields
from halve.recorded import Origin, Record, change_of, orders_of, pattern_of, read_record


@dataclass(frozen=True, kw_only=True)
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

    @property
    def verdict(self) -> str:
        """What came of it, in one sentence: ``ok``, or what is wrong, the first of it where there is more."""
        if self.ok:
            return "ok"
        first = self.problems[0]
        others = len(self.problems) - 1
        return f"failed: {first}" + (f" (and {counted(others, 'more problem')})" if others else "")


class _Record(Record, frozen=True, kw_only=True):
    """What is read of the record besides."""

    source: Origin | None = None


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    matrices: int = 0
    zeros: int = 0
    weights: int = 0
    tensors: int = 0
    compared: int = 0
    kept: list[TensorEntry] = field(default_factory=list)
    """What is in the pattern and is meant to be."""
    lost: list[TensorEntry] = field(default_factory=list)
    """Matrices that are not in the pattern and are meant to be, or may be, where there is no record."""

    def note(self, error: HalveError) -> None:
        """Take an error for a problem."""
        self.problems.append(str(error))

    def result(self, pattern: str | None) -> CheckResult:
        """Return what was found of a checkpoint that was checked for a pattern."""
        return CheckResult(
            ok=not self.problems,
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            pattern=pattern,
            matrices=self.matrices,
            sparsity=self.zeros / self.weights if self.weights else 0.0,
            tensors=self.tensors,
            compared=self.compared,
        )


def check(
    path: str | Path,
    *,
    against: str | Path | Source | None = None,
    pattern: str | Pattern | None = None,
    trust_remote_code: bool = False,
) -> CheckResult:
    """Check a checkpoint on disk.

    What is damaged or missing does not stop it: everything that can still be read is judged, and every fault told.

    Checked: the files' sha256 and the matrices' pattern as ``halve.json`` records them, that every floating-point
    tensor is finite, that shards and index agree, that ``config.json`` is a plain one; with ``against`` also that
    every tensor of the original is there, and unchanged unless it was pruned or tuned, channels that were reordered
    (``halve.json``) being put back first, unless the original has them in the same order. Tensors in files that
    transformers does not load are only compared. Of a packed checkpoint: the
    sha256 of its files, that every mask keeps what the pattern keeps, that all values are finite, and that the plain
    checkpoint would be restored byte for byte.

    Args:
        path: a directory of safetensors, or a packed one.
        against: the original: anything ``halve.checkpoint.load.resolve`` takes.
        pattern: what to check for instead of the pattern recorded; needed where there is no ``halve.json``, and then
            the tensors that have it are counted, along either of their last two dimensions, or the input channels of a
            convolution.
        trust_remote_code: whether a model that comes with Python code of its own is accepted; none of it is run.

    Returns:
        CheckResult: a damaged checkpoint is a result, not an exception.

    Raises:
        InputError: ``path`` is not a directory; there is neither a record nor ``pattern``; ``against`` or ``pattern``
            is not usable, as with a packed checkpoint.
        HalveError: as ``halve.checkpoint.load.resolve``, about ``against``.
    """
    directory = _finished_directory(path)
    if is_packed(directory):
        _refuse_beside_packed(directory, against=against is not None, pattern=pattern is not None)
        return _check_packed(directory, code=trust_remote_code)
    wanted = None if pattern is None else Pattern.parse(pattern)
    if wanted is None and not (directory / RECORD).exists():
        raise InputError(f"{directory} has no {RECORD}: give the pattern of its matrices (--pattern 2:4)")
    original = (
        against
        if isinstance(against, Source) or against is None
        else resolve(against, trust_remote_code=trust_remote_code)
    )
    found = _Findings()
    weights = survey_weights(directory)
    entries = {entry.name: entry for shard in weights.shards for entry in shard.tensors}
    told = {*weights.unsound, *([] if _check_config(directory, found, code=trust_remote_code) else [CONFIG])}
    record = _read_record(directory, found)
    if wanted is None and record is not None:
        with noting(found.note):
            wanted = pattern_of(record, directory)
            if wanted is None and record.layouts:
                found.problems.append(f"{RECORD} records pruned matrices and no pattern")
    found.problems += map(str, weights.faults)
    found.tensors = len(entries) + sum(len(shard.tensors) for shard in weights.carried)
    if record is not None:
        _check_files(directory, record, weights.names | {path.name for path in weights.copies}, told, found)
    tensors = _Tensors(entries, weights)
    changed = _check_tensors(tensors, record, wanted, found) | (set() if record is None else record.tuned)
    if wanted is not None:
        found.notes += _what_was_lost(found, wanted, recorded=record is not None)
    if original is not None:
        undoing = Undoing(())
        with noting(found.note):
            undoing = Undoing(() if record is None else orders_of(record, directory))
        comparing = _compare_dequantised if original.kind == "gguf" else _compare
        so_far = len(found.problems)
        comparing(tensors, original, changed, undoing, found)
        found.problems += filter(None, [undoing.problem])
        if len(found.problems) > so_far and record is not None and (why := _other_order(record, original)):
            found.problems.insert(so_far, why)
    return found.result(None if wanted is None else wanted.text)


def _finished_directory(path: str | Path) -> Path:
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise InputError(f"{path} is not a directory: give the directory of a checkpoint")
    refuse_unfinished(directory)
    return directory


def _refuse_beside_packed(directory: Path, *, against: bool, pattern: bool) -> None:
    """Refuse what a packed checkpoint is not checked for."""
    if pattern:
        raise InputError(
            f"{directory} is packed, and each matrix is checked for the pattern that {PACKED} names: leave that "
            "out (--pattern)"
        )
    if against:
        raise InputError(
            f"{directory} is packed, and is not compared with an original: leave that out (--against), or restore the "
            f"plain checkpoint with `halve unpack {directory} --out DIR`, and check that"
        )


def _check_packed(directory: Path, *, code: bool) -> CheckResult:
    from halve.packed.read import survey_packed
    from halve.packed.verify import restoring_problems, verify

    checkpoint, faults = survey_packed(directory, trust_remote_code=code)
    found = _Findings(problems=[str(fault) for fault in faults])
    if checkpoint is None:
        return found.result(None)
    verified = verify(checkpoint)
    found.problems += verified.problems
    if not found.problems:  # else it does not come out, and the reason has been told
        with noting(found.note):
            found.problems += restoring_problems(checkpoint)
    matrices = checkpoint.manifest.matrices
    found.matrices, found.zeros, found.weights = len(matrices), verified.zeros, verified.weights
    found.tensors = sum(len(shard.tensors) for shard in checkpoint.plain)
    return found.result(", ".join(sorted({matrix.pattern for matrix in matrices.values()})) or None)


def _check_config(directory: Path, found: _Findings, *, code: bool) -> bool:
    """Return whether the config can be read."""
    with noting(found.note):
        for name in forbidden_fields(read_json(directory / CONFIG), code=code):
            found.problems.append(f"{CONFIG} has {name!r}, which a plain checkpoint does not")
        return True
    return False


def _read_record(directory: Path, found: _Findings) -> _Record | None:
    if not (directory / RECORD).exists():
        found.notes.append(
            f"there is no {RECORD}: neither the files' sha256 nor which tensors were pruned is on record"
        )
        return None
    with noting(found.note):
        record = read_record(directory, _Record)
        if not record.files:
            found.problems.append(f"{RECORD} does not record the sha256 of the files")
        return record
    return None


def _check_files(directory: Path, record: Record, shards: set[str], told: set[str], found: _Findings) -> None:
    """Compare the files with the sums on record, but for those of which something worse has been told."""
    files = record.files or {}
    if files:
        found.problems += [
            f"{name} is not among the files recorded in {RECORD}" for name in sorted({*shards, CONFIG} - files.keys())
        ]
    for name in sorted(files.keys() - told):
        with noting(found.note):
            if change := change_of(directory, name, files[name]):
                found.problems.append(change)


@dataclass
class _Tensors:
    """The tensors on disk.

    Attributes:
        entries: those of readable files, by name.
        weights: the files, readable or not.
        unread: names of tensors that could not be read after all.
    """

    entries: Mapping[str, TensorEntry]
    weights: Weights
    unread: set[str] = field(default_factory=set)

    def missing(self, names: Collection[str]) -> list[str]:
        """Return which of these tensors are not there, but for those whose absence has been explained."""
        return sorted(name for name in set(names) - self.entries.keys() if not self.weights.told(name))


def _check_tensors(tensors: _Tensors, record: Record | None, pattern: Pattern | None, found: _Findings) -> set[str]:
    """Judge every tensor by itself, and return the names of those that count as pruned."""
    layouts = {} if record is None else record.layouts
    found.problems += [f"tensor {name!r} is recorded as pruned and is missing" for name in tensors.missing(layouts)]
    pruned = set(layouts)
    for name, entry in tensors.entries.items():
        tensors.unread.add(name)
        with noting(found.note):
            tensor = read_tensor(entry)
            tensors.unread.remove(name)
            if _check_tensor(entry, tensor, layouts, pattern, found, recorded=record is not None):
                pruned.add(name)
    if pattern is not None and record is None and not pruned:
        found.problems.append(f"no tensor has the pattern {pattern}: {_CAUSE}")
    return pruned


_CAUSE = (
    "the likely cause is an adapter that was merged into pruned matrices, or training without their masks, which fill "
    "zeros; `halve merge ADAPTER --into PRUNED --out DIR` merges one and keeps them"
)


def _what_was_lost(found: _Findings, pattern: Pattern, *, recorded: bool) -> list[str]:
    """Say, in one sentence or none, which kinds of matrices have lost the pattern, and of what that comes.

    Without a record, those are suspected that stand in blocks and have the shape of others that are in the pattern.
    """
    shapes = {entry.shape for entry in found.kept}
    places = {entry.name: place_of(entry.name) for entry in found.lost}
    lost = [entry for entry in found.lost if recorded or (entry.shape in shapes and places[entry.name][0] is not None)]
    if not lost:
        return []
    kinds = first_few(sorted({places[entry.name][1] for entry in lost}), few=8)
    if recorded:
        return [f"{len(lost)} of {len(lost) + len(found.kept)} pruned matrices have lost {pattern} ({kinds}): {_CAUSE}"]
    like = f"{counted(len(lost), 'matrix is', 'matrices are')} not {pattern} ({kinds})"
    return [f"{like}, and others of that shape in blocks are: if it was, {_CAUSE}"]


def _check_tensor(
    entry: TensorEntry,
    tensor: Tensor,
    layouts: Mapping[str, Layout],
    pattern: Pattern | None,
    found: _Findings,
    *,
    recorded: bool,
) -> bool:
    """Judge one tensor, and return whether it is in the pattern and is meant to be."""
    name = entry.name
    if tensor.is_floating_point() and not is_finite(tensor):
        found.problems.append(f"tensor {name!r} holds NaN or infinity")
    if pattern is None:
        return False
    if name in layouts:
        if problem := _violation(tensor, pattern, layouts[name]):
            found.problems.append(f"tensor {name!r} is not {pattern}: {problem}")
            found.lost.append(entry)
            return False
    elif recorded or not _has_pattern(tensor, pattern):
        if not recorded and tensor.ndim >= 2 and tensor.is_floating_point():
            found.lost.append(entry)
        return False
    found.kept.append(entry)
    found.matrices += 1
    found.zeros += sum(int((part == 0).sum()) for part in in_parts(tensor))
    found.weights += tensor.numel()
    return True


def _violation(tensor: Tensor, pattern: Pattern, layout: Layout) -> str:
    """Say how a tensor breaks the pattern; empty when it does not."""
    if tensor.ndim < 2 or (layout == "conv" and tensor.ndim != _CONVOLUTION):
        return f"it has shape {tuple(tensor.shape)}, which is no matrix" + " of a convolution" * (layout == "conv")
    try:
        bad = [pattern.violating_groups(part) for part in in_parts(inputs_last(tensor, layout))]
    except PatternError as error:
        return str(error)
    count = sum(int(part.sum()) for part in bad)
    return f"{count} of {sum(part.numel() for part in bad)} groups have too many non-zeros" if count else ""


_CONVOLUTION = 4
"""Dimensions of a convolution's weights."""


def _has_pattern(tensor: Tensor, pattern: Pattern) -> bool:
    layouts: tuple[Layout, ...] = ("conv",) if tensor.ndim == _CONVOLUTION else ("out_in", "in_out")
    return (
        tensor.ndim >= 2
        and tensor.is_floating_point()
        and any(bool((part != 0).any()) for part in in_parts(tensor))
        and any(not _violation(tensor, pattern, layout) for layout in layouts)
    )


def _compare(tensors: _Tensors, original: Source, changed: set[str], undoing: Undoing, found: _Findings) -> None:
    """Compare with a safetensors original, byte by byte."""
    theirs = {entry.name: entry for path in original.shards for entry in read_shard(path).tensors}
    _compare_names(tensors, theirs.keys(), found)
    for name, other in theirs.items():
        entry = tensors.entries.get(name)
        if entry is not None and name not in tensors.unread:
            _compare_tensor(entry, other, found, undoing, changed=name in changed)
    _compare_carried(tensors.weights, original, found)
    found.notes += [
        f"{path.name} of the original holds its weights a second time and was not compared" for path in original.copies
    ]


def _compare_carried(weights: Weights, original: Source, found: _Findings) -> None:
    """Compare the tensors in files that transformers does not load, each with that of its name in its file's."""
    ours = {shard.path.name: {entry.name: entry for entry in shard.tensors} for shard in weights.carried}
    theirs = {path.name: {entry.name: entry for entry in read_shard(path).tensors} for path in original.carried}
    for name in sorted((ours.keys() | theirs.keys()) - weights.unsound):
        held, wanted = ours.get(name, {}), theirs.get(name, {})
        lost, added = sorted(wanted.keys() - held.keys()), sorted(held.keys() - wanted.keys())
        found.problems += [f"tensor {tensor!r} of the original is missing, with {name}" for tensor in lost]
        found.problems += [f"tensor {tensor!r} in {name} is not in the original" for tensor in added]
        for tensor in held.keys() & wanted.keys():
            _compare_tensor(held[tensor], wanted[tensor], found, Undoing(()), changed=False)


def _compare_tensor(
    ours: TensorEntry, theirs: TensorEntry, found: _Findings, undoing: Undoing, *, changed: bool
) -> None:
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        found.problems.append(
            f"tensor {ours.name!r} is {ours.dtype} {ours.shape}, and {theirs.dtype} {theirs.shape} in the original"
        )
        return
    with noting(found.note):
        is_same = all(mine == original for mine, original in zip(read_chunks(ours), read_chunks(theirs), strict=True))
        if not changed and ours.name in undoing:
            is_same = _is_same_in_order(read_tensor(ours), read_tensor(theirs), ours.name, undoing)
        if is_same:
            found.compared += 1
        elif not changed:
            found.problems.append(f"tensor {ours.name!r} was neither pruned nor tuned and differs from the original")


def _is_same_in_order(ours: Tensor, theirs: Tensor, name: str, undoing: Undoing) -> bool:
    """Whether a tensor is the original's, with channels put back if they were reordered there, and not there too."""
    untouched = tensor_bytes(ours) == tensor_bytes(theirs)
    if name not in undoing:
        return untouched
    undone = tensor_bytes(undoing.back(name, ours)) == tensor_bytes(theirs)
    if untouched != undone:  # else no two of its channels differ
        (undoing.undone if undone else undoing.untouched).append(name)
    return untouched or undone


def _compare_dequantised(
    tensors: _Tensors, original: Source, changed: set[str], undoing: Undoing, found: _Findings
) -> None:
    """Compare with what a GGUF original dequantises to."""
    found.notes.append(
        f"{original.name} is a GGUF file, whose quantised bytes have no counterpart here: tensors were compared with "
        "its dequantised values, rounded to the dtype written; config and tokenizer were not compared"
    )
    layout = load_model(original).layout
    _compare_names(tensors, layout.tensors.keys(), found)
    for parameters in layout.everything():
        for name, tensor in layout.convert(parameters[:1]):
            entry = tensors.entries.get(name)
            if entry is None or name in tensors.unread:
                continue
            if entry.shape != tuple(tensor.shape):
                found.problems.append(
                    f"tensor {name!r} has shape {entry.shape}, and {tuple(tensor.shape)} in the original"
                )
            elif _is_same_in_order(read_tensor(entry), tensor.to(entry.dtype), name, undoing):
                found.compared += 1
            elif name not in changed:
                found.problems.append(f"tensor {name!r} was neither pruned nor tuned and differs from the original")


def _other_order(record: _Record, original: Source) -> str:
    """Say why a checkpoint differs from one that lies before a reordering that its record cannot undo; else nothing."""
    source = record.source
    if source is None or not source.reordered or files_sha256(source_fields(original)) == source.sha256:
        return ""
    return (
        f"channels had been reordered before {shown(source.name)} was pruned to this, and how is on record there "
        f"alone, so that {original.name} is in another order: compare with {shown(source.name)}, and that with what it "
        "was made from"
    )


def _compare_names(tensors: _Tensors, theirs: Collection[str], found: _Findings) -> None:
    found.problems += [f"tensor {name!r} of the original is missing" for name in tensors.missing(theirs)]
    found.problems += [
        f"tensor {name!r} is not in the original" for name in sorted(tensors.entries.keys() - set(theirs))
    ]
