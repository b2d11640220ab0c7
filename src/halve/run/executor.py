"""Who takes the calibration set through the blocks and solves their matrices: this process, or others for it.

The loop (`halve.run.loop`) decides what is done and keeps what comes out; an executor does the work of a block, step by
step. The calibration set is cut into shards. What is summed over a block's inputs is summed shard by shard, and the
shards' sums are added up in their order, so that the same bytes come out wherever each shard was run.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halve.checkpoint.mapped import Weights
from halve.maths.gram import Gradient, Statistics
from halve.model.blocks import Batch
from halve.model.collect import Sums
from halve.model.gradients import LossGradients
from halve.model.plan import Matrix, Plan
from halve.model.reconstruct import Reconstruction, Tuned
from halve.model.survey import StackRun
from halve.order.folds import Order
from halve.order.reordering import Reordered
from halve.run.batch_norms import ESTIMATE, batch_norms
from halve.run.bundles import bytes_of_sums, home_of_sums, likely_input, prune_bundle
from halve.run.events import WorkerReport
from halve.run.phases import Phase, Phases
from halve.run.settings import Settings
from halve.solve.outcome import Outcome


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of a matrix without their statistics.

    Attributes:
        leader: the matrix under whose name they were summed.
        d_in: number of input features.
        tokens: number of input vectors.
    """

    leader: str
    d_in: int
    tokens: int


