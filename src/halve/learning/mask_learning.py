"""Learn masks end to end: from a dense model, or a pruned one, to a verified N:M checkpoint on disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halve.checkpoint.directory import RECORD
from halve.checkpoint.load import LoadedModel, Source, load_model, resolve
from halve.device import model_device
from halve.errors import InputError
from halve.learning import methods
from halve.learning.finetuning import find_teacher
from halve.learning.launch import is_first_process
from halve.learning.learner import Learner
from halve.learning.lesson import Lesson, Taught, carry_out
from halve.learning.mask_files import ORDERED_LIKE, REORDERED, write_masks
from halve.learning.moments import Moments, input_moments
from halve.learning.options import NONE, Training, refuse_present
from halve.learning.training.publishing import source_json
from halve.learning.training.text import TrainingRows
from halve.learning.training.watching import Watch
from halve.maths.pattern import Pattern
from halve.model.masked import PrunedParameter, pruned_parameters
from halve.model.plan import Matrix, Plan
from halve.model.survey import plan_model
from halve.option_groups import internal
from halve.provenance import files_sha256, source_fields
from halve.recorded import channel_order
from halve.report.record import mask_facts
from halve.report.training import learned_record, previous_record

if TYPE_CHECKING:
    from halve.learning.methods.mask_learner import MaskLearner

COMMAND = "learn"
_MOMENT_ROWS = 16
"""Sequences of the training text on which second moments of inputs are measured."""


@dataclass(frozen=True, kw_only=True)
class Learning(Training):
    """What `halve.learn` is asked for.

    Attributes:
        method: what learns the masks; see ``halve methods``.
        pattern: ``N:M`` keeps N of every M consecutive weights.
        prior: a pruned checkpoint, or a local method such as ``wanda``, whose mask or weights the training begins
            with; only for methods that take one.
        skip: shell-style patterns of parameters that stay dense, such as ``*.down_proj.*``.
        save_masks: a file for the masks alone, one bit a weight; ``halve apply-masks`` puts them on the dense model.
        options: further options of the method.
    """

    method: str = "prox-admm"
    pattern: Pattern = Pattern("2:4")
    prior: str | None = None
    skip: tuple[str, ...] = ()
    save_masks: Path | None = None
    options: Mapping[str, Any] = internal(factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pattern", Pattern.parse(self.pattern))
        skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        object.__setattr__(self, "skip", skip)
        row = methods.get(self.method)
        methods.make_options(row, **self.options)
        methods.check_pattern(row, self.pattern)
        if self.prior is not None:
            object.__setattr__(self, "prior", str(self.prior))
            if not row.takes_prior:
                raise InputError(
                    f"method {row.name} takes no prior: leave it out, or begin from the pruned model itself"
                )
        if self.save_masks is not None:
            object.__setattr__(self, "save_masks", Path(self.save_masks))


def check_asked(out: Path, request: Learning) -> None:
    """Refuse what can be known to be unusable before anything is loaded.

    Raises:
        InputError: as `Training.check`; or the file of masks is there, and not from this training.
    """
    request.check()
    refuse_present("save_masks", request.save_masks, out)


def learn_as(model: str | Path, out: Path, request: Learning, watch: Watch | None = None) -> Taught:
    """Learn masks as a request says; ``prior`` is a checkpoint here. What is raised is as for `halve.learn`."""
    check_asked(out, request)
    row = methods.get(request.method)
    prior = None if request.prior is None else _prior_of(request)
    source = resolve(model, trust_remote_code=request.machine.trust_remote_code)
    if prior is not None:
        _refuse_other_order(prior, source)
    pruned = source.path.is_dir() and (source.path / RECORD).exists()
    previous = previous_record(source.path) if pruned else None
    if previous is not None:
        teacher = find_teacher(source.path, request)
    elif request.teacher in {None, NONE}:
        teacher = source if request.teacher is None else None
    else:
        teacher = resolve(str(request.teacher), trust_remote_code=request.machine.trust_remote_code)
    school = _School(request, row, prior)
    dense: Source | None = source
    if previous is not None:  # another teacher may have been named than what was pruned
        same = teacher is not None and previous["source"].get("sha256") == files_sha256(source_fields(teacher))
        dense = teacher if same else None

    def record(student: LoadedModel, entry: Mapping[str, Any]) -> dict[str, Any]:
        if request.save_masks is not None and is_first_process():
            described = source_json(source)
            facts = {name: str(value) for name, value in described.items() if value is not None}
            order = channel_order(source.path, described["sha256"])
            if order.reordered:
                facts |= {REORDERED: "true", ORDERED_LIKE: " ".join(sorted(order.sha256s))}
            write_masks(Path(request.save_masks), school.masks(), request.pattern, facts)
        views = {each.name: view_of(student.model, each) for each in school.planned}
        facts_of = {name: mask_facts(name, view, request.pattern) for name, view in views.items()}
        return learned_record(
            source_json(source) if previous is None else previous["source"],
            request.pattern,
            row.name,
            recorded_matrices(student, school.planned),
            facts_of,
            [{"name": each.name, "shape": list(each.shape), "reason": each.reason} for each in school.plan.excluded],
            entry,
            skip=request.skip,
            warnings=entry["text"]["notes"],
            before=None if previous is None else source.path,
        )

    lesson = Lesson(
        command=COMMAND,
        kind=COMMAND,
        method=row.name,
        what=row.trains,
        began=source,
        teacher=teacher,
        dense=dense,
        also={} if prior is None else {"prior": files_sha256(source_fields(prior))},
        request=_with_decay(request, row),
        prepare=school.prepare,
        default_rate=row.rate,
        record=record,
        notes=lambda: tuple(school.notes),
    )
    return carry_out(lesson, out, watch)


def _prior_of(request: Learning) -> Source:
    """Find the checkpoint that is the prior.

    Raises:
        InputError: it is neither a directory nor on the hub, or no pruned checkpoint.
    """
    try:
        found = resolve(str(request.prior), trust_remote_code=request.machine.trust_remote_code)
    except InputError as error:
        raise InputError(
            f"prior = {str(request.prior)!r} is neither a local method (`halve methods`) nor a checkpoint: {error}"
        ) from error
    if found.path.is_dir() and (found.path / RECORD).exists():
        previous_record(found.path)
    return found


def _refuse_other_order(prior: Source, model: Source) -> None:
    """Refuse a prior whose channels are in another order than the model's.

    Raises:
        InputError: they are, or are not known to be in the same.
    """
    theirs, ours = (channel_order(each.path, files_sha256(source_fields(each))) for each in (prior, model))
    if not theirs.is_that_of(ours):
        whose = f"the prior {prior.name}" if theirs.reordered else model.name
        raise InputError(
            f"channels of {whose} were reordered, so that the prior's masks are not for those of {model.name}: give a "
            f"prior that was pruned from {model.name} with permute none, or learn from {prior.name} itself"
        )


def _with_decay(request: Learning, row: methods.LearningMethod) -> Learning:
    """Return the request with the method's own weight decay where the default stands."""
    schedule = request.schedule
    if schedule.weight_decay is not None:
        return request
    return replace(request, schedule=replace(schedule, weight_decay=row.decay))


