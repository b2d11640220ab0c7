"""What a run takes of memory and disk: the parts that can be counted, of the moment that takes most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from halve.errors import InputError
from halve.forecast.beside import order_bytes
from halve.forecast.shapes import BlockShape, Bundle, Shapes
from halve.run.bundles import BUNDLE_WEIGHTS, bytes_of_sums
from halve.solve import methods

_FLOAT, _DOUBLE = 4, 8
_TUNING = 7
"""Copies of a block while it is reconstructed: itself, as it was, its gradients, two moments, and two best ones."""
_LIBRARIES = 250_000_000
"""Bytes of what is loaded later, such as compiled kernels, and of what libraries of matrix products work in."""
_PLANES = {"prox-admm": 11.0, "auto": 11.0, "alps": 12.0, "sparsegpt": 7.0}
"""Copies of the matrices that a method has at once, in float32; of others that are not solved by rows `_FEW`."""
_BY_ROWS = 6 << 25
"""Bytes of the rows that a method which is solved by rows has at once (`halve.maths.linalg.in_parts`)."""
_SQUARES = {"prox-admm": 5.0, "auto": 5.0, "alps": 7.0, "sparsegpt": 4.0}
"""Copies of H that a method has at once besides the statistics; of others none."""
_CROSS_SQUARES = 2.0
"""So many more where the dense model's outputs are the targets."""
_FEW, _REFIT_PLANES = 5.0, 8.0
_DOUBT = 1.25
"""How far the memory may be foreseen too high: a run is refused only where that much more than is free is needed."""


@dataclass(frozen=True)
class Plan:
    """What decides how much a run takes.

    Attributes:
        tokens: of the calibration set.
        batch: tokens in one of its batches.
        state: bytes of a number in the hidden states.
        method: that prunes.
        refit: of what is kept.
        statistics: Gram matrices for each input: 0, 1, or 3 where the tokens' halves are kept apart.
        cross: whether there is one more, between the dense model's inputs and the pruned model's.
        paired: whether the dense model's hidden states are there too.
        tuned: whether blocks are reconstructed.
        streamed: whether the weights stay on disk.
        offloaded: whether hidden states do.
        device: where blocks run.
        shards: parts of the calibration set that are summed by themselves.
        sums_on_host: whether a GPU leaves the sums over inputs to the machine (`halve.run.bundles.home_of_sums`), but
            for the statistics of what is being solved.
        ordered: whether channels are reordered.
        normed: whether batch norms are estimated anew.
        judged: tokens that the damage of pruning is measured on; 0 where it is not.
        judged_batch: of these in a batch.
        logits: positions with logits for each of these.
    """

    tokens: int
    batch: int
    state: int
    method: str
    refit: str
    statistics: int
    cross: bool
    paired: bool
    tuned: bool
    streamed: bool
    offloaded: bool
    device: torch.device
    shards: int = 1
    sums_on_host: bool = False
    ordered: bool = False
    normed: bool = False
    judged: int = 0
    judged_batch: int = 0
    logits: float = 1.0


@dataclass(frozen=True)
class Needs:
    """Bytes by what they are for.

    Attributes:
        memory: of the machine, at the moment that takes most.
        on_device: of the GPU where blocks run; empty on a CPU.
        disk: in the output directory and beside it.
    """

    memory: Mapping[str, int]
    on_device: Mapping[str, int]
    disk: Mapping[str, int]

    def check(self, memory: int, on_device: int) -> None:
        """Refuse a run that cannot fit, also if what is foreseen is somewhat too much.

        Args:
            memory: bytes that are free.
            on_device: bytes that are free on the GPU.

        Raises:
            InputError: more is needed; the sentence names the largest parts, and what would help.
        """
        for where, parts, free in (("memory", self.memory, memory), ("GPU memory", self.on_device, on_device)):
            needed = sum(parts.values())
            if parts and needed > _DOUBT * free:
                largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
                told = ", ".join(f"{what} {size / 1e9:.1f} GB" for what, size in largest)
                raise InputError(
                    f"the run needs about {needed / 1e9:.1f} GB of {where} ({told}) and {free / 1e9:.1f} GB are free: "
                    "give fewer samples or a shorter seq_len, offload for hidden states, stream = 'always', a method "
                    "that takes less, such as wanda, or a machine with more"
                )


