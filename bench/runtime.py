"""How fast products with packed 2:4 matrices are on the CPU, beside dense ones: ours, PyTorch's and oneDNN's prepacked.

    python bench/runtime.py [--shapes 4096x4096 ...] [--batches 1 4 16 ...] [--dtypes bfloat16 ...] [--threads 1 2 ...]

The shapes are those of an 8B Llama, (d_out)x(d_in). In a model a matrix is read once a token and long gone from the
caches when its turn comes again, so every contender goes round copies that together are four times the last-level
cache. Contenders take turns in one process; medians are reported, and the best turn beside them, which says more on a
machine that is not idle. The dense kernels of ours have the loops of the packed ones: what lies between the two is
sparsity's, what lies between them and PyTorch is the code's. "int8" and "int4" are quantised weights, for which x is
quantised too. "read" sums a tensor larger than the caches on as many threads: what the memory gives.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from halve.maths.grid import Bits
from halve.maths.pattern import Pattern
from halve.runtime import native
from halve.runtime.compiled import instruction_sets, library, quantised_instruction_sets
from halve.runtime.native import REFERENCE, dense_linear, sparse_linear
from halve.runtime.packed_matrix import DTYPES as PACKED_DTYPES
from halve.runtime.packed_matrix import PackedMatrix, pack
from halve.runtime.quantised_matrix import STRIP, quantise
from halve.runtime.timing import copies_beyond_cache, last_level_cache, take_turns

SHAPES = ("4096x4096", "1024x4096", "14336x4096", "4096x14336")
BATCHES = (1, 2, 3, 4, 8, 12, 16, 17, 24, 32, 48, 64, 128, 256, 512)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PATTERN = "2:4"
DENSE_ROWS = 16
"""Rows of x up to which our dense kernel takes part."""
TORCH = "torch"
READ_BYTES = 1 << 28
LEAST = 3
"""Turns that even the slowest contenders get."""

Calls = list[Callable[[], Tensor]]


@dataclass(frozen=True)
class Row:
    """One contender at one shape, batch, dtype and number of threads."""

    threads: int
    dtype: str
    shape: str
    batch: int
    contender: str
    milliseconds: float
    best_milliseconds: float
    nbytes: int
    """Of the matrix, as it is read."""

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.milliseconds / 1e6


def prepacked(weight: Tensor, x: Tensor, count: int) -> Calls | str:
    """Return oneDNN's product with copies of the weight in the layout that it likes best, or why there is none."""
    onednn = torch.ops.mkldnn
    try:
        matrices = [onednn._reorder_linear_weight(weight, len(x)) for _ in range(count)]  # noqa: SLF001
        multiply = onednn._linear_pointwise  # noqa: SLF001
        multiply(x, matrices[0], None, "none", [], "")
    except (RuntimeError, AttributeError) as error:
        return str(error).splitlines()[0]
    return [partial(multiply, x, matrix, None, "none", [], "") for matrix in matrices]


