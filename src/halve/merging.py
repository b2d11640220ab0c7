"""Merge an adapter into a pruned checkpoint without leaving its pattern: where learning meets the refit.

LoRA's own merge, ``W + s·BA``, fills the zeros of a pruned matrix. What is merged here stays on its mask M. An adapter
that was trained with the mask gives the trained weights exactly, and so does HiRA, which leaves zeros alone. A stock
adapter was not: with calibration data the kept weights are the best for it,

    minimise ‖(W' - (W + s·BA)) X‖² over W' supported on M

with X the matrix's inputs in the model as it is merged so far, block by block; without, ``W' = M ⊙ (W + s·BA)``.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint.directory import RECORD
from halve.checkpoint.durable import sha256_of
from halve.checkpoint.load import LoadedModel, Source, load_model, resolve
from halve.checkpoint.precision import dtype_to_prune_in
from halve.checkpoint.room import check_destination
from halve.checkpoint.shards import read_json
from halve.checkpoint.validated import shown
from halve.checkpoint.weight_files import refuse_copies
from halve.checkpoint.write import write_checkpoint
from halve.device import evaluation_mode
from halve.errors import HalveError, InputError, UnsupportedModelError, counted, first_few
from halve.learning.adapter import CONFIG, WEIGHTS, Adapter, Update, read_adapter
from halve.learning.adapter_order import in_order_of
from halve.maths.linalg import is_finite
from halve.maths.pattern import Pattern, apply_mask
from halve.model.layers import Layout, is_conv1d, is_linear, matrix_view
from halve.option_groups import fill, group
from halve.provenance import environment, source_fields
from halve.recorded import SourcedRecord, pattern_of, read_record
from halve.report.card import leave_card
from halve.report.record import finite, mask_sha256
from halve.run.directory import open_run
from halve.run.events import Listener, Progress, announce, writing_told_to
from halve.run.loop import prune_blocks
from halve.run.phases import Phase
from halve.run.request import Loading, Placement
from halve.run.settings import Settings
from halve.solve.objective import AUTO, Objective
from halve.solve.outcome import Status
from halve.text.calibration import (
    SHARDS,
    Calibration,
    CalibrationData,
    batch_tokens,
    calibration_batches,
)
from halve.text.calibration_record import calibration_record
from halve.verification import check

EXACT, MASKED, REFIT = "exact", "masked", "refit"
"""How a matrix was merged: as the adapter was trained; with what falls on its zeros left out; or fitted on its mask."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What a merge can be told.

    Attributes:
        calibration: on what the kept weights are fitted; None leaves them at ``M ⊙ (W + s·BA)``.
        placement: where.
        loading: of the pruned checkpoint.

    Raises:
        InputError: an option is given that has no effect on a merge.
    """

    calibration: Calibration | None = group(None)
    placement: Placement = group(factory=Placement)
    loading: Loading = group(factory=Loading)

    def __post_init__(self) -> None:
        placement = self.placement
        for name, given, default in (
            ("dtype", self.loading.dtype, None),
            ("work", placement.work, None),
            ("stream", placement.stream, Placement.stream),
            ("workers", placement.workers, None),
        ):
            if given != default:
                raise InputError(f"{name} has no effect on a merge: leave it out")
        if self.calibration is not None and self.calibration.source is None:
            raise InputError("samples and the like go with calibration, which names no text: give it, or leave all out")


WITHOUT = ("dtype", "work", "stream", "workers", "worker_threads")
"""Options of the groups that a merge does not take."""


@dataclass(frozen=True, kw_only=True)
class MergedMatrix:
    """What was done to one matrix.

    Attributes:
        name: the parameter.
        how: ``exact``, ``masked`` or ``refit``.
        pruned: whether it has a mask to keep.
        off_mask: share of the update's squared norm that falls on zeros of the matrix, 0 to 1; 0 where none does.
        reason: why it was not fitted, where that was asked for; empty otherwise.
        facts: of the refit, as `halve.solve.outcome.Outcome` has them: ``relative_loss_before_refit`` is that of the
            masked update, ``relative_loss`` that of what was written, both against ``W + s·BA``.
    """

    name: str
    how: str
    pruned: bool
    off_mask: float
    reason: str = ""
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The result of `merge`.

    Attributes:
        out: the checkpoint's directory.
        pattern: that it keeps.
        matrices: one entry a matrix that the adapter changes, in the model's order.
        record: the content of ``halve.json`` but for the files' sha256.
        notes: what to know of it; sentences.
    """

    out: Path
    pattern: str
    matrices: tuple[MergedMatrix, ...]
    record: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def mean_relative_loss(self) -> float:
        """Mean of the relative losses of what was written, NaN where none was measured."""
        return mean_of([each.facts["relative_loss"] for each in self.matrices if "relative_loss" in each.facts])

    @property
    def mean_off_mask(self) -> float:
        """Mean share of the update that falls on zeros, of the pruned matrices; NaN where there are none."""
        return mean_of([each.off_mask for each in self.matrices if each.pruned])


