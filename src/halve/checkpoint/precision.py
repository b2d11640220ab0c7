"""In which dtype a checkpoint's weights are on disk, in which transformers loads them, and in which they are pruned.

The three may differ: many a checkpoint holds float32 and has ``"dtype": "bfloat16"`` in its config. What is written
keeps the dtypes on disk, so it must be computed from all their bits; what the config names is what people run.
"""

from collections import Counter

import torch

from halve.checkpoint.directory import CONFIG
from halve.checkpoint.load import Source
from halve.checkpoint.quantised import is_plain
from halve.checkpoint.shards import read_json, read_shard


def dtype_on_disk(source: Source) -> torch.dtype | None:
    """Return the floating dtype that most of the weights on disk have; None where there are none (a GGUF file)."""
    counts = Counter[torch.dtype]()
    for path in source.shards:
        for entry in read_shard(path).tensors:
            if is_plain(entry.dtype):
                counts[entry.dtype] += torch.Size(entry.shape).numel()
    return counts.most_common(1)[0][0] if counts else None


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
        torch.dtype | None: the one in the config if it holds all values of the one that most weights on disk have, else
            the smallest that holds both; None leaves it to `load_model`.
    """
    stored, named = dtype_on_disk(source), dtype_in_config(source)
    if stored is None or named is None or not is_plain(named):
        return stored
    return torch.promote_types(stored, named)


def differing_dtypes(source: Source) -> str:
    """Say that a checkpoint is on disk in another dtype than its config names; empty where it is not."""
    stored, named = dtype_on_disk(source), dtype_in_config(source)
    if stored is None or named is None or stored == named:
        return ""
    stored_name, named_name = (str(dtype).removeprefix("torch.") for dtype in (stored, named))
    return (
        f"the weights are {stored_name} on disk and {CONFIG} names {named_name}: they are pruned and written in "
        f"{stored_name}, and transformers loads them in {named_name} unless it is told otherwise"
    )
