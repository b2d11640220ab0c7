"""A plain checkpoint as a GGUF file, which llama.cpp and what is built on it load; the zeros stay zeros.

No engine that reads GGUF gains from the zeros: the file is for running a pruned model where it is run already.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from halve.checkpoint.durable import sync_directory, writing
from halve.checkpoint.load import has_tokenizer, load_tokenizer, resolve, skeleton
from halve.checkpoint.room import check_space
from halve.engines.gguf_families import Shape, write_shape
from halve.engines.gguf_tensors import Planned, contents, planned
from halve.engines.gguf_tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from halve.errors import InputError

KINDS = ("bf16", "f16", "q8_0", "q4_0")
"""What matrices can be stored as; vectors are float32."""


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
        kind: what matrices are stored as, one of `KINDS`. ``q8_0`` and ``q4_0`` round every 32 weights to 8 or 4 bits
            and a scale, ``q4_0`` those of embedding and head to 8.
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
    tokens = read_vocabulary(source.name, load_tokenizer(source), shape.vocabulary)
    tensors = planned(source, shape, kind)
    check_space(target.parent, sum(each.nbytes for each in tensors) + (1 << 24), f"{target.name}")
    name = source.path.resolve().name
    write_file(target, name, shape, tokens, tensors, contents(tensors, shape), kind)
    notes = []
    if shape.window is not None and shape.window < shape.context:
        notes.append(
            f"the model's attention reaches back {shape.window} tokens, and llama.cpp's as far as a text goes: beyond "
            "that length they differ"
        )
    return ExportResult(path=target, tensors=len(tensors), nbytes=target.stat().st_size, notes=tuple(notes))


def write_file(
    target: Path,
    name: str,
    shape: Shape,
    tokens: Vocabulary,
    tensors: list[Planned],
    stored: Iterable[Any],
    kind: str,
) -> None:
    """Write the file so that it is whole or absent.

    Args:
        target: the file.
        name: of the model.
        shape: of the model.
        tokens: its vocabulary.
        tensors: in their order.
        stored: what each of them holds, NumPy arrays.
        kind: what matrices are stored as.

    Raises:
        HalveError: the volume is full, or failed.
    """
    from gguf import GGUFWriter, LlamaFileType

    temporary = target.with_name(f".{target.name}.tmp")
    writer = GGUFWriter(temporary, shape.family.architecture)
    writer.add_name(name)
    writer.add_file_type(getattr(LlamaFileType, f"MOSTLY_{kind.upper()}"))
    if kind in {"q8_0", "q4_0"}:
        writer.add_quantization_version(2)
    write_shape(writer, shape)
    write_vocabulary(writer, tokens)
    for each in tensors:
        writer.add_tensor_info(each.name, each.shape, torch.zeros(0).numpy().dtype, each.nbytes, raw_dtype=each.stored)
    try:
        with writing(target):
            temporary.unlink(missing_ok=True)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for content in stored:
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
