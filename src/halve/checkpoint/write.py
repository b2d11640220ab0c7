"""Writing pruned checkpoints: the input's files, its bytes where nothing changed, and nothing half-written.

Every file goes through `halve.checkpoint.durable.write_file`. The index and ``config.json`` come last, so that a
directory without them cannot be loaded by accident.
"""

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halve.checkpoint.directory import BASE_CARD, CONFIG, INDEX, LAST, RECORD, WEIGHTS, card_of_base, companions
from halve.checkpoint.disk_layout import DiskLayout, DiskTensor
from halve.checkpoint.durable import Content, file_chunks, filling
from halve.checkpoint.load import LoadedModel, Source
from halve.checkpoint.room import check_destination
from halve.checkpoint.shards import build_header, read_chunks, read_shard, read_tensor, tensor_bytes
from halve.errors import InputError, UnsupportedModelError, first_few, one_line
from halve.maths.linalg import is_finite
from halve.transformers_internals import build

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SHARD = 5_000_000_000


def output_bytes(loaded: LoadedModel, dtype: torch.dtype | None = None) -> int:
    """Return how many bytes the written weights take, within the few kilobytes of their headers.

    Args:
        loaded: the model.
        dtype: as for ``write_checkpoint``.
    """
    if loaded.source is not None and loaded.source.shards:
        return loaded.source.size
    return sum(_size(tensor) for tensor in _retyped(loaded, dtype))


def write_checkpoint(
    out: Path,
    loaded: LoadedModel,
    changed: Collection[str],
    record: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, str]:
    """Write a pruned model that plain ``from_pretrained`` loads.

    A model that came from safetensors keeps its shard names, headers, dtypes and every byte of every tensor that did
    not change, those in files that transformers does not load among them. A weight that did not change keeps its bits
    on disk even where memory holds fewer. Its model card goes along under another name. A model from a GGUF file or
    from memory is written whole, in shards of at most 5 GB. ``-0.0`` becomes ``+0.0`` in the tensors that changed.

    Args:
        out: the directory, absent or empty; removed again if anything fails.
        loaded: the model, with its pruned weights in place.
        changed: names, in the model's ``state_dict()``, of the parameters that were pruned or tuned.
        record: what is written to ``halve.json``; ``files``, the sha256 of every other file, is added to it.
        dtype: of the floating-point tensors written, only for a model from a GGUF file or from memory; None keeps the
            model's.

    Returns:
        dict[str, str]: sha256, in hexadecimal, of every file written, by its name.

    Raises:
        InputError: as ``check_destination``; NaN or infinity in a tensor; a dtype where the input's must be kept.
        UnsupportedModelError: a parameter cannot be written in the layout of the checkpoint.
        CorruptFileError: the input has changed since it was loaded.
        HalveError: the volume is full, or failed.
    """
    source = loaded.source
    original = source if source is not None and source.shards else None
    if original is not None and dtype is not None:
        raise InputError("dtype was given, but a safetensors checkpoint keeps its own dtypes: leave dtype out")
    check_destination(out, source, output_bytes(loaded, dtype))
    _check_finite(loaded, changed, dtype)
    facts = _plain_json(record)
    with filling(out) as write:
        plan = _written_whole(loaded, changed, dtype) if original is None else _rewritten(loaded, original, changed)
        last = {name: b"".join(plan.pop(name)) for name in LAST if name in plan}
        sums: dict[str, str] = {}
        for name, chunks in plan.items():
            sums[name] = write(name, chunks, "shard" if name.endswith(".safetensors") else "companion")
        sums |= {name: hashlib.sha256(content).hexdigest() for name, content in last.items()}
        facts["files"] = dict(sorted(sums.items()))
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        for name, content in {RECORD: text.encode(), **last}.items():
            sums[name] = write(name, [content], name)
    return sums


