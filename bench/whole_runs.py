"""A whole run as a user would make it, against llm-compressor's ``oneshot``: time, memory and perplexity.

    python -m venv DIR
    DIR/bin/pip install torch==2.13.0  # the CPU build, if models are to be pruned on a CPU
    DIR/bin/pip install llmcompressor
    python bench/whole_runs.py MODEL --environment DIR --calibration c4.jsonl --data c4-validation.jsonl

Both prune the same checkpoint to 2:4 on the same token ids, with as many threads, in processes of their own that take
turns; llm-compressor goes block after block (``pipeline="sequential"``) and writes an uncompressed checkpoint. The time
is that of the whole process, from its start to the checkpoint on disk; the memory is the most that the kernel counted
for it. Perplexity is measured by `halve.evaluate` for both. Of ours the seconds of every phase are told too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import halve
from halve.checkpoint.load import load_model, resolve
from halve.text.calibration import Calibration
from halve.text.tokens import TokenSet

_OURS = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
import halve

model, ids, out, options = sys.argv[1], load_file(sys.argv[2])["ids"], sys.argv[3], json.loads(sys.argv[4])
halve.prune(model, out, calibration=ids, **options)
"""
_THEIRS = """
import json, sys
from datasets import Dataset
from safetensors.torch import load_file
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

model, ids, out, options = sys.argv[1], load_file(sys.argv[2])["ids"], sys.argv[3], json.loads(sys.argv[4])
kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[options["method"]]
rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
oneshot(
    model=model,
    dataset=Dataset.from_list(rows),
    recipe=kind(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]),
    max_seq_length=ids.shape[1],
    num_calibration_samples=len(ids),
    shuffle_calibration_samples=False,
    pipeline="sequential",
    output_dir=out,
    save_compressed=False,
)
"""
WAYS = {
    "llm-compressor sparsegpt": ("theirs", {"method": "sparsegpt"}),
    "halve sparsegpt": ("ours", {"method": "sparsegpt", "refit": "none"}),
    "llm-compressor wanda": ("theirs", {"method": "wanda"}),
    "halve wanda": ("ours", {"method": "wanda", "refit": "none"}),
    "halve auto, fast": ("ours", {"method": "auto", "effort": "fast"}),
}


@dataclass(frozen=True)
class Taken:
    """What one run took: seconds, and bytes of resident memory at most."""

    seconds: float
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--environment", type=Path, required=True, help="where llm-compressor is installed")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="halve-whole-", dir=".") as folder:
        model, ids = _prepared(given, Path(folder))
        taken: dict[str, list[Taken]] = {name: [] for name in given.ways}
        for turn in range(given.turns):
            for name in given.ways:
                out = Path(folder) / f"{turn}-{name.replace(' ', '-')}"
                taken[name].append(_run(given, name, model, ids, out))
                print(f"{name}: {taken[name][-1].seconds:.0f} s, {taken[name][-1].memory / 1e9:.2f} GB", flush=True)
                if (out / "halve-measured.json").exists():
                    print("  ", json.loads((out / "halve-measured.json").read_text())["seconds"], flush=True)
        for name in given.ways:
            scores = [
                halve.evaluate(
                    Path(folder) / f"0-{name.replace(' ', '-')}",
                    data=text,
                    seq_len=512,
                    max_windows=given.windows,
                    forward_dtype="float32",
                ).value
                for text in given.data
            ]
            seconds = statistics.median(each.seconds for each in taken[name])
            memory = max(each.memory for each in taken[name])
            told = ", ".join(f"{score:.2f}" for score in scores)
            print(f"{name}: {seconds:.0f} s, {memory / 1e9:.2f} GB, perplexity {told}", flush=True)


def _prepared(given: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Write the model as a checkpoint, if it is a GGUF file, and the token ids."""
    loaded = load_model(resolve(given.model), dtype=torch.float32)
    asked = Calibration(source=given.calibration, samples=given.samples, seq_len=given.seq_len)
    tokens = asked.data(loaded)
    if not isinstance(tokens, TokenSet):
        raise SystemExit("this benchmark is for language models that are calibrated on text")
    save_file({"ids": tokens.ids.contiguous()}, folder / "ids.safetensors")
    model = Path(given.model)
    if not model.is_dir():
        model = folder / "model"
        loaded.model.save_pretrained(model)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(model)
    return model, folder / "ids.safetensors"


def _run(given: argparse.Namespace, name: str, model: Path, ids: Path, out: Path) -> Taken:
    """Prune in a process of its own, and return what that took."""
    side, options = WAYS[name]
    python = str(given.environment / "bin" / "python") if side == "theirs" else sys.executable
    command = [python, "-W", "ignore", "-c", _THEIRS if side == "theirs" else _OURS]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "TRANSFORMERS_OFFLINE": "1"}
    if side == "theirs":
        environment.pop("PYTHONPATH", None)
    log = out.with_suffix(".log")
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, str(model), str(ids), str(out), json.dumps(options)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed:\n{log.read_text()[-3000:]}")
    return Taken(time.perf_counter() - began, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
