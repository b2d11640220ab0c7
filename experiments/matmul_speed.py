"""Speed of 2:4 matrix products: dense over sparse time, for the linear layers of an 8B and a 70B model.

    python experiments/matmul_speed.py

``F.linear`` with dense weights against the same with ``torch.sparse.to_sparse_semi_structured`` of weights that are
2:4, on this machine's GPU. With cuSPARSELt its algorithm is searched for every size, and the default one timed too.
Contenders take turns, the L2 cache is flushed before every call, medians count; each product is checked against the
dense one first. Device time hides what the launch costs; call time, from Python to the synchronised end, shows it.
The sparse product needs its rows in multiples of 8: smaller batches are padded before the clock starts. Needs a CUDA
GPU from compute capability 8.0 on; where there is none the script says so, writes nothing and exits with status 0.
``--full``: bfloat16 and float16, 50 turns.
"""

import functools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import linear, pad

import halve
import results
from halve.runtime.semi_structured import compress, padded_rows, unusable
from halve.runtime.timing import FLUSH_BYTES, take_turns

NAME = "matmul_speed"
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "8B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "70B": {"q, o": (8192, 8192), "k, v": (1024, 8192), "gate, up": (28672, 8192), "down": (8192, 28672)},
}
"""Weights (d_out, d_in) of Llama 3's linear layers."""
BATCHES = (1, 16, 32, 8192, 16384, 32768)
DENSE, DEFAULT, SEARCHED = "dense", "sparse", "sparse, searched"
PAPER = "paper, A100: 0.05 to 0.56 at batch 1 to 32, 0.75 to 1.6 at 8192 to 32768"
_TOLERANCE = 2e-2
"""Relative error of a sparse product in half precision: sums are taken in another order."""

Case = tuple[str, str, int, int, int]
"""Model, layer, d_out, d_in, batch."""


def needed_bytes(d_out: int, d_in: int, batch: int) -> int:
    """Return the GPU memory in bytes that a case takes at its peak, the check in float32 included.

    Args:
        d_out: rows of the weight.
        d_in: its columns.
        batch: rows of the input.
    """
    rows = padded_rows(batch)
    weights = 40 * d_out * d_in  # dense, packed, and what choosing the pattern takes
    return weights + 4 * rows * d_in + 16 * rows * d_out + FLUSH_BYTES


def cases(free_bytes: int, batches: Sequence[int] = BATCHES) -> tuple[list[Case], list[Case]]:
    """Return the cases that fit into the memory, and those that do not.

    Args:
        free_bytes: of the GPU.
        batches: rows of the inputs.
    """
    every = [
        (model, layer, *shape, batch)
        for model, layers in SHAPES.items()
        for (layer, shape), batch in product(layers.items(), batches)
    ]
    fits = [needed_bytes(*case[2:]) <= free_bytes for case in every]
    return (
        [case for case, fit in zip(every, fits, strict=True) if fit],
        [case for case, fit in zip(every, fits, strict=True) if not fit],
    )


def sparse_weights(weight: Tensor, rows: int) -> dict[str, Tensor]:
    """Return the packed weights to time, by contender.

    Args:
        weight: (d_out, d_in), 2:4, half precision, on the GPU.
        rows: of the inputs, a multiple of 8: the algorithm is searched for them.
    """
    found: dict[str, Tensor] = {DEFAULT: compress(weight)}
    if torch.backends.cusparselt.is_available():
        found[SEARCHED] = compress(weight, rows)
    return found


def measure(case: Case, dtype: torch.dtype, turns: int) -> dict[str, Any]:
    """Check and time one case on the GPU.

    Args:
        case: what to multiply.
        dtype: bfloat16 or float16.
        turns: of every contender; medians count.

    Returns:
        dict[str, Any]: the case, ``error`` (relative, of every sparse product), ``device_seconds`` and
            ``call_seconds`` by contender.
    """
    model, layer, d_out, d_in, batch = case
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator, device="cuda", dtype=dtype)
    weight = halve.Pattern("2:4").project(weight)
    inputs = torch.randn(batch, d_in, generator=generator, device="cuda", dtype=dtype)
    padded = pad(inputs, (0, 0, 0, padded_rows(batch) - batch))
    expected = linear(inputs, weight).float()
    calls: dict[str, Callable[[], Tensor]] = {DENSE: functools.partial(linear, inputs, weight)}
    errors = {}
    for name, packed in sparse_weights(weight, len(padded)).items():
        calls[name] = functools.partial(linear, padded, packed)
        errors[name] = float((calls[name]()[:batch].float() - expected).norm() / expected.norm())
        if not errors[name] < _TOLERANCE:
            raise ArithmeticError(f"the sparse product of {case} is off by {errors[name]:.2g}: it cannot be timed")
    del expected
    timed = take_turns({name: [call] for name, call in calls.items()}, device=weight.device, least=turns, most=turns)
    return {
        "model": model,
        "layer": layer,
        "d_out": d_out,
        "d_in": d_in,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "error": errors,
        "device_seconds": {name: found.seconds for name, found in timed.items()},
        "call_seconds": {name: found.call_seconds for name, found in timed.items()},
    }


