"""Models larger than memory: what pruning one takes, against what was foreseen, and against reading its bytes once.

    python bench/large_model.py make llama-8b --shape 8b
    python bench/large_model.py prune llama-8b out --method wanda --refit none --samples 2 --seq-len 256 --kill 16
    python bench/large_model.py limit llama-8b --gigabytes 8

``make`` writes a Llama of random bfloat16 weights, a shard for each block. ``prune`` prunes it in a process of its own
with its weights on disk, and tells the most memory that the process had, as the kernel counted it, and the time, beside
those foreseen, and beside the time of reading and writing its bytes once. With ``--kill`` the process is killed when
that block has been kept, and the run goes on in another one. ``limit`` prunes under a limit of the memory that a
process may hold for itself (``RLIMIT_DATA``; pages of mapped files do not count), streamed and in memory.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from halve.checkpoint.durable import write_file
from halve.checkpoint.shards import CHUNK, file_of
from halve.forecast.foreseen import foresee
from halve.run.request import Request

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 22,
        "vocab_size": 32000,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 256,
    },
}
_CHILD = """
import json, sys, time
import torch
import halve

source, out, options, samples, seq_len, kill = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
generator = torch.Generator().manual_seed(0)
vocabulary = json.load(open(source + "/config.json"))["vocab_size"]
ids = torch.randint(3, vocabulary, (samples, seq_len), generator=generator)

def listen(step):
    if kill is not None and step.phase == "collect" and step.block == kill:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

begun = time.perf_counter()
pruned = halve.prune(source, out, calibration=ids, listen=listen, **options)
print(json.dumps({"wall": time.perf_counter() - begun, "seconds": pruned.report.seconds,
                  "memory": pruned.report.peak_memory}))