class Matrix:
    """Copies of one matrix, dense, in float32 and packed, that contenders go round.

    Args:
        shape: (d_out, d_in), as written in the options.
        dtype: name of what it holds.
        cache: bytes of the last-level cache.
        all_sets: whether quantised products are measured with every instruction set there is, not the best alone.
    """

    def __init__(self, shape: str, dtype: str, cache: int, *, all_sets: bool) -> None:
        self.all_sets = all_sets
        d_out, self.d_in = (int(size) for size in shape.split("x"))
        self.dtype = DTYPES[dtype]
        dense = torch.randn(d_out, self.d_in, generator=torch.Generator().manual_seed(0))
        weight = Pattern(PATTERN).project(dense).to(self.dtype)
        packed = pack(weight, PATTERN)
        self.dense = [weight.clone() for _ in range(copies_beyond_cache(weight.nbytes, cache))]
        self.wide = [weight.float() for _ in range(copies_beyond_cache(4 * weight.numel(), cache))]
        self.packed = [
            PackedMatrix(packed.mask.clone(), packed.values.clone(), packed.shape, packed.pattern)
            for _ in range(copies_beyond_cache(packed.nbytes, cache))
        ]
        self.cache = cache
        self.memory = torch.zeros(2, READ_BYTES // 8, dtype=torch.int64)

    def quantised(self, bits: Bits, x: Tensor, names: list[str]) -> dict[str, tuple[int, Calls]]:
        """Return products with quantised weights, dense and packed, by each of some instruction sets."""
        one = quantise(self.packed[0], bits)
        codes = torch.randint(1, 255, (one.d_out * one.strips * STRIP * bits // 8,), dtype=torch.uint8)
        nbytes = codes.nbytes + one.scales.nbytes
        y = x.new_empty(len(x), one.d_out)

        def multiply_dense(name: str, codes: Tensor, scales: Tensor) -> Tensor:
            weight = (0, codes.data_ptr(), scales.data_ptr(), *one.shape, bits)
            rows = (x.data_ptr(), len(x), 0, y.data_ptr(), torch.get_num_threads())
            library.multiply_quantised(name, PACKED_DTYPES.index(x.dtype), *weight, *rows)
            return y

        found: dict[str, tuple[int, Calls]] = {}
        for name in names:  # each with copies of its own, which no other has brought into a cache
            dense = [(codes.clone(), one.scales.clone()) for _ in range(copies_beyond_cache(nbytes, self.cache))]
            found[f"int{bits} dense, {name}"] = nbytes, [partial(multiply_dense, name, *pair) for pair in dense]
            parts = [
                replace(one, places=one.places.clone(), codes=one.codes.clone(), scales=one.scales.clone())
                for _ in range(copies_beyond_cache(one.nbytes, self.cache))
            ]
            packs: Calls = [partial(sparse_linear, x, part, None, name) for part in parts]
            found[f"int{bits} packed, {name}"] = one.nbytes, packs
        return found

    def contenders(self, batch: int) -> dict[str, tuple[int, Calls]]:
        """Return, by name, the bytes that one call reads and the calls."""
        x = torch.randn(batch, self.d_in, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        nbytes, packed_bytes = self.dense[0].nbytes, self.packed[0].nbytes
        found: dict[str, tuple[int, Calls]] = {}
        found[TORCH] = nbytes, [partial(linear, x, weight) for weight in self.dense]
        if self.dtype != torch.float32:
            found["torch float32"] = self.wide[0].nbytes, [partial(linear, x.float(), weight) for weight in self.wide]
        others = prepacked(self.dense[0], x, len(self.dense))
        if not isinstance(others, str):
            found["oneDNN prepacked"] = nbytes, others
        elif batch == 1:
            print(f"no prepacked oneDNN: {others}")
        names = instruction_sets() or (REFERENCE,)
        for name in names[:-1] or names:  # the last is for processors that have no other
            if batch <= DENSE_ROWS and name != REFERENCE:
                dense: Calls = [partial(dense_linear, x, weight, instruction_set=name) for weight in self.dense]
                found[f"dense, {name}"] = nbytes, dense
            packs: Calls = [partial(sparse_linear, x, packed, None, name) for packed in self.packed]
            found[f"packed, {name}"] = packed_bytes, packs
        if batch <= DENSE_ROWS:
            names = quantised_instruction_sets()
            chosen = list(names[:-1] if self.all_sets else names[:1])
            for bits in (8, 4):
                found |= self.quantised(bits, x, chosen)
        found["read"] = READ_BYTES, [part.sum for part in self.memory]
        return found


def measure(matrix: Matrix, batch: int, labels: dict[str, Any], options: argparse.Namespace) -> list[Row]:
    found = matrix.contenders(batch)
    calls = {name: turns for name, (_, turns) in found.items()}
    cpu = torch.device("cpu")
    turns = take_turns(calls, device=cpu, least=LEAST, most=options.repeats, seconds=options.seconds)
    return [
        Row(
            **labels,
            batch=batch,
            contender=name,
            milliseconds=1e3 * turns[name].seconds,
            best_milliseconds=1e3 * min(turns[name].device),
            nbytes=nbytes,
        )
        for name, (nbytes, _) in found.items()
    ]


def show(rows: list[Row]) -> None:
    """Print what was measured in the same turns."""
    peer = next(row for row in rows if row.contender == TORCH)
    for row in rows:
        print(
            f"{row.shape:>10} {row.batch:>5} {row.contender:>20} {row.milliseconds:>9.3f} "
            f"{row.gigabytes_per_second:>7.1f} {peer.milliseconds / row.milliseconds:>8.2f} "
            f"{row.best_milliseconds:>9.3f} {peer.best_milliseconds / row.best_milliseconds:>8.2f}",
            flush=True,
        )


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return what the rows of one dtype and number of threads come to, by medians."""
    cases: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.shape, row.batch), {})[row.contender] = row
    over_torch, over_dense, over_read = {}, [], []
    for case, by_name in cases.items():
        packed = next(row for name, row in by_name.items() if name.startswith("packed"))  # what the package would take
        dense = [row for name, row in by_name.items() if not name.startswith(("packed", "read", "int"))]
        over_torch[case] = by_name[TORCH].milliseconds / packed.milliseconds
        over_dense.append(min(row.milliseconds for row in dense) / packed.milliseconds)
        if packed.batch == 1:
            over_read.append(packed.gigabytes_per_second / by_name["read"].gigabytes_per_second)
    worst = min(over_torch, key=over_torch.__getitem__)
    return {
        "threads": rows[0].threads,
        "dtype": rows[0].dtype,
        "over_torch": geometric_mean(over_torch.values()),
        "over_best_dense": geometric_mean(over_dense),
        "share_of_read_at_batch_1": geometric_mean(over_read) if over_read else None,
        "least_over_torch": over_torch[worst],
        "least_at": f"{worst[0]}, batch {worst[1]}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=21, help="turns at most")
    parser.add_argument("--seconds", type=float, default=5, help=f"after which, and {LEAST} turns, none is begun")
    parser.add_argument("--cache", type=int, default=last_level_cache(), help="bytes of the last-level cache")
    parser.add_argument("--all-sets", action="store_true", help="quantised products by every instruction set")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    facts: dict[str, Any] = {
        "kernel": native.describe(),
        "repeats": options.repeats,
        "seconds": options.seconds,
        "cache": options.cache,
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows, summaries = [], []
    with torch.inference_mode():
        for threads in options.threads:
            torch.set_num_threads(threads)
            for dtype in options.dtypes:
                print(f"\n{dtype}, threads: {threads}\n{'':37} {'median':^26} {'best':^18}")
                print(
                    f"{'shape':>10} {'batch':>5} {'':20} {'ms':>9} {'GB/s':>7} {'x torch':>8} {'ms':>9} {'x torch':>8}"
                )
                labels = {"threads": threads, "dtype": dtype}
                these: list[Row] = []
                for shape in options.shapes:
                    matrix = Matrix(shape, dtype, options.cache, all_sets=options.all_sets)
                    for batch in options.batches:
                        measured = measure(matrix, batch, {**labels, "shape": shape}, options)
                        show(measured)
                        these += measured
                rows += these
                summaries.append(summary(these))
    facts["load_after"] = os.getloadavg()[0]
    print("\nhow many times as fast as others packed products are: geometric means of medians")
    for found in summaries:
        read = found["share_of_read_at_batch_1"]
        print(
            f"{found['dtype']}, threads {found['threads']}: torch {found['over_torch']:.2f}, "
            f"the best dense {found['over_best_dense']:.2f}, least over torch {found['least_over_torch']:.2f} "
            f"({found['least_at']})" + (f", at batch 1 {read:.0%} of what memory gives" if read else "")
        )
    if options.json:
        written = [{**asdict(row), "gigabytes_per_second": row.gigabytes_per_second} for row in rows]
        options.json.write_text(json.dumps({**facts, "summaries": summaries, "rows": written}, indent=2) + "\n")


if __name__ == "__main__":
    main()
