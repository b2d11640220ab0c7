"""What a run tells: as it goes, to whoever displays it and to its log, and at the end, about every matrix and block."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.errors import counted
from halve.memory import peak_memory
from halve.model.layers import Layout, matrix_view
from halve.model.plan import Excluded, Plan
from halve.model.reconstruct import Tuned
from halve.order.folds import Order
from halve.run.phases import Phase
from halve.solve.outcome import Status

LOG = "log.jsonl"
"""The file of a run's log."""
AROUND = (
    *(Phase.LOAD, Phase.MEASURE, Phase.EVALUATE, Phase.CALIBRATE, Phase.DAMAGE),
    *(Phase.COMMIT, Phase.WRITE, Phase.VERIFY),
)
"""Phases of a run that are not pruning: reading the model, measuring its speed and perplexity, its calibration text;
and, where there is an output directory, keeping finished blocks, the checkpoint, and reading that again."""


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """What was done to one matrix.

    Attributes:
        name: the matrix (`halve.model.plan.Matrix`).
        parameter: the parameter that holds it.
        expert: its index in a fused parameter, or its group of a convolution; None for a parameter that is one matrix.
        shape: (d_out, d_in).
        layout: how it lies in its parameter.
        asked: the method asked for.
        method: the method that made the mask.
        refit: the refit asked for.
        status: how the solve ended.
        reason: empty unless something went otherwise than asked.
        facts: numbers, see `halve.solve.outcome.Outcome`.
    """

    name: str
    parameter: str
    expert: int | None
    shape: tuple[int, int]
    layout: Layout
    asked: str
    method: str
    refit: str
    status: Status
    reason: str
    facts: dict[str, float]

    def view(self, parameter: Tensor) -> Tensor:
        """Return the matrix (d_out, d_in) as it is in ``parameter``: see `halve.model.layers.matrix_view`."""
        return matrix_view(parameter, self.expert, self.layout, self.shape[0])


@dataclass(frozen=True)
class BlockReport:
    """What the reconstruction of one block achieved.

    Attributes:
        name: of the block.
        parameters: full names of the parameters that were tuned.
        tuned: errors before and after.
    """

    name: str
    parameters: tuple[str, ...]
    tuned: Tuned


@dataclass(frozen=True)
class WorkerReport:
    """What a worker did for a run that had several.

    Attributes:
        number: of the worker.
        node: name of its machine.
        shards: of the calibration set that it held in the end.
        seconds: by what it did (the methods of `halve.workers.worker.Worker`).
        waited: seconds without anything to do.
    """

    number: int
    node: str
    shards: tuple[int, ...]
    seconds: Mapping[str, float]
    waited: float


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run did.

    Attributes:
        matrices: one entry a pruned matrix, in order.
        excluded: parameters that stayed dense, with reasons.
        blocks: number of blocks.
        seconds: wall-clock seconds by phase: ``capture``, ``collect`` (forward passes that gather statistics),
            ``reorder`` (of channels), ``solve``, ``reconstruct``, ``replay`` (forward passes through the pruned block,
            and the dense one), and those in `AROUND`. Blocks that an earlier process finished count with what they took
            there.
        reconstructions: one entry a reconstructed block, in order.
        time_limit: seconds that solving was to take, None if there was no limit.
        resumed_blocks: number of blocks that an earlier process had finished.
        peak_memory: by phase, the most bytes of resident memory that were seen (`halve.run.phases.Phases`).
        peak_device_memory: by phase, the most bytes allocated on a CUDA device; empty without one.
        workers: what each of several workers did since this process began; empty without them.
        shards: parts of the calibration set that were summed by themselves.
        norms: full names of the statistics of batch norms that were estimated anew.
        orders: of channels that were reordered.
        folds_found: where channels might be reordered, in so many places that was guessed.
        folds_proven: in so many of those it was proven; where there is no order for one, none promised a lower loss.
        not_reordered: full names of blocks with matrices where nothing was reordered, though it was asked for by name.
    """

    matrices: tuple[MatrixReport, ...]
    excluded: tuple[Excluded, ...]
    blocks: int
    seconds: dict[str, float]
    reconstructions: tuple[BlockReport, ...] = ()
    time_limit: float | None = None
    resumed_blocks: int = 0
    peak_memory: Mapping[str, int] = field(default_factory=dict)
    peak_device_memory: Mapping[str, int] = field(default_factory=dict)
    workers: tuple[WorkerReport, ...] = ()
    shards: int = 1
    norms: tuple[str, ...] = ()
    orders: tuple[Order, ...] = ()
    folds_found: int = 0
    folds_proven: int = 0
    not_reordered: tuple[str, ...] = ()

    @property
    def changed(self) -> set[str]:
        """Names of the parameters and buffers that differ from the dense model's."""
        pruned = {matrix.parameter for matrix in self.matrices}
        tuned = (block.parameters for block in self.reconstructions)
        return pruned.union(self.norms, *tuned, *(order.parameters for order in self.orders))

    @property
    def seconds_of_pruning(self) -> float:
        """See the function of that name."""
        return seconds_of_pruning(self.seconds)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences the user should read."""
        return (*_of_matrices(self.matrices), *_of_time(self), *_of_blocks(self.reconstructions), *_of_orders(self))

    @property
    def fallbacks(self) -> tuple[MatrixReport, ...]:
        """The matrices that were pruned by another method than asked."""
        return tuple(matrix for matrix in self.matrices if matrix.status is Status.FELL_BACK)

    @property
    def mean_relative_loss(self) -> float:
        """Mean of the matrices' relative losses; NaN when no matrix has one (no statistics)."""
        losses = [m.facts["relative_loss"] for m in self.matrices if "relative_loss" in m.facts]
        return sum(losses) / len(losses) if losses else math.nan


