"""The calibration set on its way through the blocks in this process, and what is done to each block with it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.device import autocast
from halve.errors import CalibrationError, HalveError, UnsupportedModelError, first_few
from halve.maths.gram import Gradient, Statistics
from halve.memory import trim
from halve.model.blocks import check_finite, working_copy
from halve.model.calls import Call, to_device
from halve.model.collect import Collector, Memory, Sums
from halve.model.layers import parameter_or_buffer
from halve.model.plan import Matrix
from halve.model.reconstruct import Example, Reconstruction, Tuned, reconstruct, trainable
from halve.model.stream import Stream
from halve.model.survey import StackRun
from halve.order.folds import Fold, permute
from halve.order.reordering import Reordered, Reorderer, reordered, shared_parameters
from halve.order.trial import Trial
from halve.run.batch_norms import LEAST, STATISTICS, batch_norms, estimate
from halve.run.bundles import gradients_of_output
from halve.run.events import WorkerReport
from halve.run.executor import Inputs, Job, inputs_of, solve_bundle
from halve.run.phases import Phase
from halve.solve import methods
from halve.solve.gradient_scores import GradientOf
from halve.solve.outcome import Outcome

_IN_FLOAT32 = "use forward_dtype float32"


@dataclass(frozen=True)
class _Passage:
    """A block, and the streams that are taken through it.

    Attributes:
        block: the block's index in the plan.
        place: its index in its stack.
        work: a float32 copy of it on the device.
        stream: the pruned model's.
        dense: the dense model's, if it is needed.
        goes_on: whether a later block of its stack needs the streams.
    """

    block: int
    place: int
    work: nn.Module
    stream: Stream
    dense: Stream | None
    goes_on: bool


class LocalExecutor:
    """Does the work in this process.

    Args:
        job: what to work on.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._paired = job.matching or job.settings.reconstruction is not None
        self._starts: dict[int, StackRun] = {}
        first = 0
        for run in job.runs:
            self._starts[first] = run
            first += len(run.blocks)
        self._run = job.runs[0]
        self._stream: Stream | None = None
        self._dense: Stream | None = None
        self._later: dict[str, Stream] = {}
        self._at: _Passage | None = None
        self._once: set[torch.Size] = set()
        self._statistics: dict[str, Statistics | None] = {}
        self._roots: dict[str, Tensor] = {}
        self._loss = job.loss
        self._short: Stream | None = None
        self._reorderer: Reorderer | None = None
        if job.settings.reorders:
            self._reorderer = Reorderer(job.settings.pattern, shared_parameters(job.model).union(job.fixed))

    def begin(self, block: int) -> None:
        """See `Executor`."""
        job = self._job
        if not block:
            self._take_loss_gradients()
        if block in self._starts:
            self._enter(block, self._starts[block])
        if block < job.last:
            job.weights.fetch(job.plan.blocks[block + 1])
        name = job.plan.blocks[block]
        work = working_copy(job.model.get_submodule(name), job.device)
        job.weights.release(name)
        place = block - next(first for first, run in self._starts.items() if run is self._run)
        if self._stream is None:
            raise AssertionError
        goes_on = block < job.last and place < len(self._run.blocks) - 1
        self._at = _Passage(block, place, work, self._stream, self._dense, goes_on)
        self._once = set()

    def _enter(self, block: int, run: StackRun) -> None:
        """Record what enters a stack.

        What enters a later one follows from the blocks of the earlier ones: the dense model's is recorded while it is
        dense, the pruned model's once they are pruned.
        """
        job = self._job
        self._stream = self._dense = None  # hidden states of an earlier stack
        if not block and self._paired:
            for later in job.runs[1:]:
                self._later[later.name] = self._capture(0, later, _folder(job.offload, later, "dense"))
        folder = job.offload if not block else _folder(job.offload, run, "pruned")
        self._run = run
        self._short = None if self._reorderer is None else run.capture(job.model, run.short)
        self._stream = self._capture(block, run, folder, copies=1 + (self._paired and not block))
        self._dense = self._later.pop(run.name, None) or (self._stream.fork("dense") if self._paired else None)

    def _capture(self, block: int, run: StackRun, folder: Path | None, *, copies: int = 1) -> Stream:
        job = self._job
        job.tell(block, Phase.CAPTURE)
        beside = None if job.hidden is None else job.hidden(f"{run.name}-{block}")
        with job.phases.timing(Phase.CAPTURE):
            kept = copies * job.neighbours
            stream = run.capture(job.model, job.batches, folder, beside=beside, reserved=job.reserved, copies=kept)
        job.weights.release()  # rows of the embedding
        if stream.hidden.directory != folder:
            size = sum(path.stat().st_size for path in beside.iterdir()) if beside is not None else 0
            caution = (
                f"the hidden states of the calibration set ({copies * size / 1e9:.1f} GB) are kept on disk, in "
                f"{beside}, since they would take more than half of the memory that is free"
            )
            job.tell(block, Phase.CAPTURE, caution=caution)
        return stream

    def _take_loss_gradients(self) -> None:
        """Run the dense model backwards, for a method that weighs the gradients of its loss.

        A run that goes on does it again: blocks that are finished are put into the model only after.
        """
        if self._loss is None:
            return
        job = self._job
        job.tell(0, Phase.GRADIENTS)
        with job.phases.timing(Phase.GRADIENTS), self._lowered("the model cannot be run backwards", _IN_FLOAT32):
            try:
                self._roots = self._loss.roots(job.precision)
            except torch.OutOfMemoryError as error:
                raise HalveError(
                    f"{job.device} ran out of memory in a backward pass through the model: use wanda++, whose "
                    "gradients are taken block by block, or shorter sequences (seq_len)"
                ) from error
        self._loss = None

    def follow(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Executor`."""
        at = self._passage(block)
        if at.dense is not None and at.goes_on:
            self._advance(at, at.dense)
        self.finish(block, tensors)

    def collect(self, block: int) -> dict[str, Inputs]:
        """See `Executor`."""
        total: Sums | None = None
        for sums in self.shard_sums(block):
            if total is None:
                total = sums
            else:
                total.absorb(sums)
        matrices = self._job.plan.of_block(block)
        self._statistics = {}
        if total is None:
            return {}
        inputs = inputs_of(total)
        self._statistics = total.finish(matrices)
        trim()
        return inputs

    def shard_sums(self, block: int) -> Iterator[Sums]:
        """Yield what is summed over the inputs of a block, shard by shard; nothing where none is needed.

        Once all are taken, the dense model's hidden states have passed the block.
        """
        job, at = self._job, self._passage(block)
        matrices = job.plan.of_block(block)
        collecting = bool(matrices) and job.collect
        if collecting:
            job.tell(block, Phase.COLLECT)
            for shard in job.shards:
                with job.phases.timing(Phase.COLLECT):
                    sums = self._sums(at, matrices, shard)
                yield sums
        if at.dense is not None and block <= job.last and not (collecting and job.matching):
            self._advance(at, at.dense)

    def _sums(self, at: _Passage, matrices: Sequence[Matrix], shard: range) -> Sums:
        """Sum over the inputs of a block in a shard; a dense stream, if it is to be paired, goes through it too."""
        job = self._job
        halves = job.settings.objective.chooses_shrinkage(job.settings.defaults)
        prefix, home = job.plan.blocks[at.block], job.home_of_sums(at.block)
        once = self._once if at.goes_on else None  # the last block is not run again, and its outputs are looked at here
        collector = Collector(at.work, prefix, matrices, home, halves=halves, once=once)
        with autocast(at.work, job.precision), collector.watching():
            for batch in shard:
                if at.dense is not None and job.matching:
                    self._forward(at, batch, at.dense, keep=True, collector=collector)
                self._forward(at, batch, at.stream, collector=collector)
        return collector.take()

    def reorder(self, block: int) -> Reordered:
        """See `Executor`."""
        job, at = self._job, self._passage(block)
        if self._reorderer is None or self._short is None:
            return Reordered()
        job.tell(block, Phase.REORDER)
        with job.phases.timing(Phase.REORDER):
            name, matrices = job.plan.blocks[block], job.plan.of_block(block)
            folds, found = self.folds(block)
            warn = partial(self._caution, block, Phase.REORDER)
            orders = self._reorderer.choose(name, at.work, folds, matrices, self._statistics, warn)
            for order in orders:
                permute(at.work, order.fold, order.channels)
                for matrix in matrices:
                    statistics, index = self._statistics.get(matrix.name), order.of_inputs(matrix)
                    if statistics is not None and index is not None:
                        self._statistics[matrix.name] = reordered(statistics, index)
                self._roots |= order.applied(self._roots)
        return Reordered(tuple(orders), found, len(folds))

    def folds(self, block: int) -> tuple[list[Fold], int]:
        """Return the proven folds of a block, and how many were found (`halve.order.reordering.Reorderer.folds`)."""
        job, at = self._job, self._passage(block)
        if self._reorderer is None or self._short is None:
            return [], 0
        trial = Trial(at.work, self._short, at.place, job.device, torch.Generator().manual_seed(block))
        return self._reorderer.folds(job.plan.blocks[block], trial, job.plan.of_block(block), block)

    def _caution(self, block: int, phase: Phase, sentence: str) -> None:
        self._job.tell(block, phase, caution=sentence)

    def solve(
        self, block: int, bundles: Sequence[Sequence[Matrix]], options: Callable[[Sequence[Matrix]], dict[str, Any]]
    ) -> Iterator[list[Outcome]]:
        """See `Executor`."""
        job, at = self._job, self._passage(block)
        gradients = self._gradients(at)
        with job.phases.timing(Phase.SOLVE):
            for bundle in bundles:
                statistics = self._statistics.get(bundle[0].name)
                own = [gradients[matrix.name] for matrix in bundle] if gradients else None
                outcomes = solve_bundle(job, bundle, statistics, options(bundle), own)
                yield outcomes
                for matrix in bundle:  # the weights are put into the block at its end
                    self._statistics.pop(matrix.name, None)  # a Gram matrix may be gigabytes
                del statistics

    def estimate_norms(self, block: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor`."""
        job, at = self._job, self._passage(block)
        if not batch_norms(at.work):
            return {}
        if any(valid is not None for valid in at.stream.valid):
            caution = "the calibration data is padded, which batch norms would count: their statistics stay as they are"
            job.tell(block, Phase.NORMS, caution=caution)
            return {}
        self._put(at, tensors)
        job.tell(block, Phase.NORMS)
        with job.phases.timing(Phase.NORMS), autocast(at.work, job.precision):
            found = estimate(at.work, lambda batch: self._forward(at, batch, at.stream), len(at.stream.hidden))
        if left := [norm for norm in batch_norms(at.work) if f"{norm}.{STATISTICS[0]}" not in found]:
            caution = (
                f"{first_few(left)} of {job.plan.blocks[block]} saw fewer than {LEAST} values a channel: the "
                "statistics of such batch norms stay as they are; give more samples"
            )
            job.tell(block, Phase.NORMS, caution=caution)
        return {f"{job.plan.blocks[block]}.{name}": tensor for name, tensor in found.items()}

    def reconstruct(
        self, block: int, tensors: Mapping[str, Tensor], options: Reconstruction
    ) -> tuple[Tuned, dict[str, Tensor]]:
        """See `Executor`."""
        job, at = self._job, self._passage(block)
        self._put(at, tensors)
        if at.dense is None:
            raise AssertionError
        name = job.plan.blocks[block]
        matrices = job.plan.of_block(block)
        pruned = dict.fromkeys(self._local(at, matrix.parameter) for matrix in matrices)
        masks = {local: at.work.get_parameter(local) != 0 for local in pruned}
        stored = trainable(job.model.get_submodule(name), pruned, self._frozen(f"{name}."))
        example = partial(self._example, at, at.dense)
        remedy = "leave out the reconstruction, or use forward_dtype float32"
        job.tell(block, Phase.RECONSTRUCT)
        with job.phases.timing(Phase.RECONSTRUCT):
            try:
                with self._lowered(f"{name} cannot be reconstructed", remedy):
                    tuned = reconstruct(at.work, masks, example, len(job.batches), options, job.precision, stored)
            except CalibrationError as error:
                raise CalibrationError(f"{name}: {error}: leave out the reconstruction, or use other text") from error
        names = tuple(stored) if tuned.epoch else ()
        return tuned, {f"{name}.{local}": at.work.get_parameter(local).data for local in names}

    def finish(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Executor`."""
        at = self._passage(block)
        self._put(at, tensors)
        if self._job.collect and at.goes_on:
            self._advance(at, at.stream)
        at.stream.clear(at.place)
        if self._short is not None:
            for sample in range(len(self._short.hidden) if at.goes_on else 0):
                self._short.run(at.place, sample, at.work, self._job.device, keep=True)
            self._short.clear(at.place)
        if at.dense is not None:
            at.dense.clear(at.place)
        self._at = None

    def reports(self) -> tuple[WorkerReport, ...]:
        """See `Executor`."""
        return ()

    def leave(self) -> None:
        """See `Executor`."""
        self._stream = self._dense = self._short = self._at = None
        self._later.clear()

    def _put(self, at: _Passage, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            parameter_or_buffer(at.work, self._local(at, name)).data.copy_(tensor)

    def _passage(self, block: int) -> _Passage:
        if self._at is None or self._at.block != block:
            raise RuntimeError(f"block {block} was not begun")
        return self._at

    def _local(self, at: _Passage, name: str) -> str:
        return name.removeprefix(f"{self._job.plan.blocks[at.block]}.")

    def _advance(self, at: _Passage, stream: Stream) -> None:
        """Take a stream through the block."""
        job = self._job
        job.tell(at.block, Phase.REPLAY)
        with job.phases.timing(Phase.REPLAY), autocast(at.work, job.precision):
            for batch in range(len(stream.hidden)):
                self._forward(at, batch, stream, keep=True)

    def _forward(
        self, at: _Passage, batch: int, stream: Stream, *, keep: bool = False, collector: Collector | None = None
    ) -> None:
        """Run the block on one batch of a stream, which goes on from there if it is to be kept."""

        def begin(hidden: Tensor, call: Call) -> None:
            if collector is not None:
                seen = Memory.of(call, stream.memory_valid[batch], hidden) if stream.has_memory else None
                collector.start_batch(stream.valid[batch], seen, dense=stream is at.dense, shape=hidden.shape)

        name = self._job.plan.blocks[at.block]
        with self._lowered(f"{name} fails", _IN_FLOAT32):
            output = stream.run(at.place, batch, at.work, self._job.device, keep=keep, before=begin)
        if collector is not None and collector.end_batch():
            return
        check_finite(output, f"the outputs of {name} on calibration batch {self._job.numbers[batch]}")

    @contextmanager
    def _lowered(self, what: str, remedy: str) -> Iterator[None]:
        """Say what may have come of products in less than float32, where something fails in them."""
        precision = self._job.precision
        try:
            yield
        except RuntimeError as error:
            if precision == torch.float32 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedModelError(f"{what} with products in {precision} ({error}): {remedy}") from error

    def _gradients(self, at: _Passage) -> dict[str, Gradient]:
        """Return the gradient of every matrix of a block by name, for a method that weighs them; else nothing."""
        job = self._job
        of, samples = methods.get(job.settings.method).gradient, len(job.batches)
        matrices = job.plan.of_block(at.block)
        if of is None:
            return {}
        if of is GradientOf.LOSS:
            found = {m.name: Gradient(m.view(self._roots[m.parameter]).to(job.device), samples) for m in matrices}
            for matrix in matrices:
                self._roots.pop(matrix.parameter, None)
            return found
        job.tell(at.block, Phase.GRADIENTS)
        block = job.plan.blocks[at.block]
        example = partial(self._example, at, at.stream)
        with job.phases.timing(Phase.GRADIENTS), self._lowered(f"{block} cannot be run backwards", _IN_FLOAT32):
            return gradients_of_output(
                at.work, block, matrices, self._statistics, job.settings, example, samples, job.precision
            )

    def _example(self, at: _Passage, targets: Stream, batch: int) -> Example:
        """Return a batch for the block, with what ``targets`` is at now."""
        device = self._job.device
        states = (at.stream.hidden[batch], targets.hidden[batch])
        hidden, target = to_device(states, device, torch.float32)
        valid = at.stream.valid[batch]
        call = at.stream.call(at.place, batch, device)
        return Example(hidden, call, target, None if valid is None else valid.to(device))

    def _frozen(self, prefix: str) -> set[str]:
        """Names in a block of the parameters that other modules share or that the user asked to leave alone."""
        everything = list(self._job.model.named_parameters(remove_duplicate=False))
        uses = Counter(id(parameter) for _, parameter in everything)
        skip = self._job.settings.skip
        return {
            name.removeprefix(prefix)
            for name, parameter in everything
            if name.startswith(prefix)
            and (uses[id(parameter)] > 1 or any(fnmatchcase(name, skipped) for skipped in skip))
        }


def _folder(offload: Path | None, run: StackRun, kind: str) -> Path | None:
    """Make a folder for the hidden states of a later stack, if they are to be on disk."""
    if offload is None:
        return None
    folder = offload / f"{run.name}-{kind}"
    folder.mkdir()
    return folder