def run(given: Any) -> dict[str, Any]:
    """Measure every case that fits, writing after each layer."""
    free, _ = torch.cuda.mem_get_info()
    chosen, left_out = cases(free, given.batches)
    numbers: dict[str, Any] = {
        "backend": "cuSPARSELt" if torch.backends.cusparselt.is_available() else "CUTLASS",
        "turns": given.turns,
        "left_out": [f"{model} {layer}, batch {batch}" for model, layer, _, _, batch in left_out],
        "rows": [],
    }
    for dtype, case in product(given.dtypes, chosen):
        numbers["rows"].append(measure(case, getattr(torch, dtype), given.turns))
        print(json.dumps(numbers["rows"][-1]), flush=True)
        results.save(NAME, numbers, None, given.out)
    results.save(NAME, numbers, picture(numbers), given.out)
    return numbers


def ratio(row: dict[str, Any], contender: str, clock: str = "device_seconds") -> float:
    """Return dense time over sparse time: above 1 the sparse product is faster."""
    found: float = row[clock][DENSE] / row[clock][contender]
    return found


def _best(row: dict[str, Any]) -> str:
    return SEARCHED if SEARCHED in row["device_seconds"] else DEFAULT


def picture(numbers: dict[str, Any]) -> Figure:
    """Draw dense time over sparse time against the batch: a column a model, device time above call time."""
    models = list(dict.fromkeys(row["model"] for row in numbers["rows"]))
    clocks = {"device_seconds": "device time", "call_seconds": "call time"}
    figure, panels = results.axes(len(models), len(clocks), width=5.0, height=3.2)
    dtype = numbers["rows"][0]["dtype"]
    for axis, (clock, model) in zip(panels, product(clocks, models), strict=True):
        rows = [row for row in numbers["rows"] if row["model"] == model and row["dtype"] == dtype]
        for index, layer in enumerate(dict.fromkeys(row["layer"] for row in rows)):
            some = [row for row in rows if row["layer"] == layer]
            batches = [str(row["batch"]) for row in some]
            axis.plot(batches, [ratio(row, _best(row), clock) for row in some], label=layer, **results.style(index))
        axis.axhline(1.0, color="black", linestyle=":", label="as fast as dense")
        axis.set(title=f"{model}, {dtype}, {clocks[clock]}", xlabel="batch (rows of the input)", ylim=(0.0, None))
        axis.set_ylabel("dense time / sparse time")
    results.legend_below(figure, panels[0])
    return figure


def markdown(numbers: dict[str, Any]) -> str:
    """Return the table of dense time over sparse time, as in the paper's discussion: device time, and call time."""
    tables = list(_tables(numbers))
    if numbers["left_out"]:
        tables.append("Left out for want of memory: " + "; ".join(numbers["left_out"]) + ".")
    return "\n\n".join(tables)


def _tables(numbers: dict[str, Any]) -> Iterator[str]:
    batches = sorted({row["batch"] for row in numbers["rows"]})
    searched = any(SEARCHED in row["device_seconds"] for row in numbers["rows"])
    shown = [("device_seconds", SEARCHED, "device time, algorithm searched")] if searched else []
    shown.append(("device_seconds", DEFAULT, "device time, default algorithm"))
    shown.append(("call_seconds", SEARCHED if searched else DEFAULT, "call time"))
    for dtype, (clock, contender, name) in product(dict.fromkeys(row["dtype"] for row in numbers["rows"]), shown):
        ratios: dict[tuple[str, str], dict[int, str]] = {}
        for row in numbers["rows"]:
            if row["dtype"] == dtype:
                layer = (f"{row['model']} {row['layer']}", f"{row['d_out']} x {row['d_in']}")
                ratios.setdefault(layer, {})[row["batch"]] = f"{ratio(row, contender, clock):.2f}"
        rows = [[*layer, *[found.get(batch, "") for batch in batches]] for layer, found in ratios.items()]
        yield results.table([f"{dtype}, {name}", "shape", *[f"batch {batch}" for batch in batches]], rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = results.parser(__doc__ or "")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    given = parser.parse_args(arguments)
    given.turns = given.turns or (50 if given.full else 15)
    given.dtypes = given.dtypes or (["bfloat16", "float16"] if given.full else ["bfloat16"])
    if reason := unusable():
        print(f"matmul_speed needs sparse tensor cores, but {reason}: nothing was measured and nothing was written.")
        return
    warnings.filterwarnings(
        "ignore", message=".*SparseSemiStructuredTensor is in prototype stage", category=UserWarning
    )
    print(markdown(run(given)))
    print(PAPER)


if __name__ == "__main__":
    main()