def _of_orders(report: RunReport) -> list[str]:
    """Say where nothing was reordered, though it was asked for by name."""
    names = report.not_reordered
    if not names:
        return []
    sentence = (
        f"permute fold: nothing could be folded in {len(names)} of {counted(report.blocks, 'block')} (the first is "
        f"{names[0]}): no channels were found there that can be proven to move without a change, or no other order of "
        "them promised a lower loss; these blocks were pruned as they were"
    )
    return [sentence]


def seconds_of_pruning(seconds: Mapping[str, float]) -> float:
    """Return the seconds of all phases but those in `AROUND`."""
    return sum(value for phase, value in seconds.items() if phase not in AROUND)


@dataclass(frozen=True)
class Progress:
    """One step of a run, for whoever displays it.

    Attributes:
        block: index of the current block.
        blocks: number of blocks; 0 before the first is looked at, and after the last.
        phase: what is being done, or about to be.
        finished: matrices finished so far.
        matrices: matrices in all.
        matrix: the matrix just finished, in phase ``solve``, or taken over from an earlier process, in ``restore``.
        plan: what will be done, in phase ``plan``, before anything is.
        seconds_left: in phase ``generate``, how long the rest of the text takes; ``finished`` and ``matrices`` are then
            tokens. None where that is not known.
        caution: a sentence on what the run is going to suffer from, early enough to stop it: in phase ``collect``, once
            the statistics of the first block are there, or in any other. Empty where there is nothing to say.
        note: a sentence on how the work is shared out among workers; empty where there is nothing new.
    """

    block: int
    blocks: int
    phase: Phase
    finished: int
    matrices: int
    matrix: MatrixReport | None = None
    plan: Plan | None = None
    seconds_left: float | None = None
    caution: str = ""
    note: str = ""


Listener = Callable[[Progress], None]


def announce(listen: Listener | None, phase: Phase) -> None:
    """Tell a listener, if there is one, what is about to take long outside the blocks."""
    if listen is not None:
        listen(Progress(0, 0, phase, 0, 0))


def writing_told_to(listen: Listener | None) -> Callable[[int, int, float], None] | None:
    """Return what hears of the text that a model writes (`halve.text.generation.Listen`), and passes it on."""
    if listen is None:
        return None

    def tell(done: int, total: int, seconds_left: float) -> None:
        listen(Progress(0, 0, Phase.GENERATE, done, total, seconds_left=seconds_left))

    return tell


