"""How fast a model generates text, dense and packed: tokens a second, time to the first, resident memory.

    python bench/decode.py [MODEL] [--shape 1b] [--threads N ...] [--prompt 128] [--new 32] [--rounds N] [--json PATH]

MODEL is a checkpoint pruned to 2:4; without one a Llama of random weights, projected to 2:4, takes its place, in one of
`SHAPES`. Both models are in one process and take turns, the dense one in the same dtype, and medians are reported. The
packed one is `halve.accelerate`d; how long both write the same text says little where tokens are nearly tied. Resident
memory needs processes of their own: each loads its checkpoint from the disk, the packed one by `halve.load`, generates
once, and says what it takes, beside what a process takes that has only imported the libraries.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import halve
from halve.model.layers import is_linear, layer_matrix
from halve.model.stacks import find_stack
from halve.runtime.linear import SparseLinear

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {  # TinyLlama's, 1.1B parameters
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "1b-large-vocabulary": {  # Llama 3.2's, 1.2B parameters, a fifth of them in the head
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}


def random_model(shape: str, dtype: torch.dtype) -> Any:
    """Return a Llama of random weights, its blocks' matrices at 2:4."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=2048))
    model = model.to(dtype)
    model.to_empty(device="cpu")
    model.init_weights()
    reset_buffers(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _, blocks = find_stack(model)
    for block in blocks:
        for layer in block.modules():
            if is_linear(layer):
                matrix = layer_matrix(layer)
                rows = torch.randn(64, matrix.shape[1], generator=generator) / matrix.shape[1] ** 0.5
                rows = halve.Pattern("2:4").project(rows).to(dtype)
                matrix.copy_(rows.repeat(-(-len(matrix) // 64), 1)[: len(matrix)])
    return model.eval()


def reset_buffers(model: Any) -> None:
    """Compute anew what is no parameter: the frequencies of the rotary embedding."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.__init__(model.config)


class Watch:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.moments = [time.perf_counter()]
        self._prompt_seen = False

    def put(self, _value: Any) -> None:
        if self._prompt_seen:
            self.moments.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Do nothing: transformers calls it."""


def generate(model: Any, prompt: Tensor, new: int) -> tuple[Tensor, float, float]:
    """Return the tokens, the seconds to the first, and the tokens a second from there on."""
    watch = Watch()
    ids = model.generate(
        prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=watch, pad_token_id=0
    )
    return ids, watch.moments[1] - watch.moments[0], (new - 1) / (watch.moments[-1] - watch.moments[1])


def turns(models: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return medians by model: seconds to the first token, tokens a second."""
    prompt = torch.randint(3, 10000, (1, options.prompt), generator=torch.Generator().manual_seed(1))
    prompt %= next(iter(models.values())).config.vocab_size
    first: dict[str, list[float]] = {name: [] for name in models}
    rate: dict[str, list[float]] = {name: [] for name in models}
    texts = {}
    for number in range(options.rounds + 1):
        for name, model in models.items():
            texts[name], seconds, speed = generate(model, prompt, options.new)
            if number:
                first[name].append(seconds)
                rate[name].append(speed)
    dense, packed = (texts[name][0, options.prompt :] for name in ("dense", "packed"))
    same = int((dense == packed).long().cumprod(0).sum())
    print(f"{same} of the first {options.new} tokens are the same", flush=True)
    return {
        name: {
            "first_seconds": statistics.median(first[name]),
            "tokens_per_second": statistics.median(rate[name]),
        }
        for name in models
    }


def resident(directory: Path, kind: str, options: argparse.Namespace) -> float:
    """Return the resident memory, in MB, of a process that has loaded a checkpoint and generated a few tokens."""
    command = [sys.executable, __file__, str(directory), "--resident", kind, "--prompt", str(options.prompt)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def say_resident(directory: str, kind: str, prompt: int) -> None:
    import psutil

    if kind != "nothing":
        model = halve.load(directory).model
        assert any(isinstance(layer, SparseLinear) for layer in model.modules()) == (kind == "packed")  # noqa: S101
        generate(model, torch.full((1, prompt), 3), 4)
    print(psutil.Process().memory_info().rss / 1e6)


def memory(source: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return sizes on the disk and resident, dense and packed."""
    with tempfile.TemporaryDirectory(prefix="halve-bench-") as folder:
        dense, packed = Path(folder) / "dense", Path(folder) / "packed"
        if isinstance(source, str):
            dense = Path(source)
        else:
            source.save_pretrained(dense)
        halve.pack(dense, packed, pattern="2:4")
        places = {"dense": dense, "packed": packed, "nothing": dense}
        return {
            "megabytes_on_disk": {
                name: sum(path.stat().st_size for path in place.glob("*.safetensors")) / 1e6
                for name, place in places.items()
                if name != "nothing"
            },
            "megabytes_resident": {name: resident(place, name, options) for name, place in places.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint at 2:4")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--dtype", default="bfloat16", help="of a model of random weights")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="leave resident memory out")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--resident", choices=["dense", "packed", "nothing"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident:
        say_resident(options.model, options.resident, options.prompt)
        return
    if options.model:
        dense: Any = halve.load(options.model).model
    else:
        dense = random_model(options.shape, getattr(torch, options.dtype))
    packed = deepcopy(dense)
    done = halve.accelerate(packed, only_where_faster=None)
    name = options.model or options.shape
    print(f"{name}: {sum(p.numel() for p in dense.parameters()) / 1e6:.0f}M parameters in {dense.dtype}")
    print(f"{done.kernel}; {len(done.swapped)} layers packed, {done.bytes_after / done.bytes_before:.3f} of their size")
    print(f"logits on a probe differ by {done.difference:.2g} of their norm")
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        found = turns({"dense": dense, "packed": packed}, options)
        rows.append({"threads": threads, **found})
        for kind, numbers in found.items():
            print(
                f"{threads} threads, {kind:>6}: {numbers['tokens_per_second']:.2f} tokens/s, "
                f"first of {options.prompt} after {numbers['first_seconds']:.2f} s"
            )
        rate = found["packed"]["tokens_per_second"] / found["dense"]["tokens_per_second"]
        first = found["dense"]["first_seconds"] / found["packed"]["first_seconds"]
        print(f"{threads} threads: decodes {rate:.2f} times as fast, first token {first:.2f} times", flush=True)
    facts = {
        "model": name,
        "dtype": str(dense.dtype),
        "kernel": done.kernel,
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "size_of_layers": done.bytes_after / done.bytes_before,
        "output_difference": done.difference,
        "rows": rows,
    }
    if not options.no_memory:
        facts |= memory(options.model or dense, options)
        print(json.dumps({key: facts[key] for key in ("megabytes_on_disk", "megabytes_resident")}))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
