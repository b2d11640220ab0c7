"""The one loop: plan, then block by block collect, solve, verify, write back.

Statistics of a block come from inputs that already passed the pruned earlier blocks. What is done and kept is decided
here; the work of each block is an executor's (`halve.run.executor`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint.mapped import Weights
from halve.errors import HalveError, InputError, LayerFailedError
from halve.memory import trim
from halve.model.blocks import Batch, check_batches, eager_experts
from halve.model.gradients import LossGradients, one_by_one
from halve.model.layers import parameter_or_buffer, replace_buffer
from halve.model.plan import Matrix, Plan, set_matrix
from halve.model.reconstruct import Tuned
from halve.model.stacks import find_stacks
from halve.model.survey import StackRun, plan_model
from halve.order.reordering import FOLD, NONE, Reordered
from halve.provenance import Fingerprint
from halve.run.batch_norms import ESTIMATE
from halve.run.block_record import from_record, to_record
from halve.run.bundles import bundles, share_of_time
from halve.run.directory import RunDirectory
from halve.run.events import (
    BlockReport,
    Listener,
    MatrixReport,
    Progress,
    RunReport,
    WorkerReport,
    caution_of_few_tokens,
)
from halve.run.executor import Executor, Inputs, Job, cut
from halve.run.local import LocalExecutor
from halve.run.phases import Phase, Phases
from halve.run.settings import Settings
from halve.solve import methods
from halve.solve.gradient_scores import GradientOf
from halve.solve.outcome import Outcome, Status
from halve.text.calibration import SHARDS

Employ = Callable[[Job], Executor]
"""Makes what does the work of a job."""
Employing = Callable[[Fingerprint, Sequence[Sequence[str]]], Employ]
"""Gives that for a run, from its fingerprint and the names of parameters that are stored in one tensor."""


def prune_blocks(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: Settings,
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    shards: int = SHARDS,
    offload: Path | None = None,
    listen: Listener | None = None,
    collect: bool = True,
    ledger: RunDirectory | None = None,
    phases: Phases | None = None,
    before: Callable[[], None] | None = None,
    together: Collection[Sequence[str]] = (),
    masks: Mapping[str, torch.Tensor] | None = None,
    weights: Weights | None = None,
    fixed: Collection[str] = (),
    employ: Employ = LocalExecutor,
) -> RunReport:
    """Prune ``model`` in place, block by block.

    Args:
        model: a model on the CPU, in evaluation mode; its pruned parameters are overwritten as each block finishes.
        batches: calibration batches, keyword arguments of the model's forward; padded positions of an
            ``attention_mask`` are not counted.
        settings: what to do to every matrix.
        device: where blocks run and matrices are solved.
        precision: bfloat16 runs the blocks' products under autocast; statistics stay float32.
        shards: parts of the calibration set that are summed by themselves (`halve.run.executor.cut`).
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
        fixed: full names of parameters whose channels must not move.
        employ: makes what does the work; this process, where nothing else is said.

    Raises:
        InputError: masks are given, and channels are to be reordered.
        LayerFailedError: a matrix could not be pruned and ``settings.fallback`` is None.
        CalibrationError: NaN or infinity in activations, or no statistics.
        UnsupportedModelError: see `plan_model`.
        CorruptFileError: a block in ``ledger`` was damaged.
        HalveError: a block could not be kept, the volume being full or broken.
    """
    check_batches(batches)
    if masks is not None:
        if settings.permute == FOLD:
            raise InputError(f"masks are given for channels as they are, and permute {FOLD} would move them")
        settings = replace(settings, permute=NONE)
    of = methods.get(settings.method).gradient
    if of is not None:
        batches = one_by_one(batches)
    weights = weights or Weights()
    plan, runs = survey(model, batches, settings, weights, together)
    phases = phases or Phases(device)
    loop = _Loop(model, plan, settings, listen or (lambda _progress: None), ledger, phases, weights)
    with eager_experts(model):
        loss = None
        if of is GradientOf.LOSS and not loop.finished:
            loss = LossGradients(model, plan, batches, device, settings.method)
        job = Job(
            model=model,
            plan=plan,
            runs=runs,
            batches=batches,
            numbers=range(len(batches)),
            shards=cut(len(batches), shards),
            settings=settings,
            device=device,
            precision=precision,
            weights=weights,
            offload=offload,
            hidden=None if ledger is None else ledger.hidden,
            reserved=0 if ledger is None else ledger.reserved,
            phases=phases,
            tell=loop.tell_phase,
            collect=collect,
            masks=masks,
            loss=loss,
            fixed=fixed,
        )
        return loop.run(job, employ, before)


def survey(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: Settings,
    weights: Weights,
    together: Collection[Sequence[str]] = (),
) -> tuple[Plan, list[StackRun]]:
    """Plan what is pruned (`halve.model.survey.plan_model`), and refuse settings that do not go with it.

    Args:
        model: on the CPU, in evaluation mode.
        batches: of the calibration set.
        settings: what to do to every matrix.
        weights: where the model's weights lie.
        together: names of parameters that are stored in one tensor.

    Raises:
        UnsupportedModelError, InputError: as `plan_model`; dense targets are insisted on for a mixture of experts.
    """
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
    return plan, runs


def put_tensor(model: nn.Module, weights: Weights, name: str, tensor: Tensor) -> None:
    """Put a changed parameter or buffer into a model, whose weights may lie in files that are not written to.

    Args:
        model: the whole one.
        weights: where its weights lie.
        name: full name of the parameter or buffer.
        tensor: of its shape.
    """
    before = parameter_or_buffer(model, name)
    if isinstance(before, nn.Parameter):
        weights.own(before)
        before.data.copy_(tensor)
    else:
        replace_buffer(model, name, tensor)


class _Loop:
    """The state of one run."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        settings: Settings,
        listen: Listener,
        ledger: RunDirectory | None,
        phases: Phases,
        weights: Weights,
    ) -> None:
        self._weights = weights
        self._model = model
        self._plan = plan
        self._settings = settings
        self._listen = listen
        self._ledger = ledger
        self._kept = 0 if ledger is None else ledger.committed
        self._reports: list[MatrixReport] = []
        self._blocks: list[BlockReport] = []
        self._norms: list[str] = []
        self._reordered: dict[str, Reordered] = {}
        self._tuning = settings.reconstruction
        self._phases = phases
        self._collects = False

    @property
    def finished(self) -> bool:
        """Whether every block was pruned before."""
        return self._kept >= len(self._plan.blocks)

    def run(self, job: Job, employ: Employ, before: Callable[[], None] | None) -> RunReport:
        count = len(self._plan.blocks)
        self._collects = job.collect
        workers: tuple[WorkerReport, ...] = ()
        self._tell(0, Phase.PLAN, plan=self._plan)
        if before is not None:
            before()
        if self.finished:
            for index in range(count):
                self._restore(index)
                self._settle(index)
        else:
            executor = employ(job)
            try:
                for index in range(self._passed(job)):
                    self._pass_block(index, executor)
                workers = executor.reports()
            finally:
                executor.leave()
        self._tell(count, Phase.DONE)
        reordered = sum(self._reordered.values(), Reordered())
        return RunReport(
            matrices=tuple(self._reports),
            excluded=self._plan.excluded,
            blocks=count,
            seconds=dict(self._phases.seconds),
            reconstructions=tuple(self._blocks),
            time_limit=self._settings.options.get("time_limit"),
            resumed_blocks=self._kept,
            peak_memory=dict(self._phases.peak_memory),
            peak_device_memory=dict(self._phases.peak_device_memory),
            workers=workers,
            shards=len(job.shards),
            norms=tuple(self._norms),
            orders=reordered.orders,
            folds_found=reordered.found,
            folds_proven=reordered.proven,
            not_reordered=self._not_reordered(),
        )

    def _passed(self, job: Job) -> int:
        """Return how many blocks have to be passed: those of all stacks but the ones after the last pruned block."""
        passed = 0
        for run in job.runs:
            if passed <= job.last:
                passed += len(run.blocks)
        return passed

    def _pass_block(self, index: int, executor: Executor) -> None:
        """Take the calibration set through a block, which is pruned unless it was before."""
        name = self._plan.blocks[index]
        executor.begin(index)
        if index < self._kept:
            executor.follow(index, self._restore(index))
        else:
            try:
                tensors = self._prune_block(index, executor)
            except torch.OutOfMemoryError as error:
                raise HalveError(
                    f"{self._phases.device} ran out of memory in {name}: use shorter sequences (seq_len), or another "
                    "device"
                ) from error
            if self._ledger is not None:
                with self._phases.timing(Phase.COMMIT):
                    self._commit(index, self._ledger, tensors)
            executor.finish(index, tensors)
        self._settle(index)

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

    def _prune_block(self, index: int, executor: Executor) -> dict[str, Tensor]:
        """Prune a block, and return its parameters that differ from the dense model's, by full name."""
        matrices = self._plan.of_block(index)
        inputs = executor.collect(index)
        self._warn_of_few_tokens(index, inputs)
        if not matrices:
            self._estimate_norms(index, executor)
            return self._changed(index)
        if self._settings.reorders:
            self._reorder(index, executor.reorder(index))
        found = list(bundles(matrices, {name: seen.leader for name, seen in inputs.items()}))
        for bundle, outcomes in zip(found, executor.solve(index, found, self._options), strict=True):
            for matrix, outcome in zip(bundle, outcomes, strict=True):
                self._put(matrix, outcome)
        self._estimate_norms(index, executor)
        if self._tuning is not None:
            tuned, tensors = executor.reconstruct(index, self._changed(index), self._tuning)
            for name, tensor in tensors.items():
                self._own(name).data.copy_(tensor)
            self._blocks.append(BlockReport(self._plan.blocks[index], tuple(tensors), tuned))
            self._choose_rate(tuned)
        return self._changed(index)

    def _estimate_norms(self, index: int, executor: Executor) -> None:
        """Estimate the statistics of a block's batch norms anew, if what comes to them has changed."""
        if self._settings.batch_norm == ESTIMATE and self._collects and self._reports:
            for name, tensor in executor.estimate_norms(index, self._changed(index)).items():
                replace_buffer(self._model, name, tensor)
                self._norms.append(name)

    def _reorder(self, index: int, found: Reordered) -> None:
        """Put the channels of a block into their orders."""
        for order in found.orders:
            before = {name: parameter_or_buffer(self._model, name) for name in order.parameters}
            for name, moved in order.applied({name: each.data for name, each in before.items()}).items():
                put_tensor(self._model, self._weights, name, moved)
        self._reordered[self._plan.blocks[index]] = found

    def _not_reordered(self) -> tuple[str, ...]:
        """Return the blocks with matrices in which no channels were reordered, where that was asked for by name."""
        if self._settings.permute != FOLD:
            return ()
        done = {name for name, reordered in self._reordered.items() if reordered.orders}
        blocks = enumerate(self._plan.blocks)
        return tuple(name for index, name in blocks if name not in done and self._plan.of_block(index))

    def _warn_of_few_tokens(self, index: int, inputs: Mapping[str, Inputs]) -> None:
        if self._reports or self._settings.as_followed.objective.shrinkage:
            return
        if caution := caution_of_few_tokens({name: (seen.d_in, seen.tokens) for name, seen in inputs.items()}):
            self._tell(index, Phase.COLLECT, caution=caution)

    def _choose_rate(self, tuned: Tuned) -> None:
        """Keep the learning rate that the first block has chosen for the others."""
        if tuned.learning_rate is not None and self._tuning is not None:
            self._tuning = replace(self._tuning, learning_rate=tuned.learning_rate)

    def _changed(self, index: int) -> dict[str, Tensor]:
        """Return what of a block differs from the dense model's so far, by full name."""
        name = self._plan.blocks[index]
        tuned = next((block.parameters for block in self._blocks if block.name == name), ())
        orders = self._reordered.get(name, Reordered()).orders
        moved = {parameter for order in orders for parameter in order.parameters}
        matrices = {matrix.parameter for matrix in self._plan.of_block(index)}
        changed = sorted(matrices.union(tuned, moved, self._norms_of(name)))
        return {each: parameter_or_buffer(self._model, each).data for each in changed}

    def _norms_of(self, block: str) -> list[str]:
        """Return the statistics of a block that were estimated anew."""
        return [buffer for buffer in self._norms if buffer.startswith(f"{block}.")]

    def _commit(self, index: int, ledger: RunDirectory, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished block."""
        name = self._plan.blocks[index]
        matrices = self._reports[len(self._reports) - len(self._plan.of_block(index)) :]
        tuned = next((block for block in self._blocks if block.name == name), None)
        reordered = self._reordered.get(name, Reordered())
        ledger.commit(tensors, to_record(matrices, tuned, reordered, self._norms_of(name), self._phases.take()))

    def _restore(self, index: int) -> dict[str, Tensor]:
        """Put a block that was finished before into the model, and return its parameters that differ, by full name."""
        if self._ledger is None:
            return {}
        tensors, record = self._ledger.read(index)
        for name, tensor in tensors.items():
            put_tensor(self._model, self._weights, name, tensor)
        matrices, tuned, reordered, norms, spent = from_record(record)
        self._reordered[self._plan.blocks[index]] = reordered
        self._norms += norms
        self._phases.add(spent)
        for report in matrices:
            self._reports.append(report)
            self._tell(index, Phase.RESTORE, report)
        if tuned is not None:
            self._blocks.append(tuned)
            self._choose_rate(tuned.tuned)
        return tensors

    def _options(self, bundle: Sequence[Matrix]) -> dict[str, Any]:
        """Return the options for these matrices: a time limit is their share of what is left of the model's."""
        options = dict(self._settings.options)
        if options.get("time_limit") is not None:
            spent = sum(report.facts.get("seconds", 0.0) for report in self._reports)
            ahead = self._plan.matrices[len(self._reports) :]
            options["time_limit"] = share_of_time(bundle, ahead, options["time_limit"] - spent)
        return options

    def _put(self, matrix: Matrix, outcome: Outcome) -> None:
        if outcome.status is Status.FAILED:
            advice = "; give a fallback to prune such layers by another method" if not self._settings.fallback else ""
            raise LayerFailedError(
                f"{matrix.name} could not be pruned by {self._settings.method}: {outcome.reason}{advice}"
            )
        set_matrix(self._own(matrix.parameter), matrix, outcome.weight)
        self._report(matrix, outcome)

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

    def tell_phase(self, block: int, phase: Phase, *, caution: str = "", note: str = "") -> None:
        """Tell what an executor is doing with a block."""
        self._tell(block, phase, caution=caution, note=note)
