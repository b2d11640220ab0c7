"""What pruning an 8B and a 70B model would cost on one GPU: a prediction from counts, nothing of it measured.

Operations and bytes of every method are counted from its source, with the numbers of iterations that ``scaling.py``
measured at the largest d_in it ran, and divided by the throughputs below; the two are added, not overlapped. Layers of
equal input (query, key and value; gate and up) are pruned one by one, as ``prune_weight`` would.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TOKENS = 128 * 2048
"""Of calibration."""


@dataclass(frozen=True)
class Machine:
    """Assumed sustained throughputs of one H100: assumptions, not measurements."""

    bfloat16: float = 400e12
    """Products, operations a second."""
    float32: float = 40e12
    """Products without TF32, which statistics, refits and sparsegpt use, operations a second."""
    factorisation: float = 10e12
    """Cholesky factorisations and inverses in float32, operations a second."""
    memory: float = 2.5e12
    """Bytes a second."""
    launch: float = 5e-6
    """Seconds of one small operation."""


@dataclass(frozen=True)
class Counts:
    """Operations and bytes on one matrix."""

    bfloat16: float = 0.0
    float32: float = 0.0
    factorisation: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def seconds(self, machine: Machine) -> float:
        return (
            self.bfloat16 / machine.bfloat16
            + self.float32 / machine.float32
            + self.factorisation / machine.factorisation
            + self.bytes / machine.memory
            + self.launches * machine.launch
        )


SHAPES = {
    "8B": (32, ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))),
    "70B": (80, ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))),
}
"""Blocks, and (d_out, d_in) of the matrices of one: Llama 3."""
INPUTS = {"8B": (4096, 4096, 4096, 14336), "70B": (8192, 8192, 8192, 28672)}
"""d_in of the different inputs of a block."""


def wanda(rows: int, d: int, _: dict[str, Any]) -> Counts:
    """Scale, six comparisons of the four planes, ranks, mask: some 15 float32 passes; the loss takes two products."""
    return Counts(float32=4.0 * rows * d**2, bytes=60.0 * rows * d, launches=60)


def sparsegpt(rows: int, d: int, _: dict[str, Any]) -> Counts:
    """Factor d³/3, inverse 2d³/3; updates rows d²; a group reads and writes half of its block of 128 columns."""
    inside, blocks = 2 * 4.0 * 64 * rows * (d / 4), 2 * 4.0 * rows * d * (d / 128) / 2
    return Counts(
        float32=rows * d**2 + 4.0 * rows * d**2,
        factorisation=d**3,
        bytes=inside + blocks + 8 * 4.0 * d**2,
        launches=14 * d / 4,
    )


def cg(rows: int, d: int, facts: dict[str, Any]) -> Counts:
    """One product a step and about 25 passes; four more products for the start and the losses."""
    steps = facts["refit_row_iterations"]
    return Counts(
        float32=(steps + 4) * 2.0 * rows * d**2, bytes=steps * 25 * 4.0 * rows * d, launches=25 * max(steps, 50)
    )


def _admm(rows: int, d: int, facts: dict[str, Any], every: int, passes: int, *, narrow: bool) -> Counts:
    """One product an iteration, and a factor with inverse, d³, every few of them."""
    iterations, of_rows = facts["iterations"], facts.get("row_iterations", facts["iterations"])
    product = of_rows * 2.0 * rows * d**2
    return Counts(
        bfloat16=product if narrow else 0.0,
        float32=0.0 if narrow else product,
        factorisation=math.ceil(iterations / every) * float(d) ** 3,
        bytes=of_rows * passes * 4.0 * rows * d,
        launches=40 * iterations,
    )


def alps(rows: int, d: int, facts: dict[str, Any]) -> Counts:
    """ADMM in float32, ρ new every 3 iterations; a projection in every one."""
    return _admm(rows, d, facts, 3, 35, narrow=False)


def prox_admm(rows: int, d: int, facts: dict[str, Any]) -> Counts:
    """ADMM with products in bfloat16, ρ new every 5 iterations."""
    return _admm(rows, d, facts, 5, 20, narrow=True)


def prox_gradient(rows: int, d: int, facts: dict[str, Any]) -> Counts:
    """Products in bfloat16; the spectral bound is a factorisation or two."""
    steps = facts["iterations"]
    return Counts(
        bfloat16=steps * 2.0 * rows * d**2,
        factorisation=2 * d**3 / 3,
        bytes=steps * 15 * 4.0 * rows * d,
        launches=20 * steps,
    )


Model = tuple[Callable[[int, int, dict[str, Any]], Counts], ...]
COUNTED: dict[str, Model] = {
    "wanda": (wanda,),
    "sparsegpt": (sparsegpt,),
    "sparsegpt+cg": (sparsegpt, cg),
    "alps+cg": (alps, cg),
    "prox-gradient+cg": (prox_gradient, cg),
    "fast+cg": (prox_admm, cg),
    "balanced+cg": (prox_admm, cg),
}
"""Exact swaps are not among them: their number grows with d_in in a way not measured."""


def statistics(model: str) -> Counts:
    """Gram matrices of all inputs of a model, once per input, and the sums they update."""
    blocks, _ = SHAPES[model]
    operations = blocks * sum(2.0 * TOKENS * d**2 for d in INPUTS[model])
    return Counts(float32=operations)


def forward(model: str) -> Counts:
    """Two passes of the calibration tokens, with the dense weights and the pruned ones, but for the attention."""
    blocks, shapes = SHAPES[model]
    return Counts(bfloat16=2 * blocks * sum(2.0 * TOKENS * rows * d for rows, d in shapes))


def matrices(model: str, parts: Model, facts: dict[str, Any]) -> Counts:
    """Sum a method's counts over all matrices of a model."""
    blocks, shapes = SHAPES[model]
    total = Counts()
    for rows, d in shapes:
        for part in parts:
            total += part(rows, d, facts)
    return Counts(*(blocks * value for value in vars(total).values()))


