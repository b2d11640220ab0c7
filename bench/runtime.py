"""How fast products with packed 2:4 matrices are on the CPU, beside dense ones: ours, PyTorch's and oneDNN's prepacked.

    python bench/runtime.py [--shapes 4096x4096 ...] [--batches 1 4 16] [--threads N] [--repeats N] [--json PATH]

The shapes are those of an 8B Llama, (d_out)x(d_in). In a model a matrix is read once a token and long gone from the
caches when its turn comes again, so every contender goes round copies that together are four times the last-level
cache. Contenders take turns in one process; medians are reported, and the best turn beside them, which says more on a
machine that is not idle. The dense kernel of ours has the loops of the packed one: what lies between the two is
sparsity's, what lies between it and PyTorch is the code's. "read" sums a tensor larger than the caches on as many
threads: what the memory gives.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from halve.pattern import Pattern
from halve.runtime import native
from halve.runtime.native import REFERENCE, dense_linear, sparse_linear
from halve.runtime.packed import PackedMatrix, pack

SHAPES = ("4096x4096", "1024x4096", "14336x4096", "4096x14336")
PATTERN = "2:4"
CACHES = 4
"""How many last-level caches the copies of a matrix fill."""
READ_BYTES = 1 << 28


def last_level_cache() -> int:
    """Return its bytes; 64 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 << 20)


def copies(nbytes: int, cache: int) -> int:
    return max(2, -(-CACHES * cache // nbytes))


class Contender:
    """Calls one kernel on one copy of its matrix after the other.

    Args:
        matrices: the copies.
        multiply: from a copy to the product.
        nbytes: of one copy, as it is read.
    """

    def __init__(self, matrices: list[Any], multiply: Callable[[Any], Tensor], nbytes: int) -> None:
        self._matrices = cycle(matrices)
        self._multiply = multiply
        self.nbytes = nbytes
        self.seconds: list[float] = []

    def turn(self) -> None:
        matrix = next(self._matrices)
        begin = time.perf_counter()
        self._multiply(matrix)
        self.seconds.append(time.perf_counter() - begin)


def prepacked(weight: Tensor, x: Tensor, count: int) -> Contender | str:
    """Return oneDNN's product with copies of the weight in the layout that it likes best, or why there is none."""
    onednn = torch.ops.mkldnn
    try:
        matrices = [onednn._reorder_linear_weight(weight, len(x)) for _ in range(count)]  # noqa: SLF001
        multiply = partial(onednn._linear_pointwise, x)  # noqa: SLF001
        multiply(matrices[0], None, "none", [], "")
    except (RuntimeError, AttributeError) as error:
        return str(error).splitlines()[0]
    return Contender(matrices, lambda w: multiply(w, None, "none", [], ""), weight.nbytes)


def contenders(weight: Tensor, x: Tensor, cache: int) -> dict[str, Contender]:
    """Return what takes turns on one shape and batch: ``weight`` (d_out, d_in) bfloat16, ``x`` (batch, d_in)."""
    packed = pack(weight, PATTERN)
    dense = [weight.clone() for _ in range(copies(weight.nbytes, cache))]
    wide = [weight.float() for _ in range(copies(2 * weight.nbytes, cache))]
    packs = [
        PackedMatrix(packed.mask.clone(), packed.values.clone(), packed.shape, packed.pattern)
        for _ in range(copies(packed.nbytes, cache))
    ]
    wide_x = x.float()
    found = {
        "torch float32": Contender(wide, lambda w: linear(wide_x, w), 2 * weight.nbytes),
        "torch bfloat16": Contender(dense, lambda w: linear(x, w), weight.nbytes),
    }
    others = prepacked(weight, x, len(dense))
    if isinstance(others, str):
        print(f"no prepacked oneDNN: {others}")
    else:
        found["oneDNN prepacked"] = others
    for name in native.instruction_sets():
        if name != "portable":
            multiply_dense = partial(dense_linear, x, instruction_set=name)
            multiply_packed = partial(sparse_linear, x, bias=None, instruction_set=name)
            found[f"dense, {name}"] = Contender(dense, multiply_dense, weight.nbytes)
            found[f"packed, {name}"] = Contender(packs, multiply_packed, packed.nbytes)
    if not native.instruction_sets():
        found["packed, reference"] = Contender(packs, lambda p: sparse_linear(x, p, None, REFERENCE), packed.nbytes)
    memory = torch.zeros(2, READ_BYTES // 8, dtype=torch.int64)
    found["read"] = Contender(list(memory), lambda part: part.sum(), READ_BYTES)
    return found


def measure(shape: str, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    d_out, d_in = (int(size) for size in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(d_out, d_in, generator=generator)
    weight = Pattern(PATTERN).project(dense).bfloat16()
    x = torch.randn(batch, d_in, generator=generator).bfloat16()
    found = contenders(weight, x, options.cache)
    for _ in range(options.repeats + 1):
        for contender in found.values():
            contender.turn()
    rows: list[dict[str, Any]] = []
    for name, contender in found.items():
        times = contender.seconds[1:]  # the first turn warms threads
        median, best = statistics.median(times), min(times)
        rows.append(
            {
                "shape": shape,
                "batch": batch,
                "contender": name,
                "milliseconds": 1e3 * median,
                "best_milliseconds": 1e3 * best,
                "gigabytes_per_second": contender.nbytes / median / 1e9,
                "best_gigabytes_per_second": contender.nbytes / best / 1e9,
            }
        )
    peer = next(row for row in rows if row["contender"] == "torch bfloat16")
    for row in rows:
        row["times_torch"] = peer["milliseconds"] / row["milliseconds"]
        row["best_times_torch"] = peer["best_milliseconds"] / row["best_milliseconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--cache", type=int, default=last_level_cache(), help="bytes of the last-level cache")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts: dict[str, Any] = {
        "kernel": native.describe(),
        "threads": options.threads,
        "repeats": options.repeats,
        "cache": options.cache,
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(
        f"{'':40} {'median':^27} {'best':^27}\n{'shape':>10} {'batch':>5} {'':23}"
        + f" {'ms':>8} {'GB/s':>7} {'x torch':>9} " * 2
    )
    rows = []
    with torch.inference_mode():
        for shape in options.shapes:
            for batch in options.batches:
                for row in measure(shape, batch, options):
                    rows.append(row)
                    print(
                        f"{shape:>10} {batch:>5} {row['contender']:>23} "
                        f"{row['milliseconds']:>8.3f} {row['gigabytes_per_second']:>7.1f} {row['times_torch']:>9.2f}  "
                        f"{row['best_milliseconds']:>8.3f} {row['best_gigabytes_per_second']:>7.1f} "
                        f"{row['best_times_torch']:>9.2f}",
                        flush=True,
                    )
    facts["load_after"] = os.getloadavg()[0]
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
