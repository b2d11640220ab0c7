"""What a block is called with: recorded once for each batch, and made anew each time the block runs.

Most arguments are constants of a batch: masks, rotary embeddings. Two kinds are not, and are recorded as what they
stand for. A value that an earlier block has returned beside its hidden state (`Handed`) comes from that block's replay.
An object that blocks write into (`Living`: a cache, a mapping of shared keys and values) exists once for each batch
and each model that is replayed, and every run of a block gets a copy of it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import UnsupportedModelError, one_line

Path = tuple[int | str, ...]
"""Keys and indices that lead to a value in a nest of containers."""

_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, type, Enum),
    *(FunctionType, BuiltinFunctionType, MethodType, partial),
    *(torch.dtype, torch.device, torch.Generator, nn.Module),
)


@dataclass(frozen=True)
class Call:
    """The arguments of one block in one batch, except the hidden state.

    Attributes:
        args: further positional arguments.
        kwargs: keyword arguments.
        hidden: where the hidden state goes: its position, or the name of its argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: int | str = 0


@dataclass(frozen=True)
class Handed:
    """Stands in a recorded call for what an earlier block returned beside its hidden state.

    Attributes:
        block: index of that block in its stack.
        path: where the value lies in what the block returns.
    """

    block: int
    path: Path


@dataclass(frozen=True)
class Living:
    """Stands in a recorded call for an object that may change; ``number`` counts the objects of a batch."""

    number: int


@dataclass(frozen=True)
class _FromArgument:
    """Stands for a returned value that is an argument of the same call."""

    path: Path


@dataclass(frozen=True)
class _Fresh:
    """Stands for a returned tensor of the block's own making."""

    shape: torch.Size
    dtype: torch.dtype


_HIDDEN = object()


def is_constant(value: Any) -> bool:
    """Whether a value that is no tensor and no container cannot change, or is not a block's to change."""
    return isinstance(value, _CONSTANTS) or hasattr(value, "model_type")  # the last: a config


def is_plain(value: Any) -> bool:
    """Whether a value is a container without a life of its own: a tuple, a ``dict`` or a ``list`` itself."""
    return isinstance(value, tuple) or type(value) in {dict, list}


