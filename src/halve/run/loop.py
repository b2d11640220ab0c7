"""The one loop: plan, then block by block collect, solve, verify, write back.

Statistics of a block come from inputs that already passed the pruned earlier blocks, and weights travel to the device
one block at a time, as a float32 copy; the model keeps its own dtype and place.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halve.device import autocast
from halve.errors import CalibrationError, HalveError, InputError, LayerFailedError, UnsupportedModelError
from halve.maths.gram import Statistics
from halve.maths.pattern import Pattern
from halve.model import blocks as stream_of
from halve.model.blocks import Batch, HiddenStates, Stream
from halve.model.collect import Collector, observe
from halve.model.layers import Matrix, Plan, find_stack, make_plan, set_matrix
from halve.model.reconstruct import Example, Reconstruction, Tuned, reconstruct, trainable
from halve.run.block_record import from_record, to_record
from halve.run.bundles import bundles, prune_bundle, share_of_time
from halve.run.directory import RunDirectory
from halve.run.events import BlockReport, Listener, MatrixReport, Progress, RunReport, caution_of_few_tokens
from halve.run.phases import Phase, Phases
from halve.run.settings import Settings
from halve.solve.outcome import Outcome, Status


def plan_model(
    model: nn.Module,
    batch: Batch,
    pattern: Pattern,
    skip: Sequence[str] = (),
    why_dense: Callable[[Matrix], str] | None = None,
) -> tuple[Plan, list[Any]]:
    """Decide what will be pruned, and prove on a short sample that the model can be run block by block.

    Args:
        model: the model, on the CPU, in evaluation mode.
        batch: a calibration batch; a short part of it is run.
        pattern: the sparsity pattern.
        skip: shell-style patterns of parameters that stay dense.
        why_dense: as for `halve.model.layers.make_plan`.

    Returns:
        tuple[Plan, list[Any]]: the plan, and what each block returns (for `halve.model.blocks.capture`).

    Raises:
        UnsupportedModelError: the model cannot be run block by block, or a parameter cannot be classified.
        InputError: nothing is left to prune, or a skip pattern matches nothing.
    """
    _, stack = find_stack(model)
    members = list(stack)
    short = stream_of.probe_batch(batch)
    with stream_of.eager_experts(model):
        returns = stream_of.verify_replay(model, members, short)
        observed = observe(model, members, lambda: stream_of.run_model(model, short))
    plan = make_plan(model, pattern, observed.layouts, skip, why_dense)
    for matrix in plan.matrices:
        if not matrix.routed and matrix.parameter not in observed.called:
            raise UnsupportedModelError(
                f"the model uses {matrix.name} without calling its layer, so its inputs cannot be seen: "
                "leave it dense with skip"
            )
    return plan, returns


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

    Raises:
        LayerFailedError: a matrix could not be pruned and ``settings.fallback`` is None.
        CalibrationError: NaN or infinity in activations, or no statistics.
        UnsupportedModelError: see `plan_model`.
        CorruptFileError: a block in ``ledger`` was damaged.
        HalveError: a block could not be kept, the volume being full or broken.
    """
    stream_of.check_batches(batches)
    plan, returns = plan_model(model, batches[0], settings.pattern, settings.skip, settings.why_dense)
    routed = next((matrix for matrix in plan.matrices if matrix.routed), None)
    if settings.objective.insists_on_dense and routed is not None:
        raise InputError(
            f"match_dense pairs the tokens of the dense and the pruned model, which {routed.name} does not receive "
            "alike: set it to 0 for mixtures of experts"
        )
    tell = listen or (lambda _progress: None)
    loop = _Loop(model, plan, settings, device, precision, tell, ledger, phases or Phases(device), collect=collect)
    with stream_of.eager_experts(model):
        return loop.run(batches, returns, offload, before)


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
        *,
        collect: bool,
    ) -> None:
        self._collecting = collect
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

    def run(
        self,
        batches: Sequence[Batch],
        returns: Sequence[Any],
        offload: Path | None,
        before: Callable[[], None] | None,
    ) -> RunReport:
        members = [self._model.get_submodule(name) for name in self._plan.blocks]
        self._tell(0, Phase.PLAN, plan=self._plan)
        if before is not None:
            before()
        if self._kept < len(members):
            self._tell(0, Phase.CAPTURE)
            paired = self._matching or self._tuning is not None
            with self._phases.timing(Phase.CAPTURE):
                stream = stream_of.capture(self._model, members, batches, returns, offload, copies=1 + paired)
                dense = stream.hidden.copy("dense") if paired else None
            for index, block in enumerate(members):
                self._pass_block(index, block, stream, dense)
        else:
            for index in range(len(members)):
                self._restore(index)
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

    def _pass_block(self, index: int, block: nn.Module, stream: Stream, dense: HiddenStates | None) -> None:
        """Take both streams through a block, which is pruned unless it was before."""
        work = stream_of.working_copy(block, self._device)
        if index < self._kept:
            if dense is not None and index < self._last:
                self._advance(index, work, stream, dense)
            self._restore(index, work)
        else:
            try:
                self._prune_block(index, work, stream, dense)
            except torch.OutOfMemoryError as error:
                raise HalveError(
                    f"{self._device} ran out of memory in {self._plan.blocks[index]}: use shorter sequences (seq_len), "
                    "or another device"
                ) from error
            if self._ledger is not None:
                with self._phases.timing(Phase.COMMIT):
                    self._commit(index, self._ledger)
        if self._collecting and index < self._last:
            self._advance(index, work, stream, stream.hidden)
        stream.calls[index].clear()

    def _prune_block(self, index: int, work: nn.Module, stream: Stream, dense: HiddenStates | None) -> None:
        matrices = self._plan.of_block(index)
        matching = dense if self._matching else None
        statistics: dict[str, Statistics | None] = {}
        if matrices and self._collecting:
            self._tell(index, Phase.COLLECT)
            with self._phases.timing(Phase.COLLECT):
                statistics = self._collect(index, work, matrices, stream, matching)
            unwarned = not self._reports and not self._settings.as_followed.objective.shrinkage
            if unwarned and (caution := caution_of_few_tokens(statistics)):
                self._tell(index, Phase.COLLECT, caution=caution)
        if dense is not None and index <= self._last and (matching is None or not statistics):
            self._advance(index, work, stream, dense)
        if matrices:
            with self._phases.timing(Phase.SOLVE):
                for bundle in bundles(matrices, statistics):
                    self._solve(bundle, statistics.get(bundle[0].name), work)
            if dense is not None and self._tuning is not None:
                self._tell(index, Phase.RECONSTRUCT)
                with self._phases.timing(Phase.RECONSTRUCT):
                    tuned = self._reconstruct(index, work, matrices, stream, dense, self._tuning)
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
            self._model.get_parameter(name).data.copy_(tensor)
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

    def _advance(self, index: int, work: nn.Module, stream: Stream, hidden: HiddenStates) -> None:
        """Take hidden states through the block, in place."""
        self._tell(index, Phase.REPLAY)
        with self._phases.timing(Phase.REPLAY), autocast(work, self._precision):
            for batch in range(len(hidden)):
                hidden[batch] = self._forward(index, batch, work, stream, hidden)

    def _collect(
        self,
        index: int,
        work: nn.Module,
        matrices: Sequence[Matrix],
        stream: Stream,
        dense: HiddenStates | None,
    ) -> dict[str, Statistics | None]:
        """Return the statistics of a block's inputs; ``dense`` states, if they are to be paired, go through it too."""
        halves = self._settings.objective.chooses_shrinkage(self._settings.defaults)
        collector = Collector(work, self._plan.blocks[index], matrices, self._device, halves=halves)
        with autocast(work, self._precision), collector.watching():
            for batch in range(len(stream.hidden)):
                if dense is not None:
                    collector.start_batch(stream.valid[batch], dense=True)
                    dense[batch] = self._forward(index, batch, work, stream, dense)
                collector.start_batch(stream.valid[batch])
                self._forward(index, batch, work, stream, stream.hidden)
        return collector.finish()

    def _forward(self, index: int, batch: int, work: nn.Module, stream: Stream, states: HiddenStates) -> torch.Tensor:
        hidden, call = stream_of.to_device((states[batch], stream.calls[index][batch]), self._device, torch.float32)
        with self._lowered(f"{self._plan.blocks[index]} fails", "use forward_dtype float32"):
            output = stream_of.run_block(work, hidden, call)
        stream_of.check_finite(output, f"the outputs of {self._plan.blocks[index]} on calibration batch {batch}")
        return output

    @contextmanager
    def _lowered(self, what: str, remedy: str) -> Iterator[None]:
        """Say what may have come of products in less than float32, where something fails in them."""
        try:
            yield
        except RuntimeError as error:
            if self._precision == torch.float32 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedModelError(f"{what} with products in {self._precision} ({error}): {remedy}") from error

    def _solve(self, bundle: Sequence[Matrix], statistics: Statistics | None, work: nn.Module) -> None:
        """Prune matrices that share their statistics, and put the results into the model and the working copy."""
        settings, routed = self._settings, self._collecting and bundle[0].routed
        weights = [matrix.view(self._model.get_parameter(matrix.parameter).data).to(self._device) for matrix in bundle]
        outcomes = prune_bundle(bundle, weights, statistics, settings, self._options(bundle), routed=routed)
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
        set_matrix(self._model.get_parameter(matrix.parameter), matrix, outcome.weight)
        local = matrix.parameter.removeprefix(f"{self._plan.blocks[matrix.block]}.")
        set_matrix(work.get_parameter(local), matrix, outcome.weight)
        self._report(matrix, outcome)

    def _reconstruct(
        self,
        index: int,
        work: nn.Module,
        matrices: Sequence[Matrix],
        stream: Stream,
        dense: HiddenStates,
        options: Reconstruction,
    ) -> Tuned:
        prefix = f"{self._plan.blocks[index]}."
        pruned = dict.fromkeys(matrix.parameter.removeprefix(prefix) for matrix in matrices)
        masks = {name: work.get_parameter(name) != 0 for name in pruned}

        def example(batch: int) -> Example:
            moved = (stream.hidden[batch], stream.calls[index][batch], dense[batch])
            hidden, call, target = stream_of.to_device(moved, self._device, torch.float32)
            valid = stream.valid[batch]
            return Example(hidden, call, target, None if valid is None else valid.to(self._device))

        original = self._model.get_submodule(prefix[:-1])
        stored = trainable(original, pruned, self._frozen(prefix))
        remedy = "leave out the reconstruction, or use forward_dtype float32"
        try:
            with self._lowered(f"{prefix[:-1]} cannot be reconstructed", remedy):
                tuned = reconstruct(work, masks, example, len(stream.hidden), options, self._precision, stored)
        except CalibrationError as error:
            raise CalibrationError(
                f"{prefix[:-1]}: {error}: leave out the reconstruction, or use other text"
            ) from error
        names = tuple(stored) if tuned.epoch else ()
        for name in names:
            original.get_parameter(name).data.copy_(work.get_parameter(name).data)
        self._blocks.append(BlockReport(prefix[:-1], tuple(prefix + name for name in names), tuned))
        return tuned

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