class RunLog:
    """Appends a line of JSON at every step and flushes it: phase, block, matrix, UTC time, peak memory so far.

    A line that cannot be written is left out: the log is never a reason to stop.

    Args:
        directory: that of the run, which is there already; earlier lines stay.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOG

    def __call__(self, step: Progress) -> None:
        """Write down one step."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "phase": step.phase,
            "block": step.block,
            "matrix": None if step.matrix is None else step.matrix.name,
            "relative_loss": None if step.matrix is None else step.matrix.facts.get("relative_loss"),
            "peak_memory_gb": round(peak_memory() / 1e9, 3),
            **({"note": step.note} if step.note else {}),
        }
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


_OVERFIT = (
    "methods and refits that use correlations overfit there, and losses on these tokens say little; use more samples, "
    "or --shrinkage auto"
)


def caution_of_few_tokens(block: Mapping[str, tuple[int, int]]) -> str:
    """Return the sentence for a block of which a matrix saw fewer tokens than it has inputs, or nothing.

    Args:
        block: by the name of a matrix, the number of its inputs, and of the tokens that it saw.
    """
    seen = {name: counts for name, counts in block.items() if 0 < counts[1] < counts[0]}
    if not seen:
        return ""
    name, (inputs, tokens) = max(seen.items(), key=lambda pair: pair[1][0] / pair[1][1])
    return f"{name} has {inputs} inputs and saw {tokens} calibration tokens: {_OVERFIT}"


def _of_matrices(reports: Sequence[MatrixReport]) -> list[str]:
    thin = [m for m in reports if m.status is not Status.FELL_BACK and 0 < m.facts.get("tokens", 0) < m.shape[1]]
    stopped = [m for m in reports if m.status is Status.MAX_ITER]
    fallen = [m for m in reports if m.status is Status.FELL_BACK]
    warnings = []
    if thin:
        remedy = (
            "their statistics were shrunk towards the diagonal, and more samples would serve better"
            if all(m.facts.get("shrinkage", 0.0) > 0.0 for m in thin)
            else _OVERFIT
        )
        warnings.append(
            f"{len(thin)} of {len(reports)} matrices saw fewer calibration tokens than they have inputs "
            f"({thin[0].name}: {thin[0].facts['tokens']:.0f} tokens, {thin[0].shape[1]} inputs): "
            f"{remedy}"
        )
    if stopped:
        matrices = counted(len(stopped), "matrix", "matrices")
        warnings.append(f"{matrices} stopped at an iteration limit (the first is {stopped[0].name})")
    if fallen:
        warnings.append(
            f"{len(fallen)} of {len(reports)} matrices fell back to another method "
            f"(the first is {fallen[0].name}: {fallen[0].reason}); halve.json names all"
        )
    if loose := [m for m in reports if is_off_grid(m)]:
        warnings.append(
            f"{len(loose)} of {len(reports)} matrices are no integers of 4 bits, which refit int4 was to make of them "
            f"(the first is {loose[0].name}): `halve pack --values int4` is going to round those"
        )
    return warnings


def is_off_grid(matrix: MatrixReport) -> bool:
    """Whether a matrix that fell back was not put on the grid of integers that was asked for."""
    return matrix.refit == "int4" and matrix.status is Status.FELL_BACK and "integer_gain" not in matrix.facts


def _of_time(report: RunReport) -> list[str]:
    solving = sum(matrix.facts.get("seconds", 0.0) for matrix in report.matrices)
    if report.time_limit is None or solving <= 1.1 * report.time_limit:
        return []
    sentence = (
        f"solving took {solving:.0f} s, more than the time limit of {report.time_limit:g} s: what is begun is "
        "finished, so begin with a lower effort"
    )
    return [sentence]


def _of_blocks(blocks: Sequence[BlockReport]) -> list[str]:
    stuck = [block for block in blocks if block.tuned.epoch == 0]
    if not stuck:
        return []
    where = "held-out batches" if stuck[0].tuned.held_out else "its batches"
    sentence = (
        f"the reconstruction of {len(stuck)} of {len(blocks)} blocks gained nothing on {where} and was undone "
        f"(the first is {stuck[0].name}): use more samples or a lower learning rate"
    )
    return [sentence]
