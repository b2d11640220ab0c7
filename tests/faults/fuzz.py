"""Mutated files for Halve's own readers: each is read, or refused with one of Halve's errors; nothing else happens.

    python tests/faults/fuzz.py --inputs 1000000

What `halve.checkpoint.shards.read_shard` accepts, the safetensors library must accept too: an independent reading of
the format.
"""

import argparse
import json
import random
import struct
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from halve.checkpoint.shards import read_json, read_shard
from halve.checkpoint.weight_files import read_weights
from halve.errors import HalveError
from halve.packed import manifest as packing
from halve.report.facts import read_run
from halve.run.manifest import hash_of, read_manifest

TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"-1",
    b"0",
    b"4",
    b"8",
    b"1e9",
    b"null",
    b"true",
    b"NaN",
    b"\\u0000",
    b"F32",
    b"BF16",
    b"F8_E4M3",
    b"dtype",
    b"shape",
    b"data_offsets",
    b"__metadata__",
    b"weight_map",
    b"../",
    b"18446744073709551616",
    b"\xff",
    b"\x00",
    b'"a"',
    b"model.safetensors",
)


def shard() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        "c": {"dtype": "I64", "shape": [0, 4], "data_offsets": [22, 22]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(22)


def manifest() -> bytes:
    content = {
        "format": 3,
        "fingerprint": {"a": "b"},
        "call": {"model": "m"},
        "fallback": None,
        "tokens": None,
        "blocks": [["block-00000.safetensors", "0" * 64]],
        "files": None,
    }
    return json.dumps(content).encode()


def record() -> bytes:
    facts = {"relative_loss": 0.1, "tokens": 64.0, "iterations": 7.0}
    matrix = {"name": "model.layers.0.q.weight", "tensors": ["q"], "shape": [4, 8], "layout": "out_in", "status": "ok"}
    matrix |= {"method": "wanda", "reason": "", "facts": facts, "kept_per_group": [1, 2, 3]}
    content = {
        "format": 1,
        "source": {"kind": "directory", "name": "m", "revision": None},
        "pattern": "2:4",
        "method": "wanda",
        "refit": "cg",
        "options": {"damping": 0.01},
        "skip": ["x"],
        "fallback": None,
        "min_expert_tokens": 32,
        "reconstruction": None,
        "objective": {"shrinkage": "auto", "match_dense": 0.25, "match_ridge": 0.1},
        "only_where_faster": {"factor": 1.1, "batch": 1, "ratios": {"4x8": 2.0}},
        "keep_dense": {"amount": "10%", "tokens": 512, "kept": {"a": 0.1}, "pruned": {"b": 0.01}},
        "calibration": {"source": "c4", "seq_len": 16},
        "device": "cpu",
        "forward_dtype": "float32",
        "mean_relative_loss": 0.1,
        "matrices": [matrix],
        "blocks": [{"name": "b", "error_before": 0.2, "error_after": 0.1, "epoch": 1, "tensors": ["n"]}],
        "excluded": [{"name": "h", "shape": [8, 8], "reason": "outside the blocks"}],
        "warnings": ["w"],
        "environment": {"torch": "2.13.0", "threads": 2},
        "files": {"model.safetensors": "0" * 64},
    }
    return json.dumps(content).encode()


def packed() -> bytes:
    content = {
        "format": "halve-packed",
        "version": 1,
        "halve": "0.1.0",
        "matrices": {"a": {"pattern": "2:4", "shape": [8, 16], "dtype": "BF16", "layout": "out_in"}},
        "left_dense": {"b": "a reason"},
        "shards": [
            {"name": "m.safetensors", "packed": "packed.safetensors", "size": 8, "sha256": "0" * 64, "header": "{}"}
        ],
        "index": {"text": "{}", "sha256": "0" * 64},
        "files": {"packed.safetensors": {"size": 8, "sha256": "0" * 64}},
    }
    return json.dumps(content).encode()


def sealed(content: bytes) -> bytes:
    """Give a manifest the hash of what it says, if it says anything: else the hash alone would refuse all of them."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return json.dumps({"sha256": hash_of(value), "content": value}).encode()


SEEDS = {
    "shard": shard(),
    "json": b'{"architectures": ["LlamaForCausalLM"], "text_config": {"a": [1, 2.5, null, "x"]}}',
    "index": b'{"metadata": {"total_size": 8}, "weight_map": {"a": "m.safetensors", "b": "m.safetensors"}}',
    "manifest": manifest(),
    "record": record(),
    "packed": packed(),
}


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Flip, cut, repeat, or put in tokens that mean something, a few times."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0 if data:
                data[min(place, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                data[place:place] = chance.choice(TOKENS)
            case 2:
                del data[place : place + chance.randint(1, 8)]
            case 3:
                end = place + chance.randint(1, 24)
                data[place:place] = data[place:end]
            case 4:
                token = chance.choice(TOKENS)
                data[place : place + len(token)] = token
            case _:
                if len(data) >= 8 and chance.random() < 0.3:
                    data[:8] = struct.pack(
                        "<Q", chance.choice((0, 1, len(data), len(data) - 8, 1 << 40, (1 << 64) - 1))
                    )
    if (
        content[:1] != b"{" and chance.random() < 0.7 and len(data) > 30
    ):  # a length that fits, so that the header counts
        data[:8] = struct.pack("<Q", max(0, len(data) - 8 - 22))
    return bytes(data)


def read(kind: str, path: Path) -> None:
    if kind == "shard":
        read_shard(path)
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                file.get_tensor(name)
    elif kind == "json":
        read_json(path)
    elif kind == "index":
        read_weights(path.parent)
    elif kind == "record":
        read_run(path.parent)
    elif kind == "packed":
        packing.read_manifest(path)
    else:
        read_manifest(path)


def fuzz(inputs: int, seed: int = 0) -> Counter[str]:
    """Read ``inputs`` mutated files and count what came of them.

    Raises:
        AssertionError: a reader raised something else than one of Halve's errors; the input is in the message.
    """
    chance = random.Random(seed)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:  # noqa: S108
        folder = Path(name)
        (folder / "m.safetensors").write_bytes(SEEDS["shard"])
        (folder / "run").mkdir()
        names = {"shard": "x.safetensors", "index": "model.safetensors.index.json", "record": "run/halve.json"}
        for number in range(inputs):
            kind = chance.choice(list(SEEDS))
            content = mutate(SEEDS[kind], chance)
            content = sealed(content) if kind == "manifest" else content
            path = folder / names.get(kind, "x.json")
            path.write_bytes(content)
            try:
                read(kind, path)
                found[f"{kind} accepted"] += 1
            except HalveError:
                found[f"{kind} refused"] += 1
            except (SafetensorError, Exception) as error:
                raise AssertionError(f"input {number} of seed {seed} ({kind}): {error!r}: {content!r}") from error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    found = fuzz(arguments.inputs, arguments.seed)
    print(f"{sum(found.values())} inputs in {time.perf_counter() - begun:.0f} s: {dict(sorted(found.items()))}")  # noqa: T201


if __name__ == "__main__":
    main()