def items_of(value: Any) -> Iterator[tuple[int | str, Any]]:
    """Yield the keys or indices of a plain container with what they lead to."""
    return iter(value.items()) if isinstance(value, dict) else iter(enumerate(value))


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a plain container with every item changed."""
    return rebuilt_by_key(value, lambda _key, item: change(item))


def rebuilt_by_key(value: Any, change: Callable[[int | str, Any], Any]) -> Any:
    """Return a plain container with every item changed, which is given with its key or index."""
    items = {key: change(key, item) for key, item in items_of(value)}
    if isinstance(value, dict):
        return items
    return type(value)(*items.values()) if hasattr(value, "_fields") else type(value)(items.values())


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield everything in a nest of plain containers that is none itself, with its path."""
    if is_plain(value):
        for key, item in items_of(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def hidden_of(output: Any) -> Any:
    """Return the hidden state in what a block returned: itself, or the first of several."""
    return output[0] if isinstance(output, tuple | list) and output else output


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Move every tensor in a nest of plain containers; floating-point ones also change their dtype, unless None."""
    if isinstance(value, Call):
        args, kwargs = to_device((value.args, value.kwargs), device, dtype)
        return Call(args, kwargs, value.hidden)
    if isinstance(value, Tensor):
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)
    return rebuilt(value, lambda item: to_device(item, device, dtype)) if is_plain(value) else value


def living_copy(
    objects: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype | None = None,
    memo: dict[int, Any] | None = None,
) -> list[Any]:
    """Return copies of objects that share nothing with them; what they share with each other stays so.

    Args:
        objects: of any kind.
        device: of every tensor in the copies.
        dtype: of the floating-point ones; None leaves theirs.
        memo: of copies that were made before and may share something with these (`copy.deepcopy`).

    Raises:
        UnsupportedModelError: an object cannot be copied.
    """
    memo = {} if memo is None else memo
    copies = []
    for each in objects:
        try:
            copies.append(copy.deepcopy(each, memo))
        except Exception as error:  # an object of anybody's making may raise anything
            raise UnsupportedModelError(
                f"blocks of the model are given a {type(each).__name__}, which cannot be copied ({one_line(error)}): "
                "every batch needs one of its own"
            ) from error
    for made_of in memo.values():
        if isinstance(made_of, Tensor):
            made_of.data = to_device(made_of.data, device, dtype)
    return copies


def same(a: Any, b: Any) -> bool:
    """Whether two recorded values are equal, tensors by value."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Call):
        return a.hidden == b.hidden and same((a.args, a.kwargs), (b.args, b.kwargs))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def made(call: Call, handed: Mapping[Handed, Tensor], objects: Sequence[Any]) -> Call:
    """Return a recorded call with what its stand-ins stand for."""

    def back(value: Any) -> Any:
        if isinstance(value, Handed):
            return handed[value]
        if isinstance(value, Living):
            return objects[value.number]
        return rebuilt(value, back) if is_plain(value) else value

    return Call(back(call.args), back(call.kwargs), call.hidden)


@dataclass(frozen=True)
class Template:
    """What a block returned on a short sample, with stand-ins for what depends on the batch.

    Attributes:
        content: a nest of them.
        hidden: where the block received its hidden state: a position, or the name of an argument.
        received: shape of the hidden state that it was given.
        gave: shape of the hidden state that it returned.
    """

    content: Any
    hidden: int | str
    received: torch.Size
    gave: torch.Size

    @classmethod
    def of(cls, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: int | str) -> "Template":
        """Look at what a block returned, and at what it was called with."""
        arguments = leaves((args, dict(kwargs)))
        given = {id(value): path for path, value in arguments if not is_constant(value) and path[1] != hidden}
        state = hidden_of(output)

        def seen(value: Any) -> Any:
            if value is state:
                return _HIDDEN
            if id(value) in given:
                return _FromArgument(given[id(value)])
            if isinstance(value, Tensor):
                return _Fresh(value.shape, value.dtype)
            if is_plain(value):
                return rebuilt(value, seen)
            return value if is_constant(value) else None

        return cls(seen(output), hidden, taken_apart(args, kwargs, hidden)[0].shape, state.shape)

    def passed(self, hidden: Tensor) -> Tensor:
        """Return a hidden state in place of the block's: as it came, or zeros where the block changes the shape."""
        if self.received == self.gave:
            return hidden
        if hidden.ndim != len(self.received) or hidden.ndim != len(self.gave):
            return hidden.new_zeros(self.gave)
        sizes = zip(hidden.shape, self.received, self.gave, strict=True)
        return hidden.new_zeros([size * after // before for size, before, after in sizes])

    @property
    def constants(self) -> list[tuple[Path, Any]]:
        """What is neither a tensor nor handed through, with its path."""
        return [(path, value) for path, value in leaves(self.content) if _is_returned_constant(value)]

    @property
    def own(self) -> list[Path]:
        """Paths of the tensors that the block makes itself."""
        return [path for path, value in leaves(self.content) if isinstance(value, _Fresh)]


def _is_returned_constant(value: Any) -> bool:
    return value is not _HIDDEN and value is not None and not isinstance(value, _FromArgument | _Fresh)


@dataclass(frozen=True)
class Behaviour:
    """How the blocks of a stack are called and what they return, as short samples have shown.

    Attributes:
        templates: what each block returns.
        living: whether blocks write into dicts or lists that they are given.
        hands_on: whether the model takes what blocks return beside the hidden state and hands it to later ones.
        mask: the tensor of a batch that marks the positions which count; None if there is none for these blocks.
        memory_mask: the same for what a decoder sees of an encoder; None for blocks that see none.
    """

    templates: tuple[Template, ...]
    living: bool
    hands_on: bool
    mask: str | None = "attention_mask"
    memory_mask: str | None = None


@dataclass
class Recording:
    """The calls of a stack's blocks in one batch.

    Attributes:
        living: whether blocks write into dicts and lists.
        hands_on: whether models get stand-ins for what blocks return beside the hidden state; None is given without.
        objects: those that may change, as they were when they first appeared.
        calls: the hidden state and the call of every block that was called, by the block's index.
    """

    living: bool
    hands_on: bool
    objects: list[Any] = field(default_factory=list)
    calls: dict[int, tuple[Tensor, Call]] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _handed: dict[int, Handed] = field(default_factory=dict)
    _copied: dict[int, Any] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)  # so that no other object gets the same id

    def encoded(self, value: Any) -> Any:
        """Return an argument with stand-ins."""
        if isinstance(value, Tensor):
            return self._handed.get(id(value), value)
        if isinstance(value, tuple) or (is_plain(value) and not self.living):
            return rebuilt(value, self.encoded)
        if is_constant(value):
            return value
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.objects)
            self._kept.append(value)
            self.objects += living_copy([value], torch.device("cpu"), None, self._copied)
        return Living(self._numbers[id(value)])

    def returned(self, block: int, template: Template, hidden: Tensor, args: Any, kwargs: Any) -> Any:
        """Return what a block that is not run gives back: the hidden state as it came, and stand-ins."""
        given = (args, kwargs)

        def filled(value: Any, path: Path) -> Any:
            if value is _HIDDEN:
                return template.passed(hidden)
            if isinstance(value, _FromArgument):
                found = given
                for key in value.path:
                    found = found[key]  # type: ignore[index]
                return found
            if isinstance(value, _Fresh):
                return self._stand_in(Handed(block, path), value) if self.hands_on else None
            return rebuilt_by_key(value, lambda key, item: filled(item, (*path, key))) if is_plain(value) else value

        return filled(template.content, ())

    def _stand_in(self, handed: Handed, like: _Fresh) -> Tensor:
        # On the meta device, so that a model which computes with it between its blocks fails instead of going wrong.
        tensor = torch.empty(like.shape, dtype=like.dtype, device="meta")
        self._handed[id(tensor)] = handed
        self._kept.append(tensor)
        return tensor


@dataclass
class Recorder:
    """Stands in for a block's forward: keeps the call, passes the hidden state on."""

    block: int
    template: Template
    recording: Recording

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Be called in the block's place."""
        hidden, call = taken_apart(args, kwargs, self.template.hidden)
        encoded = Call(self.recording.encoded(call.args), rebuilt(call.kwargs, self.recording.encoded), call.hidden)
        self.recording.calls[self.block] = hidden, encoded
        return self.recording.returned(self.block, self.template, hidden, args, kwargs)


def taken_apart(args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: int | str) -> tuple[Tensor, Call]:
    """Take the hidden state out of a block's arguments."""
    if isinstance(hidden, int):
        return args[hidden], Call((*args[:hidden], *args[hidden + 1 :]), dict(kwargs), hidden)
    rest = {key: value for key, value in kwargs.items() if key != hidden}
    return kwargs[hidden], Call(tuple(args), rest, hidden)


def put_together(hidden: Tensor, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return all arguments of a block."""
    if isinstance(call.hidden, int):
        return (*call.args[: call.hidden], hidden, *call.args[call.hidden :]), call.kwargs
    return call.args, {call.hidden: hidden, **call.kwargs}
