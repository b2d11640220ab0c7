"""How fast products of few rows with packed 2:4 matrices are on a GPU, beside dense ones and sparse tensor cores.

    python bench/gpu_decode.py [--models 8B 70B] [--batches 1 4 16] [--minutes 7] [--splits 1 2 4 8] [--json FILE]

The shapes are those of Llama's linear layers, (d_out)x(d_in), q, k, v and gate, up apart and in one. First every
product is held to one in float64. Then dense (``torch.nn.functional.linear`` in bfloat16), sparse tensor cores
(cuSPARSELt, its algorithm searched, through Halve's layer, or CUTLASS) and packed products (bfloat16, int8, int4) take
turns, the second-level cache flushed before each, so that weights come from memory; what counts is the median of the
GPU's own time. GB/s are of the weights' bytes; "of copy" is their share of what copying a large tensor moves, read and
written. ``--splits`` times packed bfloat16 with other numbers of parts of the columns too. After ``--minutes`` no shape
is begun, and those left out are named. Without a GPU it says so, and ends.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from halve.errors import HalveError
from halve.maths.grid import Bits
from halve.runtime import kernels, semi_structured
from halve.runtime.kernels.gpu_matrix import GpuMatrix, sparse_linear
from halve.runtime.native import AnyPacked
from halve.runtime.packed_matrix import pack, unpack
from halve.runtime.quantised_matrix import QuantisedMatrix, quantise
from halve.runtime.speed import random_slab, repeated
from halve.runtime.timing import take_turns

MODELS = {
    "8B": {
        "q, o": (4096, 4096),
        "k, v": (1024, 4096),
        "qkv": (6144, 4096),
        "gate, up": (14336, 4096),
        "gate-up": (28672, 4096),
        "down": (4096, 14336),
    },
    "70B": {
        "q, o": (8192, 8192),
        "k, v": (1024, 8192),
        "qkv": (10240, 8192),
        "gate, up": (28672, 8192),
        "gate-up": (57344, 8192),
        "down": (8192, 28672),
    },
}
BATCHES = (1, 4, 16)
DTYPE = torch.bfloat16
DENSE, CORES, PACKED = "dense", "sparse tensor cores", "packed"
AIM = 1.4
"""Times as fast as dense that packed bfloat16 is to be at batch 1 on the 8B shapes."""
ODD_SHAPES = ((1, 4), (7, 12), (33, 260), (129, 1096))
COPY_BYTES = 1 << 29
SECONDS = 0.4
"""For the turns of one shape and batch."""


@dataclass(frozen=True)
class Row:
    """One contender at one shape and batch."""

    model: str
    name: str
    d_out: int
    d_in: int
    batch: int
    contender: str
    microseconds: float
    nbytes: int
    times_dense: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.microseconds / 1e3


def packed_slab(d_in: int, rows: int, bits: Bits | None) -> AnyPacked:
    """Return a few random rows, packed, and quantised to so many bits."""
    one = pack(random_slab(rows, d_in, "2:4", DTYPE), "2:4")
    return one if bits is None else quantise(one, bits)


def check(product: Tensor, x: Tensor, slab: AnyPacked) -> None:
    """Hold a product to that in float64; the matrix repeats the slab's rows.

    Raises:
        HalveError: it is off by more than rounding explains.
    """
    quantised = isinstance(slab, QuantisedMatrix)
    weight = unpack(slab.dequantised() if isinstance(slab, QuantisedMatrix) else slab).double()
    inputs = x.cpu().double()
    exact, magnitude = inputs @ weight.T, inputs.abs() @ weight.abs().T
    # integers times scales are rounded to bfloat16 for some numbers of rows, and are not for others
    allowed = 2.0**-8 * exact.abs() + (2.0**-10 if quantised else 2.0**-20) * magnitude
    columns = torch.arange(product.shape[1]) % len(weight)
    wrong = ~((product.cpu().double() - exact[:, columns]).abs() <= allowed[:, columns])
    if wrong.any():
        raise HalveError(f"a packed product of shape {tuple(product.shape)} is wrong in {int(wrong.sum())} elements")


def check_odd_shapes(device: torch.device) -> None:
    for d_out, d_in in ODD_SHAPES:
        for bits in (None, *get_args(Bits)):
            slab = packed_slab(d_in, d_out, bits)
            matrix = GpuMatrix.of(slab, device)
            for rows in (1, 2, 3, 16, 17):
                x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(rows)).to(device, DTYPE)
                check(sparse_linear(x, matrix), x, slab)


def copy_rate(device: torch.device) -> float:
    """Return the bytes a second that copying moves, read and written."""
    source = torch.zeros(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    turns = take_turns({"copy": [partial(target.copy_, source)]}, device=device, least=20)
    return 2 * COPY_BYTES / turns["copy"].seconds


def measure(model: str, name: str, batches: Sequence[int], splits: Sequence[int], device: torch.device) -> list[Row]:
    """Check and time all contenders at one shape."""
    d_out, d_in = MODELS[model][name]
    slabs = {bits: packed_slab(d_in, 64, bits) for bits in (None, *get_args(Bits))}
    matrices = {bits: GpuMatrix.of(repeated(slab, d_out), device) for bits, slab in slabs.items()}
    weight = random_slab(d_out, d_in, "2:4", DTYPE).to(device).repeat(d_out // 64, 1)
    usable = not semi_structured.unusable(device) and not semi_structured.unfit(d_out, d_in, DTYPE)
    rows = []
    for batch in batches:
        x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(batch)).to(device, DTYPE)
        calls: dict[str, tuple[int, Callable[[], Tensor]]] = {DENSE: (weight.nbytes, partial(linear, x, weight))}
        if usable:
            layer = semi_structured.SemiStructuredLinear(weight, None, batch)
            calls[CORES] = layer.nbytes, partial(layer, x)
        for bits, matrix in matrices.items():
            check(sparse_linear(x, matrix), x, slabs[bits])
            label = PACKED if bits is None else f"{PACKED} int{bits}"
            calls[label] = matrix.nbytes, partial(sparse_linear, x, matrix)
        for count in splits:
            calls[f"{PACKED}, {count} splits"] = (
                matrices[None].nbytes,
                partial(sparse_linear, x, matrices[None], None, count),
            )
        contenders = {label: [call] for label, (_, call) in calls.items()}
        turns = take_turns(contenders, device=device, least=10, most=100, seconds=SECONDS)
        dense = turns[DENSE].seconds
        rows += [
            Row(
                model, name, d_out, d_in, batch, label, 1e6 * turns[label].seconds, nbytes, dense / turns[label].seconds
            )
            for label, (nbytes, _) in calls.items()
        ]
    return rows


def show(row: Row, copied: float) -> str:
    """Return a line for one contender; ``copied`` is in bytes a second."""
    share = 1e9 * row.gigabytes_per_second / copied
    return (
        f"{row.model:>4} {row.name:>9} {row.d_out:>6}x{row.d_in:<6}{row.batch:>4} {row.contender:>20} "
        f"{row.microseconds:>9.1f} {row.gigabytes_per_second:>8.0f} {share:>8.0%} {row.times_dense:>8.2f}"
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """Return a line for each model, batch and contender: the geometric mean over shapes of times as fast as dense."""
    cases: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        if row.contender != DENSE:
            cases.setdefault((row.model, row.batch, row.contender), []).append(row.times_dense)
    lines = [
        f"{model}, batch {batch}, {contender}: {geometric_mean(found):.2f} times as fast as dense, "
        f"from {min(found):.2f} to {max(found):.2f}"
        for (model, batch, contender), found in cases.items()
    ]
    if aimed := cases.get(("8B", 1, PACKED)):
        reached = "reached" if geometric_mean(aimed) >= AIM else "missed"
        lines.append(f"the aim, {AIM} times dense at batch 1 on the 8B shapes: {reached}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--minutes", type=float, default=7, help="after which no shape is begun")
    parser.add_argument("--splits", nargs="*", type=int, default=[], help="numbers of parts to time beside the own one")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    begun = time.perf_counter()
    if reason := kernels.unusable():
        sys.exit(f"packed products on a GPU cannot be measured here: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    facts = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "kernel": kernels.describe()}
    if reason := semi_structured.unusable(device):
        print(f"no sparse tensor cores: {reason}")
    with torch.inference_mode():
        check_odd_shapes(device)
        copied = copy_rate(device)
        print(", ".join(f"{name} {value}" for name, value in facts.items()), f"; a copy moves {copied / 1e9:.0f} GB/s")
        print(f"{'':14} {'shape':>13}{'batch':>4} {'':20} {'us':>9} {'GB/s':>8} {'of copy':>8} {'x dense':>8}")
        rows: list[Row] = []
        for model, name in ((each, name) for each in options.models for name in MODELS[each]):
            if time.perf_counter() - begun > 60 * options.minutes:
                print(f"left out for want of time: {model} {name}")
                continue
            found = measure(model, name, options.batches, options.splits, device)
            rows += found
            print("\n".join(show(row, copied) for row in found), flush=True)
    print("\n".join(summary(rows)))
    if options.json:
        written = [{**asdict(row), "gigabytes_per_second": row.gigabytes_per_second} for row in rows]
        options.json.write_text(json.dumps({**facts, "copy": copied, "rows": written}, indent=2) + "\n")


if __name__ == "__main__":
    main()