class _Record(SourcedRecord, frozen=True, kw_only=True):
    """What a merge reads of the record besides."""

    tower: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A matrix that the adapter changes: its parameter, how it lies there, its mask (d_out, d_in) if it is pruned."""

    name: str
    update: Update
    layout: Layout
    mask: Tensor | None

    def view(self, model: nn.Module) -> Tensor:
        return matrix_view(model.get_parameter(self.name).data, None, self.layout)


def merge(
    adapter: str | Path, into: str | Path, out: str | Path, *, listen: Listener | None = None, **options: Any
) -> Merged:
    """Merge an adapter into a checkpoint that Halve has pruned, and write an ordinary checkpoint with the same zeros.

    The model is held in float32 and written in the dtypes of the checkpoint; the bytes of all other tensors stay. What
    is written is verified, and only then gets its final names.

    Args:
        adapter: directory of an adapter of peft, LoRA (standard, rank-stabilised, DoRA) or HiRA, or of one that
            `halve finetune` has trained.
        into: the pruned checkpoint that it belongs to: a directory, or a hub id.
        out: directory of the merged checkpoint; it must not exist yet, or be empty.
        listen: called with a `halve.run.events.Progress` at every step.
        **options: of `Calibration`, `Placement` and `Loading` by their flat names, or the groups themselves. Without
            calibration data what falls on zeros is left out.

    Returns:
        Merged: what became of every matrix.

    Raises:
        InputError: an argument cannot be used as given, or the adapter does not belong to this model.
        UnsupportedModelError: the adapter or the model is of a kind that cannot be merged.
        CalibrationError: the calibration data gave no usable statistics.
        CorruptFileError: a file was damaged.
    """
    given = read_adapter(adapter)
    asked = fill(MergeOptions, options)
    if asked.calibration is not None:
        if given.masked:
            raise InputError(f"{adapter} was trained to leave zeros alone and merges exactly: leave calibration out")
        asked.calibration.check()
    source = resolve(into, revision=asked.loading.revision, trust_remote_code=asked.loading.trust_remote_code)
    record, pattern = _record_of(source)
    refuse_copies(source.path, source.copies)
    place, origin = Path(out), Path(adapter).expanduser()
    check_destination(place, source, source.size)
    if place.resolve().is_relative_to(origin.resolve()):
        raise InputError(f"{out} is, or lies in, the adapter {adapter}: write to a directory of its own")
    with open_run(place) as run:
        dtype = torch.promote_types(dtype_to_prune_in(source) or torch.float32, torch.float32)
        loaded = load_model(source, dtype=dtype, attention=asked.loading.attention)
        given = in_order_of(given, record, source, loaded)
        targets = _targets(given, loaded, record, source.name)
        data: CalibrationData = []
        if asked.calibration is not None and any(target.mask is not None for target in targets):
            if asked.calibration.is_self_written:
                announce(listen, Phase.GENERATE)
            data = asked.calibration.data(loaded, writing_told_to(listen))
        about = {
            "adapter": _about(given, origin),
            "into": {"kind": source.kind, "name": source.name, "revision": source.revision},
            "calibration": None if asked.calibration is None else calibration_record(data),
        }
        run.begin({**source_fields(source), "merge": json.dumps(about, sort_keys=True)}, None, None, {})
        said: list[str] = []
        if run.verified:  # a merge that was stopped while its files were moved
            run.publish()
        else:
            matrices = _merge_all(
                given, targets, loaded, data, Settings(pattern=pattern, tower=record.tower), asked, listen
            )
            content = _content(source, loaded, targets, matrices, pattern, about)
            files = write_checkpoint(run.prepare_staging(), loaded, [target.name for target in targets], content)
            _verify(run.staging, source)
            cards, said = leave_card(run.staging, source)
            run.publish(files | cards)
    return _result(place, (*loaded.notes, *said))


def _record_of(source: Source) -> tuple[_Record, Pattern]:
    """Return the record of a pruned checkpoint, and its pattern."""
    if not source.shards:
        raise InputError(f"{source.name} is no directory of safetensors: give the checkpoint that `halve prune` wrote")
    if not (source.path / RECORD).exists():
        raise InputError(
            f"{source.name} has no {RECORD}, which says what was pruned in it: give the checkpoint that `halve prune` "
            "wrote; into a dense model, merge with peft"
        )
    record = read_record(source.path, _Record)
    pattern = pattern_of(record, source.path)
    if pattern is None:
        raise InputError(f"nothing was pruned in {source.name}: merge the adapter with peft")
    return record, pattern


def _targets(adapter: Adapter, loaded: LoadedModel, record: _Record, name: str) -> list[_Target]:
    """Find the matrices that an adapter changes, in the model's order.

    Raises:
        InputError: the model lacks one of them, or has it in another shape.
        UnsupportedModelError: a module is no linear layer of its own.
    """
    model = loaded.model
    modules = dict(model.named_modules(remove_duplicate=False))
    if strange := sorted(adapter.copies.keys() - adapter.updates.keys()):
        raise UnsupportedModelError(
            f"the adapter replaces the weights of {shown(first_few(strange))}, which is no low-rank update: train one "
            "without them"
        )
    if missing := [module for module in adapter.updates if module not in modules]:
        raise InputError(
            f"the adapter is for another model: {name} has no module {shown(first_few(missing))}; give the checkpoint "
            "that it was trained on"
        )
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = []
    for module, owner in modules.items():
        update = adapter.updates.get(module)
        if update is None:
            continue
        if not is_linear(owner):
            raise UnsupportedModelError(
                f"the adapter changes {module}, which is a {type(owner).__name__} and no linear layer: merge it with "
                "peft into the dense model, and prune that"
            )
        parameter = f"{module}.weight"
        weight = model.get_parameter(parameter)
        copy = adapter.copies.get(module)
        if copy is not None and not (copy.shape == weight.shape and torch.equal(copy.to(weight.dtype), weight.data)):
            raise InputError(
                f"the adapter is for another model: it has a copy of {parameter}, and {name} has other values there; "
                "give the checkpoint that it was trained on"
            )
        if uses[id(weight)] > 1:
            raise UnsupportedModelError(
                f"the adapter changes {parameter}, whose weights other modules share: train one without {module}"
            )
        layout: Layout = "in_out" if is_conv1d(owner) else "out_in"
        matrix = matrix_view(weight.data, None, layout)
        if update.shape != tuple(matrix.shape):
            raise InputError(
                f"the adapter is for another model: its update of {module} is {update.shape[0]} x {update.shape[1]}, "
                f"and {name} has {matrix.shape[0]} x {matrix.shape[1]} there; give the one it was trained on"
            )
        pruned = not record.layouts.keys().isdisjoint(loaded.layout.locate(parameter).tensors)
        found.append(_Target(name=parameter, update=update, layout=layout, mask=matrix != 0 if pruned else None))
    return found


def _merge_all(
    adapter: Adapter,
    targets: Sequence[_Target],
    loaded: LoadedModel,
    data: CalibrationData,
    settings: Settings,
    asked: MergeOptions,
    listen: Listener | None,
) -> list[MergedMatrix]:
    """Merge an adapter into a model in memory."""
    fits = bool(data)
    entries = []
    for target in targets:
        weight = target.view(loaded.model)
        merged = target.update.merged(weight, masked=adapter.masked)
        if not is_finite(merged):
            raise InputError(f"{target.name} is not finite with the adapter: train it again with a lower learning rate")
        how, off_mask = EXACT, 0.0
        if target.mask is not None and not adapter.masked:
            how, off_mask = MASKED, _share_off(merged - weight, target.mask)
            if not fits:
                merged = apply_mask(merged, target.mask)
        weight.copy_(merged)
        entries.append(MergedMatrix(name=target.name, how=how, pruned=target.mask is not None, off_mask=off_mask))
    if not fits:
        return entries
    shards = SHARDS if asked.calibration is None else asked.calibration.shards
    return _fitted(targets, entries, loaded.model, data, settings, shards, asked.placement, listen)


def _share_off(update: Tensor, mask: Tensor) -> float:
    squares = update.double().square()
    total = float(squares.sum())
    return float(squares[~mask].sum()) / total if total else 0.0


def _fitted(
    targets: Sequence[_Target],
    entries: Sequence[MergedMatrix],
    model: nn.Module,
    data: CalibrationData,
    settings: Settings,
    shards: int,
    placement: Placement,
    listen: Listener | None,
) -> list[MergedMatrix]:
    """Fit pruned matrices, which hold ``W + s·BA`` as yet, on their masks, block by block; all others stay."""
    masks = {target.name: target.mask for target in targets if target.mask is not None}
    settings = replace(
        settings,
        method="magnitude",  # which is not asked, the masks being given
        refit="cg",
        fallback="magnitude",
        objective=Objective(shrinkage=AUTO),
        skip=tuple(name for name, each in model.named_parameters() if each.ndim > 1 and name not in masks),
        least_prunable=0.0,
    )
    with evaluation_mode(model), ExitStack() as stack:
        folder = None
        if placement.offload is not None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="halve-", dir=placement.offload)))
        report = prune_blocks(
            model,
            calibration_batches(data, model, batch_tokens(placement.target)),
            settings,
            device=placement.target,
            precision=placement.precision,
            shards=shards,
            offload=folder,
            listen=None if listen is None else _unplanned(listen),
            masks=masks,
        )
    done = {matrix.name: matrix for matrix in report.matrices}
    reasons = {each.name: each.reason for each in report.excluded}
    found = []
    for target, entry in zip(targets, entries, strict=True):
        matrix = done.get(target.name)
        if target.mask is None:
            found.append(entry)
        elif matrix is None:  # its inputs cannot be seen
            target.view(model).copy_(apply_mask(target.view(model), target.mask))
            found.append(replace(entry, reason=reasons.get(target.name, "it was not called")))
        else:
            how = MASKED if matrix.status is Status.FELL_BACK else REFIT
            found.append(replace(entry, how=how, reason=matrix.reason, facts=matrix.facts))
    return found


def _unplanned(listen: Listener) -> Listener:
    """Return what hears of every step but of the plan, which would call what the adapter does not touch dense."""

    def tell(step: Progress) -> None:
        if step.plan is None:
            listen(step)

    return tell


def _about(adapter: Adapter, directory: Path) -> dict[str, Any]:
    return {
        "name": directory.name,
        "kind": next(iter(adapter.updates.values())).kind,
        "masked": adapter.masked,
        "base": adapter.base,
        "sha256": sha256_of(directory / WEIGHTS),
        "config_sha256": sha256_of(directory / CONFIG),
    }


def _content(
    source: Source,
    loaded: LoadedModel,
    targets: Sequence[_Target],
    matrices: Sequence[MergedMatrix],
    pattern: Pattern,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the record of the pruned checkpoint, with the masks as they are now and a section on the merge."""
    content = dict(read_json(source.path / RECORD))
    tensors = {target.name: loaded.layout.locate(target.name).tensors for target in targets}
    masks = {}
    for target in targets:
        if target.mask is not None:
            written = target.view(loaded.model).to(loaded.layout.tensors[tensors[target.name][0]].dtype)
            kept = pattern.kept_per_group(written)
            most = pattern.budget(written.shape[1])[0]
            masks[target.name] = {
                "mask_sha256": mask_sha256(written),
                "kept_per_group": None if kept is None else kept.tolist()[: most + 1],
            }
    content["matrices"] = [{**entry, **masks.get(entry.get("name"), {})} for entry in content["matrices"]]
    losses = [each.facts["relative_loss"] for each in matrices if "relative_loss" in each.facts]
    section = {
        **about,
        "mean_relative_loss": sum(losses) / len(losses) if losses else None,
        "matrices": [
            {
                **asdict(each),
                "facts": {name: finite(value) for name, value in each.facts.items() if name != "seconds"},
            }
            for each in matrices
        ],
        "tensors": sorted({name for names in tensors.values() for name in names}),
        "environment": environment(),
    }
    content["merges"] = [*content.get("merges", []), section]
    return content


def _verify(directory: Path, source: Source) -> None:
    """Judge the bytes on disk."""
    verdict = check(directory, against=source, trust_remote_code=source.trust_remote_code)
    if not verdict.ok:
        raise HalveError(f"the checkpoint just written to {directory} is wrong, do not use it: {verdict.problems[0]}")


def _result(place: Path, notes: Sequence[str]) -> Merged:
    """Return what is on record of the merge whose checkpoint is in its place."""
    content = read_json(place / RECORD)
    section = content["merges"][-1]
    entries = [MergedMatrix(**entry) for entry in section["matrices"]]
    unfitted = [each for each in entries if each.reason]
    told = list(notes)
    if unfitted:
        told.append(
            f"{counted(len(unfitted), 'matrix', 'matrices')} could not be fitted, and what falls on zeros was left out "
            f"(the first is {unfitted[0].name}: {unfitted[0].reason})"
        )
    return Merged(
        out=place,
        pattern=content["pattern"],
        matrices=tuple(entries),
        record={name: value for name, value in content.items() if name != "files"},
        notes=tuple(told),
    )


def mean_of(values: Sequence[float]) -> float:
    """Return the mean, NaN of nothing."""
    return sum(values) / len(values) if values else math.nan
