"""Judging a packed checkpoint by its bytes: sums, masks, values, and what would be restored from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from halve.checkpoint.directory import (
    INDEX,
    PACKED,
    RECORD,
)
from halve.checkpoint.durable import hashed, sha256_of
from halve.checkpoint.shards import read_tensor, tensor_bytes
from halve.checkpoint.validated import shown
from halve.errors import HalveError, noting
from halve.maths.linalg import is_finite
from halve.packed.read import SCALES, VALUES, PackedCheckpoint, parts_of
from halve.recorded import Record, read_record
from halve.runtime.native import AnyPacked
from halve.runtime.packed_matrix import OVERREAD
from halve.runtime.quantised_matrix import QuantisedMatrix


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

    def note(self, error: HalveError) -> None:
        """Take an error for a problem."""
        self.problems.append(str(error))


def verify(checkpoint: PackedCheckpoint) -> Verified:
    """Read everything: sums, masks, values. What would come out of it is for `restoring_problems`.

    What `survey_packed` has told is not told again: files that are missing or of another size, and their tensors.
    """
    found = Verified()
    manifest, place = checkpoint.manifest, checkpoint.directory
    for name, file in manifest.files.items():
        with noting(found.note):
            path = place / name
            if path.is_file() and path.stat().st_size == file.size and sha256_of(path) != file.sha256:
                found.problems.append(f"{name} does not have the sha256 in {PACKED}: it has been changed")
    for name, packed in manifest.matrices.items():
        if parts_of(name, packed).keys() <= checkpoint.entries.keys():
            with noting(found.note):
                _verify_values(name, checkpoint.matrix(name), found)
    parts = {part for name, packed in manifest.matrices.items() for part in parts_of(name, packed)}
    for name, entry in checkpoint.entries.items():
        if entry.dtype.is_floating_point and name not in parts:
            with noting(found.note):
                tensor = read_tensor(entry)
                if not is_finite(tensor):
                    found.problems.append(f"tensor {name!r} holds NaN or infinity")
    return found


def _verify_values(name: str, matrix: AnyPacked, found: Verified) -> None:
    found.weights += math.prod(matrix.shape)
    if isinstance(matrix, QuantisedMatrix):  # whose scales and integers reading it has checked
        found.zeros += math.prod(matrix.shape) - int(matrix.integers().count_nonzero())
        ends = {SCALES: matrix.scales[-OVERREAD:]}
    else:
        kept = matrix.values[:-OVERREAD]
        found.zeros += math.prod(matrix.shape) - int(kept.count_nonzero())
        ends = {VALUES: matrix.values[-OVERREAD:]}
        if not is_finite(kept):
            found.problems.append(f"tensor {name!r} holds NaN or infinity")
    for part, end in ends.items():
        if any(tensor_bytes(end)):
            found.problems.append(f"tensor {name + part!r} does not end in {OVERREAD} zeros")


def restoring_problems(checkpoint: PackedCheckpoint) -> Iterator[str]:
    """Say how the plain checkpoint would not come out as it was, of a packed one in which nothing else is wrong.

    Raises:
        CorruptFileError, UnreadableFileError: a file was damaged since it was opened.
    """
    manifest, place = checkpoint.manifest, checkpoint.directory
    sums = {name: file.sha256 for name, file in manifest.restored().items()}
    found = {shard.path.name: hashed(checkpoint.plain_bytes(shard)) for shard in checkpoint.plain}
    if manifest.index is not None:
        found[INDEX] = hashed([manifest.index])
    for name, sha256 in found.items():
        if sha256 != sums[name]:
            yield f"{name} would not be restored with the sha256 in {PACKED}"
    recorded = read_record(place, Record).files if (place / RECORD).exists() else None
    for name, sha256 in (recorded or {}).items():
        if sums.get(name) != sha256:
            yield (
                f"{shown(name)} was not packed with the sha256 recorded in {RECORD}: the plain checkpoint had been "
                "changed"
            )
