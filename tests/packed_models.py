"""Tiny checkpoints, pruned and packed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from halve.maths.pattern import Pattern
from halve.model.layers import is_linear, layer_matrix
from halve.packed.write import pack_checkpoint
from halve.pruning import prune
from models import decoder, save
from tiny_tokenizers import byte_bpe


def pruned(path: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Return a tiny checkpoint at 2:4 with a tokenizer; ``options`` are those of ``save_pretrained``."""
    dense = save(decoder(family, vocab_size=320).to(dtype), path / "dense", **options)
    byte_bpe().save_pretrained(dense)
    prune(dense, path / "plain", method="magnitude", refit="none")
    return path / "plain"


def packed(path: Path, family: str = "llama", **options: Any) -> Path:
    """Return the same, packed; the plain one lies beside it."""
    return pack_checkpoint(pruned(path, family, **options), path / "packed").out


def sums(directory: Path) -> dict[str, str]:
    """Return the sha256 of every file below a directory, by its name there."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edit_tensor(path: Path, name: str, change: Any) -> None:
    """Replace one tensor of a safetensors file by ``change`` of it, None to remove it."""
    tensors = load_file(path)
    tensor = tensors.pop(name)
    changed = change(tensor)
    save_file(tensors if changed is None else tensors | {name: changed.contiguous()}, path, {"format": "pt"})


def prune_layers(model: Any, pattern: str = "2:4") -> Any:
    """Bring the layers of a model into the pattern, but for its head."""
    with torch.no_grad():
        for name, layer in model.named_modules():
            if is_linear(layer) and "head" not in name:
                layer_matrix(layer).copy_(Pattern(pattern).project(layer_matrix(layer)))
    return model.requires_grad_(False)


def record_again(directory: Path) -> None:
    """Make the record of a plain checkpoint, if it has one, agree with the files as they are now."""
    path = directory / "halve.json"
    if path.exists():
        record, now = json.loads(path.read_text()), sums(directory)
        path.write_text(json.dumps(record | {"files": {name: now[name] for name in record["files"]}}))
