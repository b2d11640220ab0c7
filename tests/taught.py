"""Small pruned checkpoints with the dense model beside them, training text, and a quick training."""

import json
import random
from pathlib import Path

import torch

import halve
from packed_models import pruned
from tiny_tokenizers import SENTENCES

QUICK = {
    "tokens": 1024,
    "seq_len": 32,
    "batch_tokens": 256,
    "forward_tokens": 128,
    "held_out": 128,
    "learning_rate": 1e-3,
    "evaluations": 2,
    "forward_dtype": "float32",
}
"""Four steps, looked at after the second and the last."""


def words(count, seed):
    return " ".join(random.Random(seed).choices(" ".join(SENTENCES).split(), k=count))


def write_text(path: Path, documents=40, length=40, seed=0) -> Path:
    """Write documents of random words of `SENTENCES` as .jsonl."""
    lines = [json.dumps({"text": words(length, 1000 * seed + index)}) for index in range(documents)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def make_pruned(folder: Path, family="llama", dtype=torch.float32, **options) -> Path:
    """Return a tiny checkpoint at 2:4; the dense one is ``dense`` beside it, and ``text.jsonl`` is text for both."""
    found = pruned(folder, family, dtype, **options)
    write_text(folder / "text.jsonl")
    return found


def teach(checkpoint: Path, out: Path, **options):
    """Fine-tune for a few steps."""
    return halve.finetune(checkpoint, out, **{"data": checkpoint.parent / "text.jsonl", **QUICK, **options})
