"""The calibration set on its way through a stack of blocks: hidden states, and all that goes with them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from halve.checkpoint.durable import writing
from halve.checkpoint.shards import file_of
from halve.errors import UnsupportedModelError
from halve.model.calls import (
    Call,
    Handed,
    Living,
    Template,
    hidden_of,
    leaves,
    living_copy,
    made,
    put_together,
    same,
    to_device,
)

_CPU = torch.device("cpu")


class HiddenStates:
    """The hidden state of every batch at the current block, in memory or, given a directory, on disk.

    Args:
        directory: an existing directory for one safetensors file a batch; None keeps the tensors in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._tensors: list[Tensor | Path] = []

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, batch: int) -> Tensor:
        stored = self._tensors[batch]
        return load_file(stored)["hidden"] if isinstance(stored, Path) else stored

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self._tensors[batch] = self._store(batch, hidden)

    def copy(self, name: str) -> "HiddenStates":
        """Return a second set of the same states; on disk, in a new folder ``name``."""
        folder = None if self.directory is None else self.directory / name
        if folder is not None:
            folder.mkdir(exist_ok=True)
        other = HiddenStates(folder)
        for batch in range(len(self)):
            other.append(self[batch])
        return other

    def append(self, hidden: Tensor) -> None:
        """Add the hidden state of the next batch."""
        self._tensors.append(self._store(len(self), hidden))

    def _store(self, batch: int, hidden: Tensor) -> Tensor | Path:
        hidden = hidden.detach().to("cpu").contiguous()
        if self.directory is None:
            return hidden
        path = self.directory / f"hidden-{batch:05d}.safetensors"
        with writing(self.directory), path.open("wb") as file:
            for chunk in file_of({"hidden": hidden}):
                file.write(chunk)
        return path

    def clear(self) -> None:
        """Forget all of them, and remove their files."""
        for stored in self._tensors:
            if isinstance(stored, Path):
                stored.unlink(missing_ok=True)
        self._tensors.clear()


