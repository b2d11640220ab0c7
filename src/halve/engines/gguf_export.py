"""A plain checkpoint as a GGUF file, which llama.cpp and what is built on it load; the zeros stay zeros.

No engine that reads GGUF gains from the zeros: the file is for running a pruned model where it is run already.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint.durable import sync_directory, writing
from halve.checkpoint.load import Source, has_tokenizer, load_tokenizer, resolve, skeleton
from halve.checkpoint.room import check_space
from halve.checkpoint.shards import TensorEntry, read_shard, read_tensor
from halve.engines.gguf_families import FREQUENCIES, Shape, as_rotated, frequencies, write_shape
from halve.engines.gguf_tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from halve.errors import InputError, UnsupportedModelError
from halve.maths.linalg import is_finite

KINDS = ("bf16", "f16", "q8_0")
"""What matrices can be stored as; vectors are float32."""
_BLOCK = 32
"""Weights that share a scale in q8_0: other rows are stored in float16."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written.

    Attributes:
        path: of the file.
        tensors: in it.
        nbytes: its size.
        notes: how the engine will differ from the model, a sentence each.
    """

    path: Path
    tensors: int
    nbytes: int
    notes: tuple[str, ...]


def export_gguf(
    directory: str | Path, path: str | Path, kind: str = "bf16", *, trust_remote_code: bool = False
) -> ExportResult:
    """Write a plain checkpoint as a GGUF file; one tensor is in memory at a time.

    Args:
        directory: of a plain checkpoint, pruned or not, or what else `halve.checkpoint.load.resolve` takes.
        path: the file to write; it must not be there.
        kind: what matrices are stored as, one of `KINDS`. ``q8_0`` rounds every 32 weights to 8 bits and a scale.
        trust_remote_code: whether to accept a model that comes with Python code of its own.

    Raises:
        InputError: ``path`` is taken or cannot be written, ``kind`` is unknown, the package gguf is not installed, the
            model has no tokenizer or is a GGUF file already, weights are not finite or beyond float16.
        UnsupportedModelError: the model is of no family that is written, or its tokenizer splits as none of
            llama.cpp's does.
        CorruptFileError: as `halve.checkpoint.load.resolve`.
        HalveError: the volume is full, or failed.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}: give {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    target = Path(path).expanduser()
    if target.exists():
        raise InputError(f"{target} is there already: remove it, or give another name")
    if find_spec("gguf") is None:
        raise InputError("the package gguf, which writes such files, is not installed: pip install 'halve[gguf]'")
    source = resolve(directory, trust_remote_code=trust_remote_code)
    if source.kind == "gguf":
        raise InputError(f"{source.name} is a GGUF file already: give the directory of a checkpoint")
    shape = Shape.of(skeleton(source).config)
    if not has_tokenizer(source):
        raise InputError(f"{source.name} comes without a tokenizer, which a GGUF file carries: put its files beside it")
    tokens = read_vocabulary(source.path, load_tokenizer(source), shape.vocabulary)
    if len(tokens.tokens) > shape.vocabulary:
        raise InputError(
            f"the tokenizer of {source.name} has {len(tokens.tokens)} tokens and the model's embedding "
            f"{shape.vocabulary} rows: mend one of them"
        )
    planned = _planned(source, shape, kind)
    check_space(target.parent, sum(each.nbytes for each in planned) + (1 << 24), f"{target.name}")
    _write(target, source, shape, tokens, planned, kind)
    notes = []
    if shape.window is not None and shape.window < shape.context:
        notes.append(
            f"the model's attention reaches back {shape.window} tokens, and llama.cpp's as far as a text goes: beyond "
            "that length they differ"
        )
    return ExportResult(path=target, tensors=len(planned), nbytes=target.stat().st_size, notes=tuple(notes))


@dataclass(frozen=True)
class _Planned:
    """One tensor of the file: its name there, the one that it comes from, if one, its shape, and how it is stored."""

    name: str
    entry: TensorEntry | None
    shape: tuple[int, ...]
    stored: Any

    @property
    def nbytes(self) -> int:
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.stored]
        return torch.Size(self.shape).numel() // block * int(size)


def _planned(source: Source, shape: Shape, kind: str) -> list[_Planned]:
    """Return the tensors of the file in their order.

    Raises:
        UnsupportedModelError: the checkpoint has one that has no place in it.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map

    stored = GGMLQuantizationType
    names = get_tensor_name_map(getattr(MODEL_ARCH, shape.family.architecture.upper()), shape.blocks)
    found = []
    if frequencies(shape) is not None:
        found.append(_Planned(FREQUENCIES, None, (shape.head_width // 2,), stored.F32))
    for entry in (entry for path in source.shards for entry in read_shard(path).tensors):
        if entry.name.endswith("rotary_emb.inv_freq") or (shape.tied and entry.name == "lm_head.weight"):
            continue
        name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if name is None or not entry.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"tensor {entry.name!r} of {source.name} ({entry.dtype}) has no place in a GGUF file of a "
                f"{shape.family.architecture}: convert the model with llama.cpp's own script"
            )
        how = {"bf16": stored.BF16, "f16": stored.F16, "q8_0": stored.Q8_0}[kind]
        if len(entry.shape) < 2:
            how = stored.F32
        elif kind == "q8_0" and entry.shape[-1] % _BLOCK:
            how = stored.F16
        found.append(_Planned(name, entry, entry.shape, how))
    return found


def _write(target: Path, source: Source, shape: Shape, tokens: Vocabulary, planned: list[_Planned], kind: str) -> None:
    """Write the file so that it is whole or absent."""
    from gguf import GGUFWriter, LlamaFileType

    temporary = target.with_name(f".{target.name}.tmp")
    writer = GGUFWriter(temporary, shape.family.architecture)
    writer.add_name(source.path.resolve().name)
    writer.add_file_type(getattr(LlamaFileType, f"MOSTLY_{kind.upper()}"))
    if kind == "q8_0":
        writer.add_quantization_version(2)
    write_shape(writer, shape)
    write_vocabulary(writer, tokens)
    for each in planned:
        writer.add_tensor_info(each.name, each.shape, torch.zeros(0).numpy().dtype, each.nbytes, raw_dtype=each.stored)
    try:
        with writing(target):
            temporary.unlink(missing_ok=True)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for content in _contents(planned, shape):
                writer.write_tensor_data(content)
            writer.close()
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
            sync_directory(target.parent)
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise


def _contents(planned: list[_Planned], shape: Shape) -> Iterator[Any]:
    """Yield the tensors as they are stored, NumPy arrays.

    Raises:
        InputError: one is not finite, or would not be.
    """
    from gguf import GGMLQuantizationType, quantize

    for each in planned:
        if each.entry is None:
            factors = frequencies(shape)
            assert factors is not None  # noqa: S101 - or it would not be planned
            yield factors.numpy()
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
        if each.stored == GGMLQuantizationType.Q8_0:
            yield quantize(numbers.numpy(), each.stored)
        else:
            yield _array(numbers)


def _array(tensor: Tensor) -> Any:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