"""


def make(place: Path, shape: dict[str, Any]) -> int:
    """Write a Llama of a shape, random, in bfloat16, and return the bytes of its weights."""
    config = LlamaConfig(**shape, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts = name.split(".")
        shards.setdefault(f"block-{int(parts[2]):03d}" if parts[1] == "layers" else "outside", []).append(name)
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    pool = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    written = 0
    index: dict[str, str] = {}
    for number, (shard, names) in enumerate(sorted(shards.items())):
        tensors = {name: _random(name, sizes[name], pool, number) for name in names}
        write_file(place / f"{shard}.safetensors", file_of(tensors), "shard")
        written += sum(tensor.nbytes for tensor in tensors.values())
        index |= dict.fromkeys(names, f"{shard}.safetensors")
    content = {"metadata": {"total_size": written}, "weight_map": index}
    (place / "model.safetensors.index.json").write_text(json.dumps(content))
    return written


def _random(name: str, shape: torch.Size, pool: Tensor, seed: int) -> Tensor:
    """Return random weights: a part of the pool, another one for each shard, several times over where it is short."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    start = (seed * 7_654_321 + len(name) * 1_234_567) % (len(pool) // 2)
    part = pool[start:]
    return part.repeat(-(-shape.numel() // len(part)))[: shape.numel()].reshape(shape)


def in_a_process(source: Path, out: Path, options: dict[str, Any], tokens: tuple[int, int], kill: int | None) -> Any:
    """Prune in a process of its own; return what it printed and its peak of memory in bytes, None if it was killed."""
    command = [sys.executable, "-c", _CHILD, str(source), str(out), json.dumps(options), *map(str, tokens)]
    with tempfile.TemporaryFile("w+") as printed_to:
        child = subprocess.Popen([*command, json.dumps(kill)], stdout=printed_to)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        printed_to.seek(0)
        printed = printed_to.read()
    if child.returncode == -9:
        return None
    if child.returncode:
        raise SystemExit("the run failed")
    return json.loads(printed.splitlines()[-1]) | {"peak": used.ru_maxrss * 1024}


def once(files: list[Path], place: Path) -> float:
    """Return the seconds that reading the files and writing them once takes, flushed, the system having forgotten."""
    begun = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        write_file(place / path.name, _chunks(path), "copy")
        (place / path.name).unlink()
    return time.perf_counter() - begun


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def prune(source: Path, out: Path, options: dict[str, Any], tokens: tuple[int, int], kill: int | None) -> Any:
    """Prune, and print what it took beside what was foreseen; return both."""
    asked = {**options, "samples": tokens[0], "seq_len": tokens[1], "calibration": "c4", "device": "cpu"}
    foreseen = foresee(source, out, Request.of(asked))
    took = None
    if kill is not None:
        begun = time.perf_counter()
        if in_a_process(source, out, options, tokens, kill) is not None:
            raise SystemExit(f"block {kill} was never reached: give a smaller number")
        print(f"killed at block {kill} after {time.perf_counter() - begun:.0f} s", flush=True)
    took = in_a_process(source, out, options, tokens, None)
    memory, seconds = sum(foreseen.needs.memory.values()), sum(foreseen.seconds.values())
    files = sorted(source.glob("*.safetensors"))
    folder = out.parent / f"{out.name}-copied"
    folder.mkdir()
    copied = once(files, folder)
    shutil.rmtree(folder)
    print(f"{source.name}: {sum(path.stat().st_size for path in files) / 1e9:.2f} GB, {options}, tokens {tokens}")
    print(
        f"memory: foreseen {memory / 1e9:.2f} GB, most {took['peak'] / 1e9:.2f} GB, ratio {memory / took['peak']:.2f}"
    )
    print(f"time: foreseen {seconds:.0f} s, took {took['wall']:.0f} s, ratio {seconds / took['wall']:.2f}")
    print(f"reading and writing its bytes once: {copied:.0f} s, the run {took['wall'] / copied:.1f} times that")
    for phase, value in took["seconds"].items():
        held = took["memory"].get(phase, 0) / 1e9
        print(f"  {phase:12} {value:8.1f} s, foreseen {foreseen.seconds.get(phase, 0.0):8.1f} s, most {held:6.2f} GB")
    return {"foreseen": dict(foreseen.seconds), "memory": dict(foreseen.needs.memory), **took}


def limit(source: Path, out: Path, gigabytes: float, tokens: tuple[int, int]) -> dict[str, bool]:
    """Prune by wanda under a limit of memory, from disk and in memory; return which of them came to their end."""
    done: dict[str, bool] = {}
    for stream in ("always", "never"):
        options = json.dumps({"method": "wanda", "refit": "none", "stream": stream, "device": "cpu"})
        command = [sys.executable, "-c", _CHILD, str(source), str(out / stream), options, *map(str, tokens), "null"]
        most = int(gigabytes * 1e9)
        found = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),  # noqa: B023
            check=False,
        )
        done[stream] = found.returncode == 0
        told = "ended well" if done[stream] else f"stopped: {found.stderr.strip().splitlines()[-1]}"
        print(f"stream {stream} under {gigabytes} GB: {told}", flush=True)
        shutil.rmtree(out / stream, ignore_errors=True)
    return done


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a model")
    making.add_argument("place", type=Path)
    making.add_argument("--shape", choices=SHAPES, default="8b")
    making.add_argument("--blocks", type=int, help="fewer blocks than the shape has")
    pruning = commands.add_parser("prune", help="prune it, and compare with what was foreseen")
    pruning.add_argument("source", type=Path)
    pruning.add_argument("out", type=Path)
    pruning.add_argument("--method", default="auto")
    pruning.add_argument("--refit", default="cg")
    pruning.add_argument("--effort")
    pruning.add_argument("--stream", default="always")
    pruning.add_argument("--kill", type=int, help="kill the first process at this block, counted from 0")
    limiting = commands.add_parser("limit", help="prune it under a limit of memory")
    limiting.add_argument("source", type=Path)
    limiting.add_argument("out", type=Path)
    limiting.add_argument("--gigabytes", type=float, default=8.0)
    for each in (pruning, limiting):
        each.add_argument("--samples", type=int, default=2)
        each.add_argument("--seq-len", type=int, default=256)
    given = parser.parse_args()
    if given.command == "make":
        shape = SHAPES[given.shape] | ({"num_hidden_layers": given.blocks} if given.blocks else {})
        print(f"{make(given.place, shape) / 1e9:.2f} GB of weights in {given.place}")
    elif given.command == "prune":
        options = {"method": given.method, "refit": given.refit, "stream": given.stream, "device": "cpu"}
        options |= {"effort": given.effort} if given.effort else {}
        prune(given.source, given.out, options, (given.samples, given.seq_len), given.kill)
    else:
        limit(given.source, given.out, given.gigabytes, (given.samples, given.seq_len))


if __name__ == "__main__":
    main()
