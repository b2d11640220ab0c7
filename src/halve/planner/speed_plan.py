"""Before pruning: where sparsity makes a model faster on this machine, and how much that is end to end.

Every shape of matrix is multiplied dense and sparse at every batch, and the rest of the model is timed. By Amdahl's
law the whole is then ``(rest + dense) / (rest + sparse)`` times as fast.
"""

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halve.checks import check_count
from halve.device import resolve_device
from halve.errors import InputError
from halve.maths.grid import Bits
from halve.maths.pattern import Pattern
from halve.memory import free_memory
from halve.planner import dense_engine, packed_decoding, rest
from halve.planner.conclusion import conclusion
from halve.planner.dense_engine import Decoding, DenseEngine
from halve.planner.outline import PAPER, PAPER_BATCHES, PRESETS, Kind, LeftDense, Outline, outline
from halve.planner.rest import Rest
from halve.recorded import pattern_on_disk
from halve.runtime import speed
from halve.runtime.quantised_matrix import Values, bits_of, check_values
from halve.runtime.speed import Speed

FORMAT = 1
"""Version of the layout of `SpeedPlan.as_json`."""
BATCHES = (1, 8, 64, 2048)

PlanListener = Callable[[str, int, int], None]
"""Called with what is about to be measured, how many measurements are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A product that was not measured for want of memory.

    Attributes:
        d_out: rows of the matrix.
        d_in: its columns.
        batch: rows of the product.
        needed_bytes: what measuring it takes.
        free_bytes: what there is.
    """

    d_out: int
    d_in: int
    batch: int
    needed_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Seconds of one forward pass at a batch.

    Attributes:
        batch: rows of the products.
        rest_seconds: all that is not a prunable matrix.
        dense_seconds: of all prunable matrices, dense.
        sparse_seconds: of the same, sparse.
        faster_seconds: of the same, each the faster of the two.
    """

    batch: int
    rest_seconds: float
    dense_seconds: float
    sparse_seconds: float
    faster_seconds: float

    @property
    def everywhere(self) -> float:
        """How many times as fast the model is with every matrix sparse."""
        return (self.rest_seconds + self.dense_seconds) / (self.rest_seconds + self.sparse_seconds)

    @property
    def where_faster(self) -> float:
        """How many times as fast the model is with only the matrices sparse that gain."""
        return (self.rest_seconds + self.dense_seconds) / (self.rest_seconds + self.faster_seconds)


@dataclass(frozen=True, kw_only=True)
class SpeedPlan:
    """What `plan` found.

    Attributes:
        model: what was planned for.
        pattern: of the sparse matrices.
        values: what they hold: ``own``, ``bf16``, ``int8`` or ``int4``.
        dtype: of dense weights and of inputs.
        device: where it was measured.
        batches: rows of the products, in order.
        kinds: the prunable matrices.
        left_dense: the other parameters of two or more dimensions.
        speeds: one a shape and batch.
        left_out: shapes and batches that do not fit into the memory.
        rests: by batch, the time of everything else, or why it was not measured.
        machine: what it was measured on.
        against: how fast packed weights decode, and then each kind of the dense engine's; empty if none was asked for.
    """

    model: str
    pattern: str
    values: Values
    dtype: torch.dtype
    device: torch.device
    batches: tuple[int, ...]
    kinds: tuple[Kind, ...]
    left_dense: tuple[LeftDense, ...] = field(repr=False)
    speeds: tuple[Speed, ...] = field(repr=False)
    left_out: tuple[LeftOut, ...]
    rests: dict[int, Rest | str] = field(repr=False)
    machine: dict[str, Any]
    against: tuple[Decoding, ...] = ()

    def speed(self, kind: Kind, batch: int) -> Speed | None:
        """Return how fast products with such a matrix are, None where that was not measured."""
        wanted = (*kind.shape, batch)
        return next((row for row in self.speeds if (row.d_out, row.d_in, row.batch) == wanted), None)

    def gain(self, batch: int) -> Gain | str:
        """Return the times of a whole forward pass, or why they are not known."""
        measured = self.rests[batch]
        if isinstance(measured, str):
            return measured
        rows = [(kind, self.speed(kind, batch)) for kind in self.kinds]
        missing = next((kind for kind, row in rows if row is None), None)
        if missing is not None:
            return f"{missing.name} does not fit into the memory"
        found = [(kind.count, row) for kind, row in rows if row is not None]
        return Gain(
            batch=batch,
            rest_seconds=measured.seconds,
            dense_seconds=sum(count * row.dense_seconds for count, row in found),
            sparse_seconds=sum(count * row.sparse_seconds for count, row in found),
            faster_seconds=sum(count * min(row.dense_seconds, row.sparse_seconds) for count, row in found),
        )

    def dense_bytes(self, kind: Kind) -> int:
        """Return the bytes of all matrices of a kind, dense."""
        return kind.count * kind.d_out * kind.d_in * self.dtype.itemsize

    def packed_bytes(self, kind: Kind) -> int:
        """Return the bytes of all matrices of a kind, packed as this device multiplies them."""
        pattern = Pattern(self.pattern)
        bits = bits_of(self.values, pattern)
        return kind.count * speed.sparse_bytes(*kind.shape, pattern, self.dtype, self.device, bits)

    @property
    def sentence(self) -> str:
        """What the user is to take away."""
        gains = {batch: self.gain(batch) for batch in self.batches}
        known = {batch: gain for batch, gain in gains.items() if isinstance(gain, Gain)}
        products = [
            (row.ratio, kind.name, row.batch)
            for kind in self.kinds
            for row in self.speeds
            if (row.d_out, row.d_in) == kind.shape
        ]
        text = conclusion(
            self.pattern,
            {batch: gain.everywhere for batch, gain in known.items()},
            {batch: gain.where_faster for batch, gain in known.items()},
            {batch: gain for batch, gain in gains.items() if isinstance(gain, str)},
            max(products, default=None, key=lambda product: product[0]),
            of_device=self.device.type == "cuda",
        )
        return f"{text} {dense_engine.said(self.against, self.pattern)}" if self.against else text

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values, the keys always in the same order."""
        return {
            "format": FORMAT,
            "model": self.model,
            "pattern": self.pattern,
            "values": self.values,
            "dtype": _name(self.dtype),
            "device": str(self.device),
            "batches": list(self.batches),
            "machine": self.machine,
            "matrices": [
                vars(kind) | {"dense_bytes": self.dense_bytes(kind), "packed_bytes": self.packed_bytes(kind)}
                for kind in self.kinds
            ],
            "left_dense": [vars(entry) | {"shape": list(entry.shape)} for entry in self.left_dense],
            "products": [vars(row) | {"speedup": row.ratio} for row in self.speeds],
            "left_out": [dict(vars(entry)) for entry in self.left_out],
            "rest": rest.as_json(self.rests),
            "end_to_end": [_gain_json(batch, self.gain(batch)) for batch in self.batches],
            "against": [row.as_json(self.against[0]) for row in self.against],
            "conclusion": self.sentence,
        }


