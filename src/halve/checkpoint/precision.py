"""In which dtype a checkpoint's weights are on disk, in which transformers loads them, and in which they are pruned.

The three may differ: many a checkpoint holds float32 and has ``"dtype": "bfloat16"`` in its config. What is written
keeps the dtypes on disk, so it must be computed from all their bits; what the config names is what people run.
"""

from collections import Counter
from functools import reduce

import torch
from torch import Tensor

from halve.checkpoint.directory import CONFIG
from halve.checkpoint.load import Source
from halve.checkpoint.quantised import is_plain
from halve.checkpoint.shards import read_json, read_shard

_SHARE = 0.1
"""Of the weights on disk that a dtype must have to count: routers and norms in float32 do not make a model one."""


def dtypes_on_disk(source: Source) -> tuple[torch.dtype, ...]:
    """Return the floating dtypes that a tenth or more of the weights on disk have, the most used first.

    None of a GGUF file is counted.
    """
    counts = Counter[torch.dtype]()
    for path in source.shards:
        for entry in read_shard(path).tensors:
            if is_plain(entry.dtype):
                counts[entry.dtype] += torch.Size(entry.shape).numel()
    return tuple(dtype for dtype, count in counts.most_common() if count >= _SHARE * counts.total())


def dtype_in_config(source: Source) -> torch.dtype | None:
    """Return the dtype that ``config.json`` names, in which transformers loads the model; None where it names none."""
    if source.kind == "gguf":
        return None
    config = read_json(source.path / CONFIG)
    found = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    return found if isinstance(found, torch.dtype) else None


def dtype_to_prune_in(source: Source) -> torch.dtype | None:
    """Return the dtype to load a model in so that the weights on disk are exact in it.

    Returns:
        torch.dtype | None: the smallest that holds all values of those on disk, and of the one in the config; None
            leaves it to `load_model`.
    """
    named = dtype_in_config(source)
    found = dtypes_on_disk(source)
    if found and named is not None and is_plain(named):
        found = (*found, named)
    return reduce(torch.promote_types, found) if found else None


def bytes_in_memory(source: Source) -> int:
    """Return the size of a checkpoint's weights, loaded in `dtype_to_prune_in`; of a GGUF file 0."""
    dtype = dtype_to_prune_in(source)
    size = 0
    for path in source.shards:
        for entry in read_shard(path).tensors:
            held = dtype if dtype is not None and is_plain(entry.dtype) else entry.dtype
            size += torch.Size(entry.shape).numel() * held.itemsize
    return size


def bytes_in(parameter: Tensor, dtype: torch.dtype | None) -> int:
    """Return the size of a parameter once it is loaded in a dtype; None is its own."""
    held = dtype if dtype is not None and is_plain(parameter.dtype) else parameter.dtype
    return parameter.numel() * held.itemsize


def differing_dtypes(source: Source) -> str:
    """Say that a checkpoint is on disk in another dtype than its config names; empty where it is not."""
    stored, named = dtypes_on_disk(source), dtype_in_config(source)
    if not stored or named is None or stored == (named,):
        return ""
    on_disk = " and ".join(_name(dtype) for dtype in stored)
    return (
        f"the weights are {on_disk} on disk and {CONFIG} names {_name(named)}: they are pruned in "
        f"{_name(dtype_to_prune_in(source))} and written as they are on disk, and transformers loads them in "
        f"{_name(named)} unless it is told otherwise"
    )


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
