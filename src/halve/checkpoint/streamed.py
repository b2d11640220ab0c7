"""Models larger than memory: weights that stay on disk, read block by block as they are needed.

The parameters of a streamed model are views of mapped files: of the checkpoint itself where loading only renames them,
else of files beside the run that hold what loading makes of them (fused experts, weights in a wider dtype). So
everything that runs on a model in memory runs on a streamed one, and comes to the same bytes.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halve.checkpoint.disk_layout import DiskLayout, DiskTensor
from halve.checkpoint.durable import write_file, writing
from halve.checkpoint.load import LoadedModel, Source, assemble, freeze, load_model, skeleton
from halve.checkpoint.mapped import MappedFile, MappedWeights
from halve.checkpoint.precision import differing_dtypes
from halve.checkpoint.quantised import is_plain, refuse_quantised
from halve.checkpoint.room import check_space
from halve.checkpoint.shards import TensorEntry, build_header, read_shard, read_tensor, tensor_bytes
from halve.errors import InputError, UnsupportedModelError
from halve.memory import would_fill
from halve.transformers_internals import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO, ALWAYS, NEVER = STREAM = ("auto", "always", "never")
"""Whether weights stay on disk."""
_SMALL = 1 << 20
"""Bytes up to which a tensor in a wider dtype is held in memory: it is not worth a file."""


def check_stream(asked: str) -> None:
    """Refuse what is no answer to whether weights stay on disk.

    Raises:
        InputError: it is none of `STREAM`.
    """
    if asked not in STREAM:
        raise InputError(f"stream = {asked!r} is not known: choose one of {', '.join(STREAM)}")


def stays_on_disk(source: Source | None, asked: str, size: int) -> bool:
    """Return whether a model's weights stay on disk: where that is asked for, or they would take too much memory.

    Args:
        source: None for a model that is in memory.
        asked: one of `STREAM`.
        size: bytes that the weights would take in memory.

    Raises:
        InputError: it is asked for, and cannot be done.
    """
    if source is None or not source.shards:
        if asked == ALWAYS:
            raise InputError(
                "stream = 'always' is for a safetensors checkpoint on disk: leave it out for a model in memory, which "
                "is there already, and for a GGUF file, which is dequantised as a whole"
            )
        return False
    return asked == ALWAYS or (asked == AUTO and would_fill(size))


@contextmanager
def loaded_to_measure(source: Source, stream: str = AUTO, *, attention: str | None = None) -> Iterator[LoadedModel]:
    """Load a model that is going to be measured, as transformers would, and leave weights on disk that are too large.

    Args:
        source: of the model.
        stream: one of `STREAM`. A model whose weights have another dtype on disk than its config names is converted
            as it is loaded, and stays on disk only by an error.
        attention: as for `load_model`.

    Raises:
        InputError: as `load_model`, or the weights cannot stay on disk as asked.
        UnsupportedModelError, CorruptFileError: as `load_model`.
    """
    check_stream(stream)
    converted = differing_dtypes(source) if source.shards else ""
    if converted and stream == ALWAYS:
        raise InputError(f"{source.name} cannot be measured with its weights on disk, since {converted}")
    if converted or not stays_on_disk(source, stream, source.size):
        yield load_model(source, attention=attention)
        return
    with tempfile.TemporaryDirectory(prefix="halve-") as folder:
        yield load_streamed(source, Path(folder), attention=attention)


def load_streamed(
    source: Source, folder: Path, *, dtype: torch.dtype | None = None, attention: str | None = None
) -> LoadedModel:
    """Load a model whose weights stay on disk, with the parameters that `halve.checkpoint.load.load_model` gives it.

    Args:
        source: a safetensors checkpoint.
        folder: for parameters that no tensor of the checkpoint is; made if it is needed.
        dtype: as for `load_model`.
        attention: as for `load_model`.

    Raises:
        InputError: as `load_model`, or the volume of ``folder`` is too full.
        UnsupportedModelError: as `load_model`; a GGUF file, which is dequantised as a whole.
        CorruptFileError: as `load_model`.
    """
    if not source.shards:
        raise UnsupportedModelError(
            f"{source.name} is no safetensors checkpoint, and cannot be read block by block: leave stream out"
        )
    refuse_quantised(source.name, source.shards, lambda: skeleton(source))
    files = [MappedFile(path) for path in source.shards]
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    model = skeleton(source)
    beside = _Beside(model, source, dtype)
    if beside.specs:
        check_space(folder, beside.size, "weights that loading computes")
        path = folder / "weights.safetensors"
        with writing(path):
            write_file(path, beside.content(tensors, files), "weights")
        files.append(MappedFile(path))
        tensors = {name: tensor for name, tensor in tensors.items() if name not in beside.taken} | files[-1].tensors
    with without_progress_bars():
        loaded = assemble(source, tensors, dtype=dtype, attention=attention)
    beside.layout.note_rules(loaded.model)
    weights = MappedWeights(loaded.model, files)
    freeze(loaded.model, source.name, weights)
    _ = loaded.layout  # as in `load_model`
    return replace(loaded, weights=weights)


def computed_bytes(source: Source, model: "PreTrainedModel", dtype: torch.dtype | None) -> int:
    """Return the bytes of what `load_streamed` puts beside a checkpoint; nothing is read but headers.

    Args:
        source: a safetensors checkpoint.
        model: its skeleton, without weights.
        dtype: as for `load_streamed`.
    """
    return _Beside(model, source, dtype).size


class _Beside:
    """What has to be put beside a checkpoint: parameters that no tensor of it is, as it lies there.

    Args:
        model: without its weights.
        source: the checkpoint.
        dtype: that it is loaded in; None for the config's.

    Attributes:
        layout: of the checkpoint.
        specs: name, dtype and shape of everything that is put beside.
        taken: names on disk of what it is made from.
    """

    def __init__(self, model: "PreTrainedModel", source: Source, dtype: torch.dtype | None) -> None:
        entries = {entry.name: entry for path in source.shards for entry in read_shard(path).tensors}
        self.layout = DiskLayout(model, [DiskTensor(each.name, each.dtype, each.shape) for each in entries.values()])
        self._entries = entries
        self._dtype = dtype
        groups = self.layout.computed
        width = {name: self._wide(entry.dtype).itemsize for name, entry in entries.items()}
        self._groups = sorted(groups, key=lambda names: -max(width[name] for name in names))
        computed = {name for names in self._groups for name in names}
        copied = [each for each in entries.values() if each.name not in computed and self._is_copied(each)]
        self._copied = sorted(copied, key=lambda each: -width[each.name])  # so that all are aligned
        self.taken = computed | {each.name for each in self._copied}
        self.specs: list[tuple[str, torch.dtype, Sequence[int]]] = [
            (each.name, self._wide(each.dtype), each.shape) for each in self._copied
        ]
        for names in self._groups:
            found = self.layout.load({name: _like(entries[name]) for name in names})
            self.specs += [(name, self._wide(each.dtype), each.shape) for name, each in found.items()]

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.specs)

    def content(self, tensors: Mapping[str, Tensor], files: Sequence[MappedFile]) -> Iterator[bytes | memoryview]:
        """Yield the content of the file, a few tensors at a time.

        Args:
            tensors: of the checkpoint, by name, but for those that are not aligned.
            files: that they are mapped from.
        """
        yield build_header(self.specs)
        dtypes = {name: dtype for name, dtype, _ in self.specs}
        for entry in self._copied:
            yield tensor_bytes(read_tensor(entry).to(dtypes[entry.name]))
        for names in self._groups:
            parts = {name: tensors[name] if name in tensors else read_tensor(self._entries[name]) for name in names}
            for name, value in self.layout.load(parts).items():
                yield tensor_bytes(value.to(dtypes[name]))
            for file in files:
                file.release(names)

    def _is_copied(self, entry: TensorEntry) -> bool:
        """Whether a tensor cannot be used as it lies there, or is so large that its copy in a wider dtype counts."""
        aligned = entry.start % entry.dtype.itemsize == 0
        return not aligned or (entry.end - entry.start > _SMALL and self._wide(entry.dtype) != entry.dtype)

    def _wide(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a parameter has, where that is wider than on disk."""
        if self._dtype is None or not is_plain(dtype):
            return dtype
        return torch.promote_types(dtype, self._dtype)


def _like(entry: TensorEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