def _rewritten(loaded: LoadedModel, source: Source, changed: Collection[str]) -> dict[str, Content]:
    """Return the files of a safetensors checkpoint, by name, in the order to write them; content is made on demand."""
    plan: dict[str, Content] = {}
    for path in source.shards:
        plan[path.name] = _rewritten_shard(loaded, path, changed)
    for path in source.carried:
        plan[path.name] = file_chunks(path)
    for path in companions(source.path, code=source.trust_remote_code):
        plan[str(path.relative_to(source.path))] = file_chunks(path)
    card, _ = card_of_base(source.path)
    if card is not None:
        plan[BASE_CARD] = file_chunks(card)
    if source.index is not None:
        plan[INDEX] = file_chunks(source.index)
    plan[CONFIG] = file_chunks(source.path / CONFIG)
    return plan


def _rewritten_shard(loaded: LoadedModel, path: Path, changed: Collection[str]) -> Iterator[bytes | memoryview]:
    shard = read_shard(path)
    names = {entry.name for entry in shard.tensors}
    owner = {tensor: name for name in changed for tensor in loaded.layout.locate(name).tensors}
    ready: dict[str, Tensor] = {}  # what was converted together and is not written yet
    yield shard.header
    for entry in shard.tensors:
        if entry.name not in owner:
            yield from read_chunks(entry)
            continue
        if entry.name not in ready:
            ready |= loaded.layout.convert([owner[entry.name]], names)
        value = ready.pop(entry.name) + 0.0
        parameter = loaded.model.get_parameter_or_buffer(owner[entry.name])
        held = parameter.dtype
        exact = torch.promote_types(held, entry.dtype) == held
        yield tensor_bytes(value if exact else _unrounded(value, read_tensor(entry), held))
        loaded.weights.done_with(parameter)


def _unrounded(value: Tensor, original: Tensor, dtype: torch.dtype) -> Tensor:
    """Put back the bits that loading rounded away, wherever a weight is still what it was loaded as.

    Args:
        value: of any shape, in the dtype on disk; +0.0 where it is pruned.
        original: the tensor on disk, alike.
        dtype: that it was held in, which has fewer bits.
    """
    untouched = (value != 0) & (original.to(dtype).to(original.dtype) == value)
    return torch.where(untouched, original, value)