def plan(
    model: nn.Module | str | Path,
    *,
    batches: Sequence[int] | None = None,
    pattern: str | Pattern | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    values: Values = "own",
    against: DenseEngine | None = None,
    trust_remote_code: bool = False,
    listen: PlanListener | None = None,
) -> SpeedPlan:
    """Measure where sparsity would make a model faster on this machine, before anything is pruned.

    Of a model on disk or on the hub only the settings are read: values do not change the times.

    Args:
        model: in memory, a directory, a ``.gguf`` file, a hub id, or a preset: ``llama-8b``, ``llama-70b`` (the shapes
            of Llama 3), or ``paper`` (both models' matrices).
        batches: rows of the products, each at least 1: sequences decoded at once, or tokens of a prompt. None is 1, 8,
            64 and 2048, and what the paper measured for its preset.
        pattern: ``N:M`` or ``S%``; on a GPU only ``2:4``. None is what a directory's ``halve.json`` says that it was
            pruned to, and ``2:4`` for any other model.
        device: ``auto``, ``cpu``, ``cuda``, …
        dtype: of weights and inputs; None takes the model's own, float32 for GGUF, bfloat16 for a preset.
        values: what sparse weights hold: numbers of ``dtype`` (``own``, or ``bf16``, which ``dtype`` must then be), or
            integers, ``int8`` or ``int4``, at 2:4; dense ones hold ``dtype`` whatever it is.
        against: a dense engine to decode one sequence beside packed weights on the CPU, such as `halve.LlamaCpp()`.
        trust_remote_code: whether to run Python code that comes with the model.
        listen: called before every measurement.

    Raises:
        InputError: an argument cannot be used, nothing of the model could be sparse, this machine has no such
            products, or the engine is not installed.
        UnsupportedModelError: the model has no stack of blocks, or its settings are not supported, by the engine
            neither.
        CorruptFileError: a file of the model is damaged.
    """
    check_values(values)
    parsed, place = _pattern_of(model) if pattern is None else Pattern.parse(pattern), resolve_device(device)
    bits = bits_of(values, parsed)
    rows = _checked(batches, model)
    speed.check_measurable(parsed, dtype or torch.bfloat16, place, bits)  # what depends on its dtype comes later
    found = outline(model, trust_remote_code=trust_remote_code)
    dtype = found.dtype if dtype is None else dtype
    speed.check_measurable(parsed, dtype, place, bits)
    if values == "bf16" and dtype != torch.bfloat16:
        raise InputError(f"values is 'bf16', and the model is {_name(dtype)}: leave it out, or give dtype bfloat16")
    if against is not None:
        dense_engine.check_engine(against, found.name, found.skeletons, place.type, min(rows))
    machine = describe_machine(place, bits)  # before our own work is load
    kinds, left_dense = found.kinds(parsed, dtype, place)
    shapes = list(dict.fromkeys(kind.shape for kind in kinds))
    fits = {shape: _fitting(*shape, rows, parsed, dtype, place, bits) for shape in shapes}
    products = {shape: fitting for shape, (fitting, _) in fits.items() if fitting}
    whole = [batch for batch in rows if any(batch in fitting for fitting in products.values())]
    contenders = 0 if against is None else 1 + len(against.kinds)
    steps = _Steps(listen, len(products) + (len(whole) if len(found.skeletons) == 1 else 0) + contenders)
    speeds: list[Speed] = []
    for (d_out, d_in), fitting in products.items():
        steps.next(f"{d_out} x {d_in}")
        speeds += speed.measure(d_out, d_in, fitting, pattern=parsed, dtype=dtype, device=place, bits=bits)
    rests = _rests(found, whole, rows, parsed, dtype, place, steps)
    beside: tuple[Decoding, ...] = ()
    if against is not None:
        beside = dense_engine.measure_beside(
            against,
            found.skeletons[0],
            packed_decoding.packed_name(parsed, values, dtype),
            lambda blocks: packed_decoding.packed_seconds(found.skeletons[0], blocks, parsed, values, dtype),
            threads=machine["threads"],
            listen=steps.next,
        )
    return SpeedPlan(
        model=found.name,
        pattern=parsed.text,
        values=values,
        dtype=dtype,
        device=place,
        batches=rows,
        kinds=kinds,
        left_dense=left_dense,
        speeds=tuple(speeds),
        left_out=tuple(row for _, others in fits.values() for row in others),
        rests=rests,
        machine=machine,
        against=beside,
    )