class Stream:
    """The calibration set on its way through a stack of blocks, in one model.

    Args:
        templates: what each block returns.
        directory: where hidden states are kept; None keeps them in memory.
        has_memory: whether the blocks see an encoder's states besides.

    Attributes:
        hidden: (batch, sequence, d_model) hidden states of every batch, at the input of the current block.
        calls: ``calls[block][batch]`` as recorded; equal arguments share memory.
        valid: for each batch the (batch, sequence) mask of the positions that count, None when all do.
        memory_valid: the same of the positions that a decoder's cross-attention sees, the encoder's.
    """

    def __init__(
        self, templates: Sequence[Template], directory: Path | None = None, *, has_memory: bool = False
    ) -> None:
        self.has_memory = has_memory
        self.hidden = HiddenStates(directory)
        self.calls: list[list[Call]] = [[] for _ in templates]
        self.valid: list[Tensor | None] = []
        self.memory_valid: list[Tensor | None] = []
        self._templates = tuple(templates)
        self._objects: list[list[Any]] = []
        self._handed: list[dict[Handed, Tensor]] = []
        self._last_use: list[dict[Handed, int]] = []

    def append(self, hidden: Tensor, calls: Sequence[Call], objects: list[Any]) -> None:
        """Add a batch: what enters the first block, the call of every block, and the objects that may change."""
        first = not self.hidden
        for recorded, call in zip(self.calls, calls, strict=True):
            recorded.append(call if first or not same(recorded[0], call) else recorded[0])
        self.hidden.append(hidden)
        self._objects.append(objects)
        self._handed.append({})
        self._last_use.append(
            {
                leaf: block
                for block, call in enumerate(calls)
                for _, leaf in leaves((call.args, call.kwargs))
                if isinstance(leaf, Handed)
            }
        )

    def fork(self, name: str) -> "Stream":
        """Return a second stream at the same place: another model's. Recorded calls are shared."""
        other = Stream(self._templates, has_memory=self.has_memory)
        other.hidden = self.hidden.copy(name)
        other.calls = [list(calls) for calls in self.calls]
        other.valid, other.memory_valid = self.valid, self.memory_valid
        other._objects = [living_copy(objects, _CPU) for objects in self._objects]
        other._handed = [dict(handed) for handed in self._handed]
        other._last_use = self._last_use
        return other

    def call(self, block: int, batch: int, device: torch.device, dtype: torch.dtype | None = torch.float32) -> Call:
        """Return the arguments of a block in a batch, to be used once: the block may write into its objects.

        Args:
            block: its index in the stack.
            batch: the index of the batch.
            device: of all tensors.
            dtype: of the floating-point tensors; None leaves theirs.
        """
        return self._ready(block, batch, device, dtype)[0]

    def _ready(self, block: int, batch: int, device: torch.device, dtype: torch.dtype | None) -> tuple[Call, list[Any]]:
        recorded = self.calls[block][batch]
        objects = living_copy(self._objects[batch], device, dtype) if _has_objects(recorded) else []
        handed = {key: to_device(value, device, dtype) for key, value in self._handed[batch].items()}
        return made(to_device(recorded, device, dtype), handed, objects), objects

    def run(
        self,
        block: int,
        batch: int,
        module: nn.Module,
        device: torch.device,
        *,
        dtype: torch.dtype | None = torch.float32,
        keep: bool = False,
        before: Callable[[Tensor, Call], None] | None = None,
    ) -> Tensor:
        """Return the hidden state after a block, without gradients.

        Args:
            block: the block's index in the stack.
            batch: the index of the batch.
            module: the block, or a working copy of it, on ``device`` and in ``dtype``.
            device: where to run.
            dtype: of the floating-point arguments; None leaves theirs.
            keep: whether to go on from here: the hidden state, what the block hands on and what it wrote into objects
                are what the next block finds. Without, the batch stays where it is.
            before: is given the hidden state and the other arguments just before the block runs.

        Raises:
            UnsupportedModelError: the block returned something that is no tensor and was otherwise on the short sample.
        """
        hidden = to_device(self.hidden[batch], device, dtype)
        call, objects = self._ready(block, batch, device, dtype)
        if before is not None:
            before(hidden, call)
        with torch.no_grad():
            output = call_block(module, hidden, call)
        if keep:
            self._check_constants(block, output)
            self.hidden[batch] = hidden_of(output)
            if objects:
                self._objects[batch] = living_copy(objects, _CPU)
            self._hand_on(block, batch, output)
        result: Tensor = hidden_of(output)
        return result

    def _hand_on(self, block: int, batch: int, output: Any) -> None:
        """Keep what later blocks take from this one, and no more of what no later one takes."""
        last_use = self._last_use[batch]
        handed = {key: value for key, value in self._handed[batch].items() if last_use[key] > block}
        for key in last_use:
            if key.block == block:
                value = _at(output, key.path).detach().to(_CPU)
                first = self._handed[0].get(key) if batch else None  # position biases are the same for all batches
                handed[key] = first if first is not None and same(first, value) else value
        self._handed[batch] = handed

    def _check_constants(self, block: int, output: Any) -> None:
        for path, value in self._templates[block].constants:
            found = _at(output, path)
            if not same(found, value):
                raise UnsupportedModelError(
                    f"block {block} returned {found!r} at {list(path)} for a calibration batch, and {value!r} for a "
                    "short sample, so Halve cannot know beforehand what the next block is given"
                )

    def clear(self, block: int) -> None:
        """Forget the calls of a block that has been passed, and after the last one all that went with them."""
        self.calls[block].clear()
        if block == len(self.calls) - 1:
            self.hidden.clear()
            self._objects.clear()
            self._handed.clear()


def _has_objects(call: Call) -> bool:
    return any(isinstance(leaf, Living) for _, leaf in leaves((call.args, call.kwargs)))


def _at(output: Any, path: Sequence[int | str]) -> Any:
    for key in path:
        output = output[key]
    return output


def call_block(module: nn.Module, hidden: Tensor, call: Call) -> Any:
    """Return everything that a block returns, with whatever gradients are asked for."""
    args, kwargs = put_together(hidden, call)
    return module(*args, **kwargs)