class _School:
    """Plans what is pruned, makes learners for it, and remembers the last."""

    def __init__(self, request: Learning, row: methods.LearningMethod, prior: Source | None) -> None:
        self._request = request
        self._row = row
        self._prior = prior
        self._last: MaskLearner | None = None
        self._plan: Plan | None = None
        self.notes: list[str] = []

    @property
    def plan(self) -> Plan:
        """What is pruned, and what is not."""
        assert self._plan is not None  # noqa: S101 - made before anything is learned
        return self._plan

    @property
    def planned(self) -> tuple[Matrix, ...]:
        """The matrices that are pruned."""
        return self.plan.matrices

    def masks(self) -> Mapping[str, Tensor]:
        """Return the masks that the last learner left."""
        assert self._last is not None  # noqa: S101 - the training has just ended
        return self._last.masks()

    def prepare(self, student: LoadedModel, rows: TrainingRows) -> Callable[[], Learner]:
        """Return what makes a learner of the method.

        Raises:
            InputError: nothing can be pruned, or the prior does not fit.
        """
        request, model = self._request, student.model
        device = model_device(model)
        nn.Module.to(model, torch.device("cpu"))
        short = [{"input_ids": rows.rows.ids[:2]}]
        self._plan, _ = plan_model(model, short, request.pattern, request.skip, together=student.layout.together)
        nn.Module.to(model, device)
        layouts = {matrix.parameter: matrix.layout for matrix in self.planned}
        targets = list(pruned_parameters(model, layouts))
        weights = None if self._prior is None else self._weights_of(self._prior, targets)
        moments = self._moments(model, targets, rows) if self._row.takes_diagonals else None
        options = methods.make_options(self._row, **request.options)

        def make() -> Learner:
            self._last = methods.make_learner(
                self._row,
                targets,
                request.pattern,
                options,
                prior=weights,
                diagonals=None if moments is None else moments.diagonals,
            )
            return self._last

        return make

    def _moments(self, model: nn.Module, targets: list[PrunedParameter], rows: TrainingRows) -> Moments:
        device, first = model_device(model), rows.order[:_MOMENT_ROWS]
        batches = [
            _fed(ids[None].to(device), positions[None].to(device), apart=rows.apart)
            for ids, positions in zip(rows.rows.ids[first], rows.rows.positions[first], strict=True)
        ]
        found = input_moments(model, targets, batches)
        if found.without:
            name, reason = next(iter(found.without.items()))
            self.notes.append(f"{len(found.without)} matrices are weighed by |w| alone; of {name}, {reason}")
        return found

    def _weights_of(self, prior: Source, targets: list[PrunedParameter]) -> dict[str, Tensor]:
        held = load_model(prior, dtype=torch.float32)
        parameters = dict(held.model.named_parameters())
        for target in targets:
            found = parameters.get(target.name)
            if found is None or found.shape != target.tensor.shape:
                raise InputError(
                    f"the prior {prior.name} has no parameter {target.name} of shape {tuple(target.tensor.shape)}: "
                    "give a checkpoint of the same model"
                )
        return {target.name: parameters[target.name].detach() for target in targets}


def _fed(ids: Tensor, positions: Tensor, *, apart: bool) -> dict[str, Tensor]:
    """Return what a model is fed of a row: packed documents with their positions, a document alone without padding."""
    if not apart:
        return {"input_ids": ids, "position_ids": positions}
    own = positions[0] == torch.arange(positions.shape[1], device=positions.device)  # padding begins anew
    return {"input_ids": ids[:, own]}


def view_of(model: nn.Module, matrix: Matrix) -> Tensor:
    """Return a matrix of a model as (d_out, d_in)."""
    return matrix.view(model.get_parameter(matrix.parameter).data)


def recorded_matrices(loaded: LoadedModel, matrices: Sequence[Matrix]) -> list[dict[str, Any]]:
    """Return what is on record of matrices that are pruned: name, tensors on disk, shape, layout there."""
    found = []
    for each in matrices:
        location = loaded.layout.locate(each.parameter, each.expert)
        flipped = {"out_in": "in_out", "in_out": "out_in"}
        found.append(
            {
                "name": each.name,
                "tensors": list(location.tensors),
                "shape": [each.d_out, each.d_in],
                "layout": flipped[each.layout] if location.transposed else each.layout,
            }
        )
    return found
