"""The one loop: plan, then block by block collect, solve, verify, write back.

Statistics of a block come from inputs that already passed the pruned earlier blocks, and weights travel to the device
one block at a time, as a float32 copy; the model keeps its own dtype and place.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halve.checkpoint.mapped import Weights
from halve.device import autocast
from halve.errors import CalibrationError, HalveError, InputError, LayerFailedError, UnsupportedModelError
from halve.maths.gram import Gradient, Statistics
from halve.memory import trim
from halve.model.blocks import Batch, check_batches, check_finite, eager_experts, working_copy
from halve.model.calls import Call, to_device
from halve.model.collect import Collector, Memory
from halve.model.gradients import LossGradients, one_by_one
from halve.model.plan import Matrix, Plan, set_matrix
from halve.model.reconstruct import Example, Reconstruction, Tuned, reconstruct, trainable
from halve.model.stacks import find_stacks
from halve.model.stream import Stream
from halve.model.survey import StackRun, plan_model
from halve.run.block_record import from_record, to_record
from halve.run.bundles import bundles, gradients_of_output, prune_bundle, share_of_time
from halve.run.directory import RunDirectory
from halve.run.events import BlockReport, Listener, MatrixReport, Progress, RunReport, caution_of_few_tokens
from halve.run.phases import Phase, Phases
from halve.run.settings import Settings
from halve.solve import methods
from halve.solve.gradient_scores import GradientOf
from halve.solve.outcome import Outcome, Status


def prune_blocks(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: Settings,
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    offload: Path | None = None,
    listen: Listener | None = None,
    collect: bool = True,
    ledger: RunDirectory | None = None,
    phases: Phases | None = None,
    before: Callable[[], None] | None = None,
    together: Collection[Sequence[str]] = (),
    masks: Mapping[str, torch.Tensor] | None = None,
    weights: Weights | None = None,
) -> RunReport:
    """Prune ``model`` in place, block by block.

    Args:
        model: a model on the CPU, in evaluation mode; its pruned parameters are overwritten as each block finishes.
        batches: calibration batches, keyword arguments of the model's forward; padded positions of an
            ``attention_mask`` are not counted.
        settings: what to do to every matrix.
        device: where blocks run and matrices are solved.
        precision: bfloat16 runs the blocks' products under autocast; statistics stay float32.
        offload: a directory for the hidden states of the calibration set; None keeps them in memory.
        listen: called at every step.
        collect: False prunes without statistics, for a method and refit that need none; ``batches`` then only serve
            to find out how the model is built.
        ledger: where every block is kept as it is finished; blocks that it has already are taken from it. None keeps
            nothing.
        phases: what already counts towards the run's seconds and memory; None begins at nothing.
        before: called once, when the plan is accepted and nothing has been changed yet.
        together: names of parameters that are stored in one tensor.
        masks: for each matrix by name, (d_out, d_in) bool of what it keeps: nothing is chosen, and the refit finds the
            best weights there; None lets the method choose.
        weights: where the model's weights lie; finished blocks are let go, where ``ledger`` keeps them. None is memory.

    Raises:
        LayerFailedError: a matrix could not be pruned and ``settings.fallback`` is None.
        CalibrationError: NaN or infinity in activations, or no statistics.
        UnsupportedModelError: see `plan_model`.
        CorruptFileError: a block in ``ledger`` was damaged.
        HalveError: a block could not be kept, the volume being full or broken.
    """
    check_batches(batches)
    of = methods.get(settings.method).gradient
    if of is not None:
        batches = one_by_one(batches)
    weights = weights or Weights()
    with weights.passing(block for stack in find_stacks(model) for block in stack.blocks):  # several whole passes
        plan, runs = plan_model(
            model,
            batches,
            settings.pattern,
            settings.skip,
            settings.why_dense,
            tower=settings.tower,
            together=together,
            least=settings.least_prunable,
        )
    routed = next((matrix for matrix in plan.matrices if matrix.routed), None)
    if settings.objective.insists_on_dense and routed is not None:
        raise InputError(
            f"match_dense pairs the tokens of the dense and the pruned model, which {routed.name} does not receive "
            "alike: set it to 0 for mixtures of experts"
        )
    tell = listen or (lambda _progress: None)
    phases = phases or Phases(device)
    loop = _Loop(model, plan, settings, device, precision, tell, ledger, phases, weights, collect=collect, masks=masks)
    with eager_experts(model):
        if of is GradientOf.LOSS and not loop.finished:
            loop.loss = LossGradients(model, plan, batches, device, settings.method)
        return loop.run(batches, runs, offload, before)


class _Loop:
    """The state of one run."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        settings: Settings,
        device: torch.device,
        precision: torch.dtype,
        listen: Listener,
        ledger: RunDirectory | None,
        phases: Phases,
        weights: Weights,
        *,
        collect: bool,
        masks: Mapping[str, torch.Tensor] | None,
    ) -> None:
        self._collecting = collect
        self._weights = weights
        self._masks = masks
        self._model = model
        self._plan = plan
        self._settings = settings
        self._device = device
        self._precision = precision
        self._listen = listen
        self._ledger = ledger
        self._kept = 0 if ledger is None else ledger.committed
        self._last = max(matrix.block for matrix in plan.matrices)  # beyond it no inputs are needed
        self._reports: list[MatrixReport] = []
        self._blocks: list[BlockReport] = []
        self._tuning = settings.reconstruction
        # Experts do not receive the same tokens from the dense model as from the pruned one.
        self._matching = settings.matches_dense and not any(matrix.routed for matrix in plan.matrices)
        self._phases = phases
        self._roots: dict[str, torch.Tensor] = {}
        self.loss: LossGradients | None = None
        """What gives the gradients of the dense model's loss, where the method weighs them."""

    @property
    def finished(self) -> bool:
        """Whether every block was pruned before."""
        return self._kept >= len(self._plan.blocks)

    def run(
        self,
        batches: Sequence[Batch],
        runs: Sequence[StackRun],
        offload: Path | None,
        before: Callable[[], None] | None,
    ) -> RunReport:
        members = [self._model.get_submodule(name) for name in self._plan.blocks]
        self._tell(0, Phase.PLAN, plan=self._plan)
        if before is not None:
            before()
        if not self.finished:
            self._take_loss_gradients()
            self._pass_stacks(members, runs, batches, offload)
        else:
            for index in range(len(members)):
                self._restore(index)
                self._settle(index)
        self._tell(len(members), Phase.DONE)
        return RunReport(
            matrices=tuple(self._reports),
            excluded=self._plan.excluded,
            blocks=len(members),
            seconds=dict(self._phases.seconds),
            reconstructions=tuple(self._blocks),
            time_limit=self._settings.options.get("time_limit"),
            resumed_blocks=self._kept,
            peak_memory=dict(self._phases.peak_memory),
            peak_device_memory=dict(self._phases.peak_device_memory),
        )

    def _take_loss_gradients(self) -> None:
        """Run the dense model backwards, for a method that weighs the gradients of its loss.

        A run that goes on does it again: blocks that are finished are put into the model only after.
        """
        if self.loss is None:
            return
        self._tell(0, Phase.GRADIENTS)
        remedy = "use forward_dtype float32"
        with self._phases.timing(Phase.GRADIENTS), self._lowered("the model cannot be run backwards", remedy):
            try:
                self._roots = self.loss.roots(self._precision)
            except torch.OutOfMemoryError as error:
                raise HalveError(
                    f"{self._device} ran out of memory in a backward pass through the model: use wanda++, whose "
                    "gradients are taken block by block, or shorter sequences (seq_len)"
                ) from error
        self.loss = None

    def _pass_stacks(
        self, members: Sequence[nn.Module], runs: Sequence[StackRun], batches: Sequence[Batch], offload: Path | None
    ) -> None:
        """Take both streams through the blocks of one stack after the other.

        What enters a later stack follows from the blocks of the earlier ones: the dense model's is recorded while it
        is dense, the pruned model's once they are pruned.
        """
        paired = self._matching or self._tuning is not None
        later: dict[str, Stream] = {}
        for run in runs[1:] if paired else ():
            later[run.name] = self._capture(0, run, batches, _folder(offload, run, "dense"))
        first = 0
        for run in runs:
            if first > self._last:
                break
            begins = run is runs[0]
            folder = offload if begins else _folder(offload, run, "pruned")
            stream = self._capture(first, run, batches, folder, copies=1 + (paired and begins))
            dense = later.pop(run.name, None) or (stream.fork("dense") if paired else None)
            for place in range(len(run.blocks)):
                passage = _Passage(first + place, place, stream, dense, last=place == len(run.blocks) - 1)
                self._pass_block(passage, members[first + place])
            first += len(run.blocks)
            del stream, dense, passage  # the next stack has hidden states of its own

    def _capture(
        self, block: int, run: StackRun, batches: Sequence[Batch], folder: Path | None, *, copies: int = 1
    ) -> Stream:
        self._tell(block, Phase.CAPTURE)
        ledger = self._ledger
        beside = None if ledger is None else ledger.hidden(f"{run.name}-{block}")
        reserved = 0 if ledger is None else ledger.reserved
        with self._phases.timing(Phase.CAPTURE):
            stream = run.capture(self._model, batches, folder, beside=beside, reserved=reserved, copies=copies)
        self._weights.release()  # rows of the embedding
        if stream.hidden.directory != folder:
            size = sum(path.stat().st_size for path in beside.iterdir()) if beside is not None else 0
            self._tell(
                block,
                Phase.CAPTURE,
                caution=f"the hidden states of the calibration set ({copies * size / 1e9:.1f} GB) are kept on disk, in "
                f"{beside}, since they would take more than half of the memory that is free",
            )
        return stream

    def _pass_block(self, at: "_Passage", block: nn.Module) -> None:
        """Take both streams through a block, which is pruned unless it was before."""
        if at.block < self._last:
            self._weights.fetch(self._plan.blocks[at.block + 1])
        work = working_copy(block, self._device)
        self._weights.release(self._plan.blocks[at.block])
        going_on = at.block < self._last and not at.last
        if at.block < self._kept:
            if at.dense is not None and going_on:
                self._advance(at, work, at.dense)
            self._restore(at.block, work)
        else:
            try:
                self._prune_block(at, work)
            except torch.OutOfMemoryError as error:
                raise HalveError(
                    f"{self._device} ran out of memory in {self._plan.blocks[at.block]}: use shorter sequences "
                    "(seq_len), or another device"
                ) from error
            if self._ledger is not None:
                with self._phases.timing(Phase.COMMIT):
                    self._commit(at.block, self._ledger)
        if self._collecting and going_on:
            self._advance(at, work, at.stream)
        at.stream.clear(at.place)
        if at.dense is not None:
            at.dense.clear(at.place)
        self._settle(at.block)

    def _own(self, name: str) -> nn.Parameter:
        """Return a parameter of the model that is going to be changed."""
        parameter = self._model.get_parameter(name)
        self._weights.own(parameter)
        return parameter

    def _settle(self, index: int) -> None:
        """Let the weights of a block go that is done with."""
        if self._ledger is not None:
            self._weights.settle(self._plan.blocks[index], self._ledger.path(index))
        trim()

    def _prune_block(self, at: "_Passage", work: nn.Module) -> None:
        matrices = self._plan.of_block(at.block)
        matching = at.dense if self._matching else None
        statistics: dict[str, Statistics | None] = {}
        if matrices and self._collecting:
            self._tell(at.block, Phase.COLLECT)
            with self._phases.timing(Phase.COLLECT):
                statistics = self._collect(at, work, matrices, matching)
            unwarned = not self._reports and not self._settings.as_followed.objective.shrinkage
            if unwarned and (caution := caution_of_few_tokens(statistics)):
                self._tell(at.block, Phase.COLLECT, caution=caution)
        if at.dense is not None and at.block <= self._last and (matching is None or not statistics):
            self._advance(at, work, at.dense)
        if matrices:
            gradients = self._gradients(at, work, matrices, statistics)
            with self._phases.timing(Phase.SOLVE):
                for bundle in list(bundles(matrices, statistics)):
                    self._solve(bundle, statistics.get(bundle[0].name), work, gradients)
                    for matrix in bundle:  # a Gram matrix may be gigabytes
                        statistics.pop(matrix.name, None)
            if at.dense is not None and self._tuning is not None:
                self._tell(at.block, Phase.RECONSTRUCT)
                with self._phases.timing(Phase.RECONSTRUCT):
                    tuned = self._reconstruct(at, work, matrices, at.dense, self._tuning)
                self._choose_rate(tuned)

    def _choose_rate(self, tuned: Tuned) -> None:
        """Keep the learning rate that the first block has chosen for the others."""
        if tuned.learning_rate is not None and self._tuning is not None:
            self._tuning = replace(self._tuning, learning_rate=tuned.learning_rate)

    def _commit(self, index: int, ledger: RunDirectory) -> None:
        """Keep a finished block."""
        name = self._plan.blocks[index]
        matrices = self._reports[len(self._reports) - len(self._plan.of_block(index)) :]
        tuned = next((block for block in self._blocks if block.name == name), None)
        changed = sorted({matrix.parameter for matrix in matrices}.union(tuned.parameters if tuned else ()))
        tensors = {parameter: self._model.get_parameter(parameter).data for parameter in changed}
        ledger.commit(tensors, to_record(matrices, tuned, self._phases.take()))

    def _restore(self, index: int, work: nn.Module | None = None) -> None:
        """Put a block that was finished before into the model and its working copy."""
        if self._ledger is None:
            return
        tensors, record = self._ledger.read(index)
        prefix = f"{self._plan.blocks[index]}."
        for name, tensor in tensors.items():
            self._own(name).data.copy_(tensor)
            if work is not None:
                work.get_parameter(name.removeprefix(prefix)).data.copy_(tensor)
        matrices, tuned, spent = from_record(record)
        self._phases.add(spent)
        for report in matrices:
            self._reports.append(report)
            self._tell(index, Phase.RESTORE, report)
        if tuned is not None:
            self._blocks.append(tuned)
            self._choose_rate(tuned.tuned)

    def _advance(self, at: "_Passage", work: nn.Module, stream: Stream) -> None:
        """Take a stream through the block."""
        self._tell(at.block, Phase.REPLAY)
        with self._phases.timing(Phase.REPLAY), autocast(work, self._precision):
            for batch in range(len(stream.hidden)):
                self._forward(at, batch, work, stream, keep=True)

    def _collect(
        self, at: "_Passage", work: nn.Module, matrices: Sequence[Matrix], dense: Stream | None
    ) -> dict[str, Statistics | None]:
        """Return the statistics of a block's inputs; a dense stream, if it is to be paired, goes through it too."""
        halves = self._settings.objective.chooses_shrinkage(self._settings.defaults)
        collector = Collector(work, self._plan.blocks[at.block], matrices, self._device, halves=halves)
        with autocast(work, self._precision), collector.watching():
            for batch in range(len(at.stream.hidden)):
                if dense is not None:
                    self._forward(at, batch, work, dense, keep=True, collector=collector)
                self._forward(at, batch, work, at.stream, collector=collector)
        found = collector.finish()
        trim()
        return found

    def _forward(
        self,
        at: "_Passage",
        batch: int,
        work: nn.Module,
        stream: Stream,
        *,
        keep: bool = False,
        collector: Collector | None = None,
    ) -> None:
        """Run the block on one batch of a stream, which goes on from there if it is to be kept."""

        def begin(hidden: torch.Tensor, call: Call) -> None:
            if collector is not None:
                seen = Memory.of(call, stream.memory_valid[batch], hidden) if stream.has_memory else None
                collector.start_batch(stream.valid[batch], seen, dense=stream is at.dense)

        with self._lowered(f"{self._plan.blocks[at.block]} fails", "use forward_dtype float32"):
            output = stream.run(at.place, batch, work, self._device, keep=keep, before=begin)
        check_finite(output, f"the outputs of {self._plan.blocks[at.block]} on calibration batch {batch}")

    @contextmanager
    def _lowered(self, what: str, remedy: str) -> Iterator[None]:
        """Say what may have come of products in less than float32, where something fails in them."""
        try:
            yield
        except RuntimeError as error:
            if self._precision == torch.float32 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedModelError(f"{what} with products in {self._precision} ({error}): {remedy}") from error

    def _gradients(
        self,
        at: "_Passage",
        work: nn.Module,
        matrices: Sequence[Matrix],
        statistics: Mapping[str, Statistics | None],
    ) -> dict[str, Gradient]:
        """Return the gradient of every matrix of a block by name, for a method that weighs them; else nothing."""
        of, samples = methods.get(self._settings.method).gradient, len(at.stream.hidden)
        if of is None:
            return {}
        if of is GradientOf.LOSS:
            found = {m.name: Gradient(m.view(self._roots[m.parameter]).to(self._device), samples) for m in matrices}
            for matrix in matrices:
                self._roots.pop(matrix.parameter, None)
            return found
        self._tell(at.block, Phase.GRADIENTS)
        block = self._plan.blocks[at.block]
        remedy = "use forward_dtype float32"
        with self._phases.timing(Phase.GRADIENTS), self._lowered(f"{block} cannot be run backwards", remedy):
            example = partial(self._example, at, at.stream)
            return gradients_of_output(
                work, block, matrices, statistics, self._settings, example, samples, self._precision
            )

    def _solve(
        self,
        bundle: Sequence[Matrix],
        statistics: Statistics | None,
        work: nn.Module,
        gradients: Mapping[str, Gradient],
    ) -> None:
        """Prune matrices that share their statistics, and put the results into the model and the working copy."""
        settings, routed = self._settings, self._collecting and bundle[0].routed
        weights = [matrix.view(self._model.get_parameter(matrix.parameter).data).to(self._device) for matrix in bundle]
        masks = None
        if self._masks is not None:
            masks = [self._masks[matrix.name].to(self._device) for matrix in bundle]
        own = [gradients[matrix.name] for matrix in bundle] if gradients else None
        options = self._options(bundle)
        outcomes = prune_bundle(
            bundle, weights, statistics, settings, options, routed=routed, masks=masks, gradients=own
        )
        for matrix, outcome in zip(bundle, outcomes, strict=True):
            self._put(matrix, outcome, work)

    def _options(self, bundle: Sequence[Matrix]) -> dict[str, Any]:
        """Return the options for these matrices: a time limit is their share of what is left of the model's."""
        options = dict(self._settings.options)
        if options.get("time_limit") is not None:
            spent = sum(report.facts.get("seconds", 0.0) for report in self._reports)
            ahead = self._plan.matrices[len(self._reports) :]
            options["time_limit"] = share_of_time(bundle, ahead, options["time_limit"] - spent)
        return options

    def _put(self, matrix: Matrix, outcome: Outcome, work: nn.Module) -> None:
        if outcome.status is Status.FAILED:
            advice = "; give a fallback to prune such layers by another method" if not self._settings.fallback else ""
            raise LayerFailedError(
                f"{matrix.name} could not be pruned by {self._settings.method}: {outcome.reason}{advice}"
            )
        set_matrix(self._own(matrix.parameter), matrix, outcome.weight)
        local = matrix.parameter.removeprefix(f"{self._plan.blocks[matrix.block]}.")
        set_matrix(work.get_parameter(local), matrix, outcome.weight)
        self._report(matrix, outcome)

    def _reconstruct(
        self, at: "_Passage", work: nn.Module, matrices: Sequence[Matrix], dense: Stream, options: Reconstruction
    ) -> Tuned:
        prefix = f"{self._plan.blocks[at.block]}."
        pruned = dict.fromkeys(matrix.parameter.removeprefix(prefix) for matrix in matrices)
        masks = {name: work.get_parameter(name) != 0 for name in pruned}
        example = partial(self._example, at, dense)
        original = self._model.get_submodule(prefix[:-1])
        stored = trainable(original, pruned, self._frozen(prefix))
        remedy = "leave out the reconstruction, or use forward_dtype float32"
        try:
            with self._lowered(f"{prefix[:-1]} cannot be reconstructed", remedy):
                tuned = reconstruct(work, masks, example, len(dense.hidden), options, self._precision, stored)
        except CalibrationError as error:
            raise CalibrationError(
                f"{prefix[:-1]}: {error}: leave out the reconstruction, or use other text"
            ) from error
        names = tuple(stored) if tuned.epoch else ()
        for name in names:
            self._own(prefix + name).data.copy_(work.get_parameter(name).data)
        self._blocks.append(BlockReport(prefix[:-1], tuple(prefix + name for name in names), tuned))
        return tuned

    def _example(self, at: "_Passage", targets: Stream, batch: int) -> Example:
        """Return a batch for the block, with what ``targets`` is at now."""
        states = (at.stream.hidden[batch], targets.hidden[batch])
        hidden, target = to_device(states, self._device, torch.float32)
        valid = at.stream.valid[batch]
        call = at.stream.call(at.place, batch, self._device)
        return Example(hidden, call, target, None if valid is None else valid.to(self._device))

    def _frozen(self, prefix: str) -> set[str]:
        """Names in a block of the parameters that other modules share or that the user asked to leave alone."""
        everything = list(self._model.named_parameters(remove_duplicate=False))
        uses = Counter(id(parameter) for _, parameter in everything)
        return {
            name.removeprefix(prefix)
            for name, parameter in everything
            if name.startswith(prefix)
            and (uses[id(parameter)] > 1 or any(fnmatchcase(name, skipped) for skipped in self._settings.skip))
        }

    def _report(self, matrix: Matrix, outcome: Outcome) -> None:
        report = MatrixReport(
            name=matrix.name,
            parameter=matrix.parameter,
            expert=matrix.expert,
            shape=(matrix.d_out, matrix.d_in),
            layout=matrix.layout,
            asked=self._settings.method,
            method=outcome.method,
            refit=self._settings.refit,
            status=outcome.status,
            reason=outcome.reason,
            facts=outcome.facts,
        )
        self._reports.append(report)
        self._tell(matrix.block, Phase.SOLVE, report)

    def _tell(self, block: int, phase: Phase, matrix: MatrixReport | None = None, **others: Any) -> None:
        finished, total = len(self._reports), len(self._plan.matrices)
        self._listen(Progress(block, len(self._plan.blocks), phase, finished, total, matrix, **others))


@dataclass(frozen=True)
class _Passage:
    """A block, and the streams that are taken through it.

    Attributes:
        block: the block's index in the plan.
        place: its index in its stack.
        stream: the pruned model's.
        dense: the dense model's, if it is needed.
        last: whether it is the last block of its stack, after which the streams are not needed.
    """

    block: int
    place: int
    stream: Stream
    dense: Stream | None
    last: bool


def _folder(offload: Path | None, run: StackRun, kind: str) -> Path | None:
    """Make a folder for the hidden states of a later stack, if they are to be on disk."""
    if offload is None:
        return None
    folder = offload / f"{run.name}-{kind}"
    folder.mkdir()
    return folder
