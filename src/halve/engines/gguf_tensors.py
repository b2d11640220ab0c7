"""The tensors of a GGUF file: which of a checkpoint's go into it, how each is stored, and their numbers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint.load import Source
from halve.checkpoint.shards import TensorEntry, read_shard, read_tensor
from halve.engines.gguf_families import FREQUENCIES, Shape, as_rotated, frequencies
from halve.errors import InputError, UnsupportedModelError
from halve.maths.linalg import is_finite

_BLOCK = 32
"""Weights that share a scale in q8_0 and q4_0: other rows are stored in float16."""
_AT_8_BITS = ("token_embd.weight", "output.weight")
"""What stays at 8 bits in q4_0, as llama.cpp's own quantiser leaves it at more."""


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: its name there, what it is made of, its shape, and how it is stored.

    It is made of one of the checkpoint, or is there already where the checkpoint has none.
    """

    name: str
    entry: TensorEntry | Tensor
    shape: tuple[int, ...]
    stored: Any

    @property
    def nbytes(self) -> int:
        """Bytes of it in the file."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.stored]
        return torch.Size(self.shape).numel() // block * int(size)


def planned(source: Source, shape: Shape, kind: str) -> list[Planned]:
    """Return the tensors of the file in their order.

    Args:
        source: the checkpoint.
        shape: of its model.
        kind: what matrices are stored as.

    Raises:
        UnsupportedModelError: the checkpoint has one that has no place in it.
    """
    entries = (entry for path in source.shards for entry in read_shard(path).tensors)
    return placed(source.name, ((entry.name, entry) for entry in entries), shape, kind)


def placed(model: str, entries: Iterable[tuple[str, TensorEntry | Tensor]], shape: Shape, kind: str) -> list[Planned]:
    """Return the tensors of the file in their order.

    Args:
        model: its name, for messages.
        entries: the model's tensors by their names; of those in memory only dtypes and shapes are looked at.
        shape: of the model.
        kind: what matrices are stored as.

    Raises:
        UnsupportedModelError: one of them has no place in the file.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map

    stored = GGMLQuantizationType
    names = get_tensor_name_map(getattr(MODEL_ARCH, shape.family.architecture.upper()), shape.blocks)
    factors = frequencies(shape)
    found = [] if factors is None else [Planned(FREQUENCIES, factors, tuple(factors.shape), stored.F32)]
    for name, entry in entries:
        if name.endswith("rotary_emb.inv_freq") or (shape.tied and name == "lm_head.weight"):
            continue
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None or not entry.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"tensor {name!r} of {model} ({entry.dtype}) has no place in a GGUF file of a "
                f"{shape.family.architecture}: convert the model with llama.cpp's own script"
            )
        how = getattr(stored, "Q8_0" if kind == "q4_0" and place in _AT_8_BITS else kind.upper())
        if len(entry.shape) < 2:
            how = stored.F32
        elif how in {stored.Q8_0, stored.Q4_0} and entry.shape[-1] % _BLOCK:
            how = stored.F16
        found.append(Planned(place, entry, tuple(entry.shape), how))
    return found


def contents(tensors: list[Planned], shape: Shape) -> Iterator[Any]:
    """Yield the tensors as they are stored, NumPy arrays.

    Args:
        tensors: what `planned` returns.
        shape: of the model.

    Raises:
        InputError: one is not finite, or would not be.
    """
    from gguf import GGMLQuantizationType, quantize

    for each in tensors:
        if isinstance(each.entry, Tensor):
            yield each.entry.numpy()
            continue
        tensor = as_rotated(each.entry.name, read_tensor(each.entry), shape).contiguous()
        stored = {
            GGMLQuantizationType.BF16: torch.bfloat16,
            GGMLQuantizationType.F16: torch.float16,
        }.get(each.stored, torch.float32)
        numbers = tensor.to(stored)
        if not is_finite(numbers):
            raise InputError(
                f"tensor {each.entry.name!r} holds NaN or infinity in {str(stored).removeprefix('torch.')}: mend the "
                "checkpoint, or choose another kind"
            )
        if each.stored in {GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0}:
            yield quantize(numbers.numpy(), each.stored)
        else:
            yield _array(numbers)


def _array(tensor: Tensor) -> Any:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