def _pattern_of(model: nn.Module | str | Path) -> Pattern:
    found = None if isinstance(model, nn.Module) or model in PRESETS else pattern_on_disk(model)
    return found or Pattern("2:4")


def describe_machine(device: torch.device, bits: Bits | None = None) -> dict[str, Any]:
    """Return what decides the times, as plain JSON values; ``load`` is what else is running, if that is known."""
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "sparse_products": speed.describe(device, bits),
    }


class _Steps:
    """Counts measurements for a listener."""

    def __init__(self, listen: PlanListener | None, total: int) -> None:
        self._listen = listen
        self._total = total
        self._done = 0

    def next(self, what: str) -> None:
        if self._listen is not None:
            self._listen(what, self._done, self._total)
        self._done += 1


def _checked(batches: Sequence[int] | None, model: nn.Module | str | Path) -> tuple[int, ...]:
    if batches is None:
        return PAPER_BATCHES if model == PAPER else BATCHES
    if isinstance(batches, int) or not batches:
        raise InputError(f"batches is {batches!r}: give a list of numbers, such as [1, 8]")
    for batch in batches:
        check_count("batch", batch)
    return tuple(dict.fromkeys(batches))


def _fitting(
    d_out: int,
    d_in: int,
    batches: Sequence[int],
    pattern: Pattern,
    dtype: torch.dtype,
    device: torch.device,
    bits: Bits | None,
) -> tuple[list[int], list[LeftOut]]:
    """Return the batches at which a shape can be measured in the memory there is, and the others."""
    free = free_memory(device)
    needed_for = partial(speed.needed_bytes, d_out, d_in, pattern=pattern, dtype=dtype, device=device, bits=bits)
    needs = {batch: needed_for(batch) for batch in batches}
    return (
        [batch for batch, needed in needs.items() if needed <= free],
        [
            LeftOut(d_out=d_out, d_in=d_in, batch=batch, needed_bytes=needed, free_bytes=free)
            for batch, needed in needs.items()
            if needed > free
        ],
    )


def _rests(
    found: Outline,
    measured: Sequence[int],
    batches: Sequence[int],
    pattern: Pattern,
    dtype: torch.dtype,
    device: torch.device,
    steps: _Steps,
) -> dict[int, Rest | str]:
    if len(found.skeletons) > 1:
        return dict.fromkeys(batches, f"{found.name} is the matrices of more than one model")
    return dict.fromkeys(batches, "no product fits into the memory") | rest.measure_rest(
        found.skeletons[0],
        measured,
        pattern=pattern,
        dtype=dtype,
        device=device,
        free=free_memory(device),
        listen=lambda batch: steps.next(f"the rest of the model at batch {batch}"),
    )


def _gain_json(batch: int, gain: Gain | str) -> dict[str, Any]:
    if isinstance(gain, str):
        return {"batch": batch, "reason": gain}
    return vars(gain) | {"speedup": gain.everywhere, "speedup_where_faster": gain.where_faster}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_name() -> str | None:
    """Return the model's name where Linux tells it, else the architecture; `platform` never names the model there."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        if name := next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""):
            return name
    return platform.processor() or platform.machine() or None
