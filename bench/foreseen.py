"""What pruning Llama-3 models would take on one large GPU, and on this machine: foreseen, nothing of it measured.

    python bench/foreseen.py [--models llama-8b llama-70b] [--samples 128] [--seq-len 2048] [--here]

Memory, disk and time are what `halve prune --dry-run` would say (`halve.forecast`), of a GPU with the rates below,
which are assumptions; small operations on a GPU, some 5 µs each, are not in it. With ``--here`` the rates of this
machine are measured instead, which takes a few seconds and wants nothing else running.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from halve.forecast.foreseen import Foreseen, foresee
from halve.forecast.needs import needs
from halve.forecast.rates import Rates
from halve.run.request import Request
from halve.text.calibration import batch_tokens

_CUDA = torch.device("cuda")
GPU = Rates(forward=400e12, float32=40e12, factorisation=10e12, bytes=2.5e12, reading=2e9, writing=1e9)
"""Assumed of an H100 and a good disk: operations and bytes a second."""
WAYS: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "refit": "none"},
    "sparsegpt": {"method": "sparsegpt", "refit": "none"},
    "sparsegpt+cg": {"method": "sparsegpt"},
    "alps+cg": {"method": "alps"},
    "prox-gradient+cg": {"method": "prox-gradient"},
    "prox-gradient+cg as published for 70B": {"method": "prox-gradient", "lambda0": 1e-3, "beta": 1.005},
    "auto, fast": {"effort": "fast"},
    "auto, balanced": {},
}


def shown(name: str, found: Foreseen, *, gpu: bool) -> str:
    """Return a line of the table."""
    plan = replace(found.plan, device=_CUDA, batch=max(found.plan.batch, batch_tokens(_CUDA))) if gpu else found.plan
    wanted = needs(found.shapes, plan, found.used, 0)
    hours = {phase: seconds / 3600 for phase, seconds in found.seconds.items()}
    passing = hours["collect"] + hours.get("replay", 0.0)
    rest = sum(hours.values()) - passing - hours["solve"]
    memory, on_gpu, disk = (sum(each.values()) / 1e9 for each in (wanted.memory, wanted.on_device, found.needs.disk))
    times = f"{passing:.2f} | {hours['solve']:.2f} | {rest:.2f} | {sum(hours.values()):.2f}"
    return f"| {name} | {memory:.0f} | {on_gpu:.0f} | {disk:.0f} | {times} |"


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-8b", "llama-70b"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--here", action="store_true", help="measure this machine's rates instead")
    given = parser.parse_args()
    rates = None if given.here else GPU
    for model in given.models:
        print(f"\n{model}, {given.samples} x {given.seq_len} tokens")
        print("| method | memory, GB | GPU memory, GB | disk, GB | passes, h | solving, h | the rest, h | all, h |")
        for name, options in WAYS.items():
            asked = {"calibration": "c4", "samples": given.samples, "seq_len": given.seq_len, "device": "cpu"}
            asked |= {"stream": "always"}
            precision = {} if given.here else {"forward_dtype": "bfloat16"}
            request = Request.of({**asked, **precision, **options})
            found = foresee(model, Path.cwd() / "pruned", request, rates=rates)
            rates = found.rates
            print(shown(name, found, gpu=not given.here), flush=True)


if __name__ == "__main__":
    main()