def _written_whole(loaded: LoadedModel, changed: Collection[str], dtype: torch.dtype | None) -> dict[str, Content]:
    """Return the files of a new checkpoint, by name, in the order to write them; weights are converted on demand."""
    shards = _split(_retyped(loaded, dtype))
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [WEIGHTS]
    plan: dict[str, Content] = {}
    for name, tensors in zip(names, shards, strict=True):
        plan[name] = _new_shard(loaded, tensors, changed)
    with tempfile.TemporaryDirectory(prefix="halve-") as directory:
        _save_settings(loaded, Path(directory), dtype)
        for path in sorted(Path(directory).rglob("*")):
            if path.is_file():
                plan[str(path.relative_to(directory))] = [path.read_bytes()]
    if count > 1:
        weight_map = {tensor.name: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        size = sum(_size(tensor) for tensors in shards for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        plan[INDEX] = [(json.dumps(index, indent=2, sort_keys=True) + "\n").encode()]
    return plan


def _new_shard(
    loaded: LoadedModel, tensors: list[DiskTensor], changed: Collection[str]
) -> Iterator[bytes | memoryview]:
    pruned = {name for parameter in changed for name in loaded.layout.locate(parameter).tensors}
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    yield build_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
    for parameters in loaded.layout.everything():
        for name, tensor in loaded.layout.convert(parameters[:1], dtypes):
            value = tensor.to(dtypes[name])
            yield tensor_bytes(value + 0.0 if name in pruned else value)


def _save_settings(loaded: LoadedModel, directory: Path, dtype: torch.dtype | None) -> None:
    """Save config, generation settings and tokenizer as transformers does, and no trace of how weights are stored."""
    config = deepcopy(loaded.model.config)
    config.architectures = [type(loaded.model).__name__]
    config.dtype = dtype or loaded.model.dtype
    for field in ("quantization_config", "sparsity_config", "compression_config"):
        if hasattr(config, field):
            delattr(config, field)
    config.save_pretrained(directory)
    generation = getattr(loaded.model, "generation_config", None)
    if loaded.model.can_generate() and generation is not None:
        generation.save_pretrained(directory)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(directory)


def _retyped(loaded: LoadedModel, dtype: torch.dtype | None) -> list[DiskTensor]:
    """Return the tensors of the model on disk, the floating-point ones in ``dtype``."""
    return [
        tensor if dtype is None or not tensor.dtype.is_floating_point else replace(tensor, dtype=dtype)
        for tensor in loaded.layout.tensors.values()
    ]


def _split(tensors: list[DiskTensor]) -> list[list[DiskTensor]]:
    """Cut the list where a shard would exceed ``MAX_SHARD``; a tensor larger than that has a shard of its own."""
    shards: list[list[DiskTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + _size(tensor) > MAX_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _size(tensor)
    return shards


def _size(tensor: DiskTensor) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _check_finite(loaded: LoadedModel, changed: Collection[str], dtype: torch.dtype | None) -> None:
    """Refuse values that are not finite in the dtype they are written in."""
    rewriting = loaded.source is not None and bool(loaded.source.shards)
    parameters = dict(loaded.model.named_parameters())
    names = set(changed) if rewriting else {*changed, *parameters}
    for name in sorted(names):
        target = loaded.layout.tensors[loaded.layout.locate(name).tensors[0]].dtype
        value = loaded.model.get_parameter_or_buffer(name)
        if not value.is_floating_point():
            if name not in changed:
                continue
            raise InputError(f"tensor {name!r} is {value.dtype}, not floating-point: it cannot have been pruned")
        if not is_finite(value.to(dtype or target)):
            raise InputError(
                f"tensor {name!r} holds NaN or infinity as {dtype or target}: nothing was written; prune it again or "
                "write another dtype"
            )
        loaded.weights.done_with(value)


def _plain_json(record: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(record), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise InputError(f"the record cannot be written as JSON ({error}): give plain finite values") from error


def refuse_unlike_config(model: "PreTrainedModel") -> None:
    """Refuse a model whose tensors, as ``save_pretrained`` writes them, are not those that its config builds.

    Tied weights count once, buffers where they are saved.

    Raises:
        InputError: a tensor is missing, is one too many, or has another shape.
        UnsupportedModelError: transformers cannot build the config at all, or a parameter cannot be traced to its
            tensors.
    """
    name = type(model).__name__
    try:
        with torch.device("meta"):
            built = build(type(model), deepcopy(model.config))
    except Exception as error:  # a config can provoke any error in there
        raise UnsupportedModelError(
            f"transformers could not build {name} from its config, so that what is written could not be loaded: "
            f"{one_line(error)}"
        ) from error
    ours = {tensor.name: tensor.shape for tensor in DiskLayout(model).tensors.values()}
    theirs = {tensor.name: tensor.shape for tensor in DiskLayout(built).tensors.values()}
    if lacking := [tensor for tensor in theirs if tensor not in ours]:
        what = f"lacks {len(lacking)} of the tensors that its config builds, {first_few(lacking)}"
    elif beyond := [tensor for tensor in ours if tensor not in theirs]:
        what = f"has {len(beyond)} tensors that its config does not build, {first_few(beyond)}"
    elif others := [tensor for tensor, shape in theirs.items() if ours[tensor] != shape]:
        first = others[0]
        what = f"has {first} of shape {ours[first]}, and its config builds shape {theirs[first]}"
    else:
        return
    raise InputError(
        f"the {name} {what}: what is written of it could not be loaded; make its config say what the model is "
        "(num_hidden_layers, vocab_size, ...), or give no output directory"
    )