def print_prediction(entries: list[dict[str, Any]], machine: Machine | None = None) -> list[dict[str, Any]]:
    """Print and return the predicted hours, from the facts of the runs at each method's largest d_in."""
    machine = machine or Machine()
    print(
        "PREDICTION, not measured: solvers on one H100, from operation counts and bytes, assuming "
        f"{machine.bfloat16 / 1e12:.0f} Top/s for products in bfloat16, {machine.float32 / 1e12:.0f} in float32,\n"
        f"{machine.factorisation / 1e12:.0f} for factorisations, {machine.memory / 1e12:.1f} TB/s and "
        f"{machine.launch * 1e6:.0f} us a launch; iterations as measured here; {TOKENS} calibration tokens"
    )
    print(f"{'':17} {'model':>5} {'minutes':>9}   of which products, factorisations, bytes, launches (%)")
    common = {"forward passes": forward, "statistics": statistics}
    rows = [(name, model, count(model)) for model in SHAPES for name, count in common.items()]
    facts = {entry["method"]: entry["runs"][-1] for entry in entries}
    for name, parts in COUNTED.items():
        if name in facts:
            rows += [(name, model, matrices(model, parts, facts[name])) for model in SHAPES]
    result = []
    for name, model, counts in rows:
        seconds = counts.seconds(machine)
        shares = (
            counts.bfloat16 / machine.bfloat16 + counts.float32 / machine.float32,
            counts.factorisation / machine.factorisation,
            counts.bytes / machine.memory,
            counts.launches * machine.launch,
        )
        shown = " ".join(f"{100 * share / seconds:4.0f}" for share in shares)
        print(f"{name:17} {model:>5} {seconds / 60:9.1f}   {shown}")
        result.append({"what": name, "model": model, "predicted_seconds": seconds, **vars(counts)})
    return result