class Executor(Protocol):
    """Does the work of one block after the other. Blocks come in order, each either by `follow`, or by the rest."""

    def begin(self, block: int) -> None:
        """Make ready for a block; where it begins a stack, record what enters that."""

    def follow(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Pass a block that was finished before.

        Args:
            block: its index in the plan.
            tensors: its parameters that differ from the dense model's, by full name.
        """

    def collect(self, block: int) -> Mapping[str, Inputs]:
        """Gather the statistics of a block's inputs, and return what they are of, by matrix."""

    def reorder(self, block: int) -> Reordered:
        """Choose orders of a block's channels and go on with the block in them; called once its inputs are gathered."""

    def solve(
        self, block: int, bundles: Sequence[Sequence[Matrix]], options: Callable[[Sequence[Matrix]], dict[str, Any]]
    ) -> Iterator[list[Outcome]]:
        """Prune the matrices of a block, bundle by bundle, and yield the outcomes of each in their order.

        Args:
            block: its index in the plan.
            bundles: matrices that share their statistics.
            options: of method and refit for a bundle, asked for when it is begun.
        """

    def estimate_norms(self, block: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Estimate the statistics of a block's batch norms anew (`halve.run.batch_norms`).

        Args:
            block: its index in the plan.
            tensors: its pruned parameters, by full name.

        Returns:
            dict[str, Tensor]: the new statistics, buffers by full name; none where the block has no batch norms.
        """

    def reconstruct(
        self, block: int, tensors: Mapping[str, Tensor], options: Reconstruction
    ) -> tuple[Tuned, dict[str, Tensor]]:
        """Tune what is left of a block.

        Args:
            block: its index in the plan.
            tensors: its pruned parameters, by full name.
            options: how to tune.

        Returns:
            tuple[Tuned, dict[str, Tensor]]: what that achieved, and the parameters that it changed, by full name.
        """

    def finish(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Take the pruned model's hidden states through a block that is finished; ``tensors`` as for `follow`."""

    def reports(self) -> tuple[WorkerReport, ...]:
        """Return what every worker did, if there were several."""

    def leave(self) -> None:
        """Let everything go, whether the work is done or not."""


class Tell(Protocol):
    """Tells of what an executor is doing with a block."""

    def __call__(self, block: int, phase: Phase, *, caution: str = "", note: str = "") -> None:
        """Tell of a phase, with sentences as `halve.run.events.Progress` has them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an executor works on.

    Attributes:
        model: on the CPU, in evaluation mode.
        plan: what is pruned.
        runs: how to run each stack of it.
        batches: of the calibration set, or of a part of it.
        numbers: of each batch in the whole set.
        shards: ranges of ``batches``, in their order.
        settings: what to do to every matrix.
        device: where blocks run and matrices are solved.
        precision: of the products in forward passes.
        weights: where the model's weights lie.
        offload: a directory for hidden states; None keeps them in memory.
        hidden: a place for hidden states that would take too much memory, by name; None where there is none.
        reserved: bytes on the volume of that place that something else is going to take.
        phases: where seconds and memory are counted.
        tell: told of a block's phase.
        collect: False where no statistics are needed.
        masks: see `halve.run.loop.prune_blocks`.
        loss: what gives the gradients of the dense model's loss, where the method weighs them.
        fixed: full names of parameters whose channels must not move.
        neighbours: how many processes of this machine keep as much as this one, itself included.
    """

    model: nn.Module
    plan: Plan
    runs: Sequence[StackRun]
    batches: Sequence[Batch]
    numbers: Sequence[int]
    shards: Sequence[range]
    settings: Settings
    device: torch.device
    precision: torch.dtype
    weights: Weights
    offload: Path | None = None
    hidden: Callable[[str], Path] | None = None
    reserved: int = 0
    phases: Phases
    tell: Tell
    collect: bool = True
    masks: Mapping[str, Tensor] | None = None
    loss: LossGradients | None = None
    fixed: Collection[str] = ()
    neighbours: int = 1

    @property
    def matching(self) -> bool:
        """Whether the dense model's inputs are paired with the pruned model's.

        Experts do not receive the same tokens from the dense model as from the pruned one.
        """
        return self.settings.matches_dense and not any(matrix.routed for matrix in self.plan.matrices)

    def home_of_sums(self, block: int) -> torch.device:
        """Return where the inputs of a block are summed (`halve.run.bundles.home_of_sums`)."""
        inputs = {likely_input(m.parameter, m.d_in, m.expert): m.d_in for m in self.plan.of_block(block)}
        halves = self.settings.objective.chooses_shrinkage(self.settings.defaults)
        return home_of_sums(bytes_of_sums(inputs.values(), halves=halves, cross=self.matching), self.device)

    @cached_property
    def last(self) -> int:
        """Index of the last block in which something is changed: beyond it no inputs are needed."""
        pruned = max(matrix.block for matrix in self.plan.matrices)
        if self.settings.batch_norm != ESTIMATE or not self.collect:
            return pruned
        normed = (index for index, name in enumerate(self.plan.blocks) if batch_norms(self.model.get_submodule(name)))
        return max([pruned, *normed])


def cut(batches: int, shards: int) -> list[range]:
    """Cut so many batches into shards: neighbours, as many in each as in the others, or one more in the first ones.

    Args:
        batches: how many there are.
        shards: how many are asked for; there are no more than batches.
    """
    count = max(1, min(batches, shards))
    least, more = divmod(batches, count)
    edges = [index * least + min(index, more) for index in range(count + 1)]
    return [range(first, after) for first, after in pairwise(edges)]


def solve_bundle(
    job: Job,
    bundle: Sequence[Matrix],
    statistics: Statistics | None,
    options: Mapping[str, Any],
    gradients: Sequence[Gradient] | None = None,
    orders: Sequence[Order] = (),
) -> list[Outcome]:
    """Prune matrices of a job's model that share their statistics; the model is left as it is.

    Args:
        job: what is worked on.
        bundle: the matrices.
        statistics: of their inputs, in their orders; None where none are needed.
        options: of method and refit.
        gradients: of each, for a method that weighs them.
        orders: that the matrices come into first; what the model has is in these already where there are none.

    Raises:
        HalveError: as `halve.run.bundles.prune_bundle`.
    """
    stored = {matrix.parameter: job.model.get_parameter(matrix.parameter).data for matrix in bundle}
    for order in orders:
        stored |= order.applied(stored)
    weights = [matrix.view(stored[matrix.parameter]).to(job.device) for matrix in bundle]
    masks = None if job.masks is None else [job.masks[matrix.name].to(job.device) for matrix in bundle]
    return prune_bundle(
        bundle,
        weights,
        None if statistics is None else statistics.to(job.device),
        job.settings,
        options,
        routed=job.collect and bundle[0].routed,
        masks=masks,
        gradients=gradients,
    )


def inputs_of(sums: Sums) -> dict[str, Inputs]:
    """Return what was summed of, by matrix."""
    found = {}
    for name, leader in sums.leaders.items():
        accumulator = sums.accumulators[leader]
        found[name] = Inputs(leader, accumulator.d_in, accumulator.tokens)
    return found
