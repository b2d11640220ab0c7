"""How fast a model writes its own calibration text, beside the time of its matrix products alone.

    python bench/generation.py MODEL [--batch 32 64 128] [--seq-len 64] [--dtype auto] [--rounds 3] [--threads N]

Both do the same products: every linear layer of the model, its output head included, once for each token, on as many
rows as texts are written at once, in the same dtype. What is written and what is only multiplied take turns, so that a
busy machine slows both, and medians are compared. The ratio says what everything else costs: attention, norms, the
draw, and Python.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from halve.checkpoint.load import load_model
from halve.device import forward_precision, model_device
from halve.model.layers import is_linear, layer_matrix
from halve.text import generation


def products(model: nn.Module, rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return an input and the weight of every linear layer, in their order."""
    inputs: dict[int, Tensor] = {}
    found = []
    for layer in model.modules():
        if is_linear(layer):
            weight = layer_matrix(layer).to(dtype)
            width = weight.shape[1]
            if width not in inputs:
                inputs[width] = torch.randn(rows, width, device=weight.device).to(dtype)
            found.append((inputs[width], weight))
    return found


def multiply(pairs: list[tuple[Tensor, Tensor]], times: int) -> float:
    """Return the seconds of all products, so many times."""
    begin = time.perf_counter()
    with torch.no_grad():
        for _ in range(times):
            for x, weight in pairs:
                linear(x, weight)
    return time.perf_counter() - begin


def write(model: nn.Module, rows: int, seq_len: int, dtype: torch.dtype) -> float:
    """Return the seconds in which so many texts are written at once."""
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    first, generator = torch.ones(rows, 1, dtype=torch.int64), torch.Generator().manual_seed(0)
    with patch.object(generation, "compute_dtype", lambda _device: dtype), patch.object(generation, "_BATCH", rows):
        begin = time.perf_counter()
        generation.sample_text(model, first, seq_len, vocabulary, generator)
        return time.perf_counter() - begin


def main() -> None:
    """Measure, and print a line for each size of a batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64, 128], help="texts written at once")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens in each")
    parser.add_argument("--dtype", default="auto", help="of the products: auto, float32 or bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(options.model).model
    dtype = forward_precision(options.dtype, model_device(model))
    load = os.getloadavg()[0]
    print(
        f"{options.model.name}, {dtype}, {torch.get_num_threads()} threads, load {load:.1f}, {options.seq_len} tokens"
    )
    for rows in options.batch:
        pairs, steps = products(model, rows, dtype), options.seq_len - 1
        write(model, rows, 4, dtype)
        multiply(pairs, 2)
        times = [(write(model, rows, options.seq_len, dtype), multiply(pairs, steps)) for _ in range(options.rounds)]
        whole, alone = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"batch {rows}: {rows * steps / whole:.0f} tokens a second, products alone {rows * steps / alone:.0f}, "
            f"ratio {whole / alone:.2f} ({', '.join(f'{a / b:.2f}' for a, b in times)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
