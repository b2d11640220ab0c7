"""The weight of one layer of an engine while a checkpoint is loaded into it, and what it becomes: packed, or dense."""

from torch import Tensor

from halve.engines.packed_tensor import PackedTensor
from halve.engines.packed_windows import stacked
from halve.errors import InputError
from halve.maths.grid import Bits
from halve.maths.linalg import is_finite
from halve.maths.pattern import Pattern
from halve.packed.load import in_dtype
from halve.runtime.native import AnyPacked, expand
from halve.runtime.packed_matrix import DTYPES, pack
from halve.runtime.quantised_matrix import quantise

PATTERN = Pattern("2:4")
"""What plain weights are packed at."""


class LayerWeight:
    """What has been loaded of a layer's weight: rows that came packed, beside the plain ones in its tensor.

    A fused layer is loaded piece by piece: the queries' rows, the keys', the values'. If all of them come packed, and
    packed in the same way, they become one packed matrix without a dense one; if not, those that did are unpacked.

    Args:
        data: the weight, (d_out, d_in), contiguous on the CPU; memory that is never written is never taken.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.packed: dict[int, AnyPacked] = {}
        self._mixed = False

    def take(self, target: Tensor, source: PackedTensor) -> bool:
        """Take a packed tensor that is copied into rows of the weight; False if it has to be unpacked for that.

        Raises:
            InputError: the piece cuts a group, or is not finite in the weight's dtype.
        """
        first, width = target.storage_offset() - self.data.storage_offset(), self.data.shape[1]
        fits = (
            target.untyped_storage().data_ptr() == self.data.untyped_storage().data_ptr()
            and target.shape == source.shape
            and target.shape[1] == width
            and target.is_contiguous()
            and not source.transposed
            and target.dtype in DTYPES
        )
        if self._mixed or not fits:
            self.mix()
            return False
        self.packed[first // width] = in_dtype(source.window(), target.dtype, source.name_on_disk)
        return True

    def mix(self) -> None:
        """Unpack what has come packed, into its rows: plain ones follow."""
        for row, matrix in self.packed.items():
            self.data[row : row + matrix.d_out].copy_(expand(matrix, 0, matrix.d_out))
        self.packed, self._mixed = {}, True

    def became(self, bits: Bits | None) -> tuple[AnyPacked | None, str]:
        """Return the packed weight, or None and why it stays dense; then all of it is in ``data``.

        Args:
            bits: of the integers that plain weights are rounded to; None leaves them as they are.

        Raises:
            InputError: a kept weight is too large for a scale.
        """
        rows = sorted(self.packed)
        if rows and sum(matrix.d_out for matrix in self.packed.values()) == len(self.data):
            if (matrix := stacked([self.packed[row] for row in rows])) is not None:
                return matrix, ""
            self.mix()
            return None, "its fused parts are packed in different ways"
        self.mix()
        if reason := why_dense(self.data):
            return None, reason
        packed = pack(self.data, PATTERN)
        return (packed if bits is None else quantise(packed, bits)), ""


def why_dense(weight: Tensor) -> str:
    """Return why a plain weight is not packed, as half a sentence; empty if it is."""
    if weight.ndim != 2:
        return f"it has {weight.ndim} dimensions"
    if weight.dtype not in DTYPES:
        return f"{str(weight.dtype).removeprefix('torch.')} is not packed"
    if not PATTERN.fits(weight.shape[1]):
        return "its rows are no whole groups of four"
    if not PATTERN.satisfied_by(weight):
        return "it is not at 2:4"
    if not is_finite(weight):
        return "it holds NaN or infinity"
    return ""


def check_split(name: str, d_in: int, part: int) -> None:
    """Check that tensor parallelism splits the rows of a weight between groups of four.

    Args:
        name: of the layer.
        d_in: length of a row.
        part: of it that one worker has.

    Raises:
        InputError: it does not.
    """
    if part != d_in and not PATTERN.fits(part):
        raise InputError(
            f"{name} would be split after every {part} of its {d_in} inputs, which cuts groups of four: choose a "
            "--tensor-parallel-size that keeps them whole"
        )
