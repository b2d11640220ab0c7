"""A checkpoint's tensor that is still packed: to whoever computes with it, it is the plain one.

Engines lay out a model's weights by their own rules: they slice what a checkpoint holds, transpose it, and copy it into
what they have allocated. A `PackedTensor` goes through slices and transposes packed. When it is copied into the weight
of a layer that takes packed matrices (`taking`), its matrix goes there; in any other operation, and in any other place,
it is unpacked first. Nothing writes to one; what else an operation returns, views too, is plain memory of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor

from halve.engines.packed_windows import Range, window
from halve.errors import HalveError
from halve.packed.read import PackedCheckpoint
from halve.runtime.native import AnyPacked, expand
from halve.torch_internals import tensor_without_storage, written_arguments

Take = Callable[[Tensor, "PackedTensor"], bool]
"""What is offered a packed tensor that is copied into a plain one: whether it has taken it."""
_takes: ContextVar[Take | None] = ContextVar("_takes", default=None)


@contextmanager
def taking(take: Take) -> Iterator[None]:
    """Offer packed tensors to ``take`` wherever they are copied into plain ones meanwhile."""
    before = _takes.set(take)
    try:
        yield
    finally:
        _takes.reset(before)


class PackedTensor(Tensor):
    """Rows and columns of a packed matrix, or their transpose; made by `of`."""

    matrix: AnyPacked
    name_on_disk: str
    rows: Range
    columns: Range
    transposed: bool

    @classmethod
    def of(
        cls,
        matrix: AnyPacked,
        name: str,
        rows: Range | None = None,
        columns: Range | None = None,
        transposed: bool = False,
    ) -> Self:
        """Make one.

        Args:
            matrix: (d_out, d_in), of which the tensor has the dtype.
            name: of the tensor, for errors.
            rows: which of the matrix; None for all.
            columns: the same.
            transposed: whether the tensor is (d_in, d_out).
        """
        (top, bottom), (left, right) = rows or (0, matrix.d_out), columns or (0, matrix.d_in)
        shape = (right - left, bottom - top) if transposed else (bottom - top, right - left)
        made = tensor_without_storage(cls, shape, matrix.dtype)
        made.matrix, made.name_on_disk = matrix, name
        made.rows, made.columns, made.transposed = (top, bottom), (left, right), transposed
        return made

    def window(self) -> AnyPacked:
        """Return the rows and columns packed, not transposed.

        Raises:
            InputError: as `halve.engines.packed_windows.window`.
        """
        if self.rows == (0, self.matrix.d_out) and self.columns == (0, self.matrix.d_in):
            return self.matrix
        return window(self.matrix, self.rows, self.columns, self.name_on_disk)

    def plain(self) -> Tensor:
        """Return the tensor unpacked."""
        weight = expand(self.matrix, *self.rows)[:, slice(*self.columns)]
        return weight.T if self.transposed else weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return what it is, not what it holds."""
        del tensor_contents
        return f"PackedTensor({self.name_on_disk}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Slice and transpose packed, offer copies to whoever takes them; all else computes with the plain tensor.

        Raises:
            HalveError: the operation would write to a packed tensor.
        """
        del types
        _check_reads(func, args, kwargs or {})
        first = args[0]
        if isinstance(first, cls) and (still_packed := first.if_packed(func, args[1:])) is not None:
            return still_packed
        if func is torch.ops.aten.copy_.default and not isinstance(first, cls):
            take = _takes.get()
            if take is not None and take(first, args[1]):
                return first
        plain_args, plain_kwargs = _unpacked(args), _unpacked(kwargs or {})
        return func(*plain_args, **plain_kwargs)

    def __setitem__(self, at: Any, value: Any) -> None:  # torch would write to a view, which is plain memory
        """Refuse to be written to.

        Raises:
            HalveError: always.
        """
        del at, value
        raise _unwritable(self)

    def if_packed(self, func: Any, args: tuple[Any, ...]) -> Self | None:
        """Return what an operation makes of the tensor that leaves it packed; None if none does."""
        aten = torch.ops.aten
        if func is aten.detach.default:
            return self._of(self.rows, self.columns, self.transposed)
        if func is aten.t.default or (func is aten.transpose.int and {args[0] % 2, args[1] % 2} == {0, 1}):
            return self._of(self.rows, self.columns, not self.transposed)
        if func is aten.slice.Tensor and (len(args) < 4 or args[3] == 1):
            return self._slice(*args[:3])
        return None

    def _of(self, rows: Range, columns: Range, transposed: bool) -> Self:
        return self.of(self.matrix, self.name_on_disk, rows, columns, transposed)

    def _slice(self, dim: int = 0, start: int | None = None, end: int | None = None) -> Self:
        first, last, _ = slice(start, end).indices(self.shape[dim])
        last = max(first, last)
        if (dim % 2 == 0) == self.transposed:
            columns = self.columns[0] + first, self.columns[0] + last
            return self._of(self.rows, columns, self.transposed)
        return self._of((self.rows[0] + first, self.rows[0] + last), self.columns, self.transposed)


def _unwritable(tensor: PackedTensor) -> HalveError:
    return HalveError(f"{tensor.name_on_disk} is packed and cannot be written to in place: compute a new tensor of it")


def _check_reads(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check that an operation writes to no packed tensor: what it wrote to would be a copy, and lost."""
    for at, name in written_arguments(func):
        given = args[at] if at < len(args) else kwargs.get(name)
        for each in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(each, PackedTensor):
                raise _unwritable(each)


def _unpacked(given: Any) -> Any:
    """Return what an operation is given, with plain tensors for packed ones, in lists of tensors too."""
    if isinstance(given, dict):
        return {name: _unpacked(each) for name, each in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(_unpacked(each) for each in given)
    return given.plain() if isinstance(given, PackedTensor) else given


def tensors(checkpoint: PackedCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the plain checkpoint by name, matrices that are packed as `PackedTensor`."""
    for shard in checkpoint.plain:
        for entry in shard.tensors:
            packed = checkpoint.manifest.matrices.get(entry.name)
            if packed is None or len(entry.shape) != 2:
                yield entry.name, checkpoint.tensor(entry)
            else:
                matrix = checkpoint.matrix(entry.name)
                yield entry.name, PackedTensor.of(matrix, entry.name, transposed=packed.layout == "in_out")
