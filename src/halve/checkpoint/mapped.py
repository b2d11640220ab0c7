"""Weights that stay on disk: the operating system reads what is touched, and may forget it again.

The tensors of a mapped safetensors file can be read like any others, and cost no memory that could not be taken back.
They cannot be written to, which ends the process: whoever changes a parameter takes it into memory first.
"""

import math
import mmap
import os
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from halve.checkpoint.shards import TensorEntry, read_shard, reading

_PAGE = mmap.PAGESIZE


class MappedFile:
    """A safetensors file whose tensors are read when they are touched.

    The file must not be changed or shortened while its tensors are in use: to touch what is not there any more ends
    the process. It may be removed; its space is free when the last tensor is.

    Args:
        path: of the file.

    Attributes:
        tensors: by name, in the order of their bytes; read-only.
        unaligned: those that lie so that they cannot be used in place, as in a file whose header has an odd length.

    Raises:
        CorruptFileError, UnreadableFileError, UnsupportedModelError: as `halve.checkpoint.shards.read_shard`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        entries = read_shard(path).tensors
        with reading(path), path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.unaligned = {entry.name: entry for entry in entries if entry.start % entry.dtype.itemsize}
        self._entries = {entry.name: entry for entry in entries if entry.name not in self.unaligned}
        self.tensors = {name: self._view(entry) for name, entry in self._entries.items()}

    def _view(self, entry: TensorEntry) -> Tensor:
        count = math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=entry.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.start)
        return flat.reshape(entry.shape)

    def fetch(self, names: Collection[str]) -> None:
        """Let the system begin to read these tensors."""
        if hasattr(mmap, "MADV_WILLNEED"):
            for start, end in self._ranges(names):
                begin = start - start % _PAGE
                self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def release(self, names: Collection[str]) -> None:
        """Give back the memory of these tensors; the system may keep what it has read of the file."""
        for start, end in self._ranges(names):
            first, last = -(-start // _PAGE) * _PAGE, end - end % _PAGE
            if first < last and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def forget(self, names: Collection[str]) -> None:
        """Give back the memory of these tensors, and let the system forget what it has read of them."""
        self.release(names)
        ranges = self._ranges(names)
        if ranges and hasattr(os, "posix_fadvise") and self._path.exists():
            with self._path.open("rb", buffering=0) as file:
                for start, end in ranges:
                    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)

    def _ranges(self, names: Collection[str]) -> list[tuple[int, int]]:
        """Return where tensors lie, neighbours as one."""
        found: list[tuple[int, int]] = []
        for entry in self._entries.values():  # in the order of their bytes
            if entry.name not in names or entry.start == entry.end:
                continue
            if found and found[-1][1] == entry.start:
                found[-1] = (found[-1][0], entry.end)
            else:
                found.append((entry.start, entry.end))
        return found


class Weights:
    """A model's weights, in memory: nothing has to be fetched, and nothing can be let go.

    Attributes:
        mapped: whether they are on disk.
    """

    mapped = False

    def fetch(self, block: str) -> None:
        """Begin to read the weights of a block, given the name of its module."""

    def own(self, parameter: nn.Parameter) -> None:
        """Take a parameter into memory, where it may be changed."""

    def settle(self, block: str, kept: Path) -> None:
        """Let the weights of a block go that is done with.

        Args:
            block: the name of its module.
            kept: the safetensors file with those of its parameters that were changed, by name.
        """

    def done_with(self, parameter: Tensor) -> None:
        """Let one parameter go until it is used again."""

    def release(self, block: str = "") -> None:
        """Let the weights of a block, or of the whole model, go until they are used again."""

    @contextmanager
    def passing(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """Let every block go when it has run, while the whole model is run."""
        del blocks
        yield


class MappedWeights(Weights):
    """The weights of a model that are, in part or all, views of mapped files.

    Args:
        model: the model.
        files: all that are mapped.

    Attributes:
        held: bytes of the parameters that lie in memory nevertheless.
    """

    mapped = True

    def __init__(self, model: nn.Module, files: Iterable[MappedFile]) -> None:
        self._model = model
        by_address = {
            tensor.data_ptr(): (file, name) for file in files for name, tensor in file.tensors.items() if tensor.numel()
        }
        self._home: dict[int, tuple[MappedFile, str]] = {}
        self.held = 0
        for parameter in model.parameters():
            if parameter.numel() and parameter.data_ptr() in by_address:
                self._home[id(parameter)] = by_address[parameter.data_ptr()]
            else:
                self.held += parameter.nbytes

    def fetch(self, block: str) -> None:
        """See `Weights`."""
        for file, names in self._files(self._model.get_submodule(block)).items():
            file.fetch(names)

    def own(self, parameter: nn.Parameter) -> None:
        """See `Weights`."""
        if id(parameter) in self._home:
            file, name = self._home[id(parameter)]
            if parameter.data_ptr() == file.tensors[name].data_ptr():
                parameter.data = parameter.data.clone()
                file.release({name})

    def settle(self, block: str, kept: Path) -> None:
        """See `Weights`; what was changed is from now on read from the file that was kept."""
        module, file = self._model.get_submodule(block), MappedFile(kept)
        finished = self._files(module)
        own = dict(self._model.named_parameters(remove_duplicate=False))  # buffers stay in memory
        for name in file.tensors.keys() & own.keys():
            self._home[id(own[name])] = file, name
        for name in file.unaligned.keys() & own.keys():  # what was changed stays in memory
            self._home.pop(id(own[name]), None)
        for parameter in module.parameters():
            if id(parameter) in self._home:
                place, name = self._home[id(parameter)]
                parameter.data = place.tensors[name]
        for each in (finished, self._files(module)):
            for place, names in each.items():
                place.forget(names)

    def done_with(self, parameter: Tensor) -> None:
        """See `Weights`."""
        if id(parameter) in self._home:
            file, name = self._home[id(parameter)]
            file.release({name})

    def release(self, block: str = "") -> None:
        """See `Weights`."""
        self._release(self._model.get_submodule(block))

    @contextmanager
    def passing(self, blocks: Iterable[nn.Module]) -> Iterator[None]:
        """See `Weights`."""
        with ExitStack() as hooks:
            for block in blocks:
                hooks.enter_context(block.register_forward_hook(lambda module, *_: self._release(module)))
            yield

    def _release(self, module: nn.Module) -> None:
        for file, names in self._files(module).items():
            file.release(names)

    def _files(self, module: nn.Module) -> dict[MappedFile, set[str]]:
        """Return the mapped tensors of a module, by file."""
        found: dict[MappedFile, set[str]] = {}
        for parameter in module.parameters():
            if id(parameter) in self._home:
                file, name = self._home[id(parameter)]
                found.setdefault(file, set()).add(name)
        return found