def needs(shapes: Shapes, plan: Plan, used: int, output: int, computed: int = 0) -> Needs:
    """Add up what a run takes.

    Args:
        shapes: of the model.
        plan: of the run.
        used: bytes that this process has already.
        output: bytes of the checkpoint that is written.
        computed: bytes of weights that loading computes, and puts beside the run where the others stay on disk.
    """
    largest = max(shapes.blocks, key=lambda block: _working(block, shapes, plan))
    hidden = plan.tokens * shapes.width * plan.state * (1 + plan.paired)
    host: dict[str, int] = {"this process": used + _LIBRARIES}
    if plan.streamed:
        host["pruned weights of a block"] = largest.size
    else:
        host["the weights"] = shapes.size
    if not plan.offloaded:
        host["hidden states"] = hidden
    working = _parts(largest, shapes, plan)
    on_cpu = plan.device.type == "cpu"
    if plan.sums_on_host:
        host["statistics"] = max(min(plan.shards, 2) * sums_of(largest, plan), _kept(largest.bundles, plan))
    memory, on_device = (host | working, {}) if on_cpu else (host, working)
    if plan.judged:  # before there are hidden states and statistics
        judging = _judging(shapes, plan)
        before = {"this process": host["this process"]}
        if not plan.streamed:
            before["the weights"] = shapes.size
        first, first_on_device = (before | judging, {}) if on_cpu else (before, judging)
        memory, on_device = max(memory, first, key=_total), max(on_device, first_on_device, key=_total)
    disk = {"the checkpoint": output, "finished blocks, until it is written": shapes.inside}
    if plan.offloaded:
        disk["hidden states"] = hidden
    if plan.streamed and computed:
        disk["weights that loading computes"] = computed
    return Needs(memory, on_device, disk)


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _judging(shapes: Shapes, plan: Plan) -> dict[str, int]:
    """Return what measuring the damage of pruning takes where it is done."""
    logits = plan.judged_batch * plan.logits * shapes.classes
    copied = plan.device.type != "cpu" or shapes.size != _FLOAT * shapes.count
    return {
        "the model in float32": _FLOAT * shapes.count if copied else 0,
        "what blocks return": _FLOAT * plan.judged_batch * shapes.width * len(shapes.blocks),
        "probabilities": int(4 * _FLOAT * logits),
    }


def _working(block: BlockShape, shapes: Shapes, plan: Plan) -> int:
    return sum(_parts(block, shapes, plan).values())


def sums_of(block: BlockShape, plan: Plan) -> int:
    """Return the bytes of the sums of one shard over a block's inputs."""
    if not plan.statistics:
        return 0
    widths = (each.d_in for each in block.bundles for _ in range(each.experts))
    return bytes_of_sums(widths, halves=plan.statistics > 1, cross=plan.cross)


def _kept(bundles: Sequence[Bundle], plan: Plan) -> int:
    """Return the bytes of the statistics of some bundles."""
    return sum((plan.statistics + plan.cross) * each.experts * each.d_in**2 for each in bundles) * _FLOAT


def _parts(block: BlockShape, shapes: Shapes, plan: Plan) -> dict[str, int]:
    """Return what a block takes where it is worked on, in the phase that takes most."""
    sums, kept = min(plan.shards, 2) * sums_of(block, plan), _kept(block.bundles, plan)
    if plan.sums_on_host:
        widest_alone = sorted(block.bundles, key=lambda each: each.d_in)[-1:]
        sums, kept = 0, _kept([replace(each, experts=1) for each in widest_alone], plan)
    copy = block.count * _FLOAT
    widest = max((each.d_in for each in block.bundles), default=0)
    outputs = max((max(each.rows) for each in block.bundles), default=0)
    passing = int(2 * plan.batch * block.positions * (shapes.width + max(outputs, widest)) * _FLOAT)
    solver = max((_solver(each, plan) for each in block.bundles), default=0)
    phases = [
        {"a block in float32": copy, "statistics": sums, "a forward pass": passing},
        {"a block in float32": copy, "statistics": kept, "the solver": solver},
    ]
    if plan.ordered:
        phases.append(
            {"a block in float32": copy, "statistics": kept, "an order of channels": order_bytes(block, shapes)}
        )
    if plan.normed and block.norms:
        doubled = int(3 * _DOUBLE * plan.batch * block.positions * max(block.norms))
        phases.append({"a block in float32": copy, "a forward pass": passing, "inputs of a batch norm": doubled})
    if plan.tuned:
        phases.append({"a block and what trains it": _TUNING * copy, "statistics": kept, "a forward pass": 4 * passing})
    return max(phases, key=lambda phase: sum(phase.values()))


def _solver(bundle: Bundle, plan: Plan) -> int:
    """Return what method and refit take besides the statistics while they prune a bundle."""
    weights = sum(bundle.rows) * bundle.d_in
    by_rows, refitted = methods.get(plan.method).by_rows, plan.refit != "none"
    if by_rows and not refitted:
        return 2 * weights * plan.state + min(_BY_ROWS, 6 * _FLOAT * weights)
    together = min(weights, max(BUNDLE_WEIGHTS, max(bundle.rows) * bundle.d_in))
    planes = max(_PLANES.get(plan.method, 0.0 if by_rows else _FEW), _REFIT_PLANES if refitted else 0.0)
    own = _SQUARES.get(plan.method, 0.0)
    own += _CROSS_SQUARES if own and plan.cross else 0.0
    squares = max(own, 1.0 if refitted else 0.0, 3.0 if plan.statistics > 1 else 0.0)
    return int(_FLOAT * (planes * together + squares * bundle.d_in**2))
