"""What the wind tunnel needs, in one folder: the dense model, text that it wrote, and its local solutions."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import halve
from halve.device import model_device
from halve.text.generation import sample_text
from wind_tunnel_cells import MODEL, PATTERN, SPARED, STARTS, TRAIN

PART = 4096
"""Sequences that are written at once, and kept, so that writing goes on where it was stopped."""
AT_ONCE = {"cpu": 1024, "cuda": PART}
"""Sequences in one batch, by device."""
JUDGES = {"held_out": 64, "evaluation": 256}
"""Sequences that nothing is trained on: for learning rates and curves, and for the figures themselves."""
BEGIN = 1
"""What every sequence begins with: BOS."""
LOCAL: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "refit": "none"},
    "wanda": {"method": "wanda", "refit": "none"},
    "auto": {"method": "auto"},
    "auto+block": {"method": "auto", "effort": "best", "reconstruct": "block", "time_limit": 120.0},
}
"""The local solutions, as `halve.prune` is asked for them."""


def prepare(model: Path, folder: Path, tokens: int, seq_len: int, samples: int, device: str) -> None:
    """Write what is not there yet.

    Args:
        model: directory of a checkpoint of a Llama without a tokenizer.
        folder: to write into.
        tokens: to train on; 0 writes everything but the text for training.
        seq_len: tokens in a sequence.
        samples: sequences that the local solutions are calibrated on, of a text of their own.
        device: that the text is written on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / MODEL
    if not home.exists():
        home.mkdir()
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(model / name, home / name)
    dense = load_dense(folder).to(device)
    if not (folder / SPARED).exists():
        sizes = {"calibration": samples, **JUDGES}
        names = list(sizes)
        parts = torch.split(write(dense, (sum(sizes.values()), seq_len), seed=0), [sizes[name] for name in names])
        save_file({name: part.contiguous() for name, part in zip(names, parts, strict=True)}, folder / SPARED)
    for name in LOCAL:
        add_start(folder, name)
    write_train(dense, folder, (-(-tokens // seq_len), seq_len))


def load_dense(folder: Path) -> nn.Module:
    """Load the dense model, float32."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=torch.float32)
    return model.eval()


def write(dense: nn.Module, shape: tuple[int, int], seed: int) -> Tensor:
    """Let the model write sequences, int16 of a shape (sequences, seq_len)."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = dense.get_input_embeddings().num_embeddings  # type: ignore[operator]
    began = time.monotonic()
    first = torch.full((shape[0], 1), BEGIN)
    ids = sample_text(dense, first, shape[1], vocabulary, generator, batch=AT_ONCE[model_device(dense).type])
    print(f"{ids.numel()} tokens of text, {ids.numel() / (time.monotonic() - began):.0f} a second", flush=True)
    return ids.to(torch.int16)


def write_train(dense: nn.Module, folder: Path, shape: tuple[int, int]) -> None:
    """Write the text for training, in parts that are kept until all are there; what is there is lengthened."""
    path = folder / TRAIN
    have = load_file(path)["ids"] if path.exists() else torch.zeros(0, shape[1], dtype=torch.int16)
    while len(have) < shape[0]:
        number, done = divmod(len(have), PART)
        part = write(dense, (min(PART, shape[0] - number * PART), shape[1]), seed=1 + number)[done:]
        have = torch.cat((have, part))
        save_file({"ids": have}, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)


def add_start(folder: Path, name: str) -> None:
    """Prune the model, and keep the tensors that differ from the dense model's."""
    path = folder / STARTS / f"{name}.safetensors"
    if path.exists():
        return
    began = time.monotonic()
    model = load_dense(folder)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batches = [{"input_ids": part.long()} for part in torch.split(load_file(folder / SPARED)["calibration"], 16)]
    options = {"pattern": str(PATTERN), "device": "cpu", "forward_dtype": "float32", **LOCAL[name]}
    halve.prune(model, calibration=batches, **options)
    changed = {key: value.detach() for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    path.parent.mkdir(exist_ok=True)
    save_file(changed, path)
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
