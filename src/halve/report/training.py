"""What a training puts on record: an entry in ``halve.json``, and the masks as they are after it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from halve.checkpoint.directory import RECORD, contained
from halve.checkpoint.load import LoadedModel
from halve.checkpoint.shards import read_json
from halve.checkpoint.validated import wrong
from halve.errors import HalveError, InputError
from halve.evaluation.figure import Perplexity
from halve.maths.pattern import Pattern
from halve.model.layers import Layout, matrix_view
from halve.provenance import environment
from halve.recorded import FORMAT, REMEDY, Record, pattern_of, read_record
from halve.report.record import finite, mask_facts
from halve.report.schema import WholeRecord, record_of
from halve.report.values import check_nesting
from halve.solve.outcome import Status
from halve.text.calibration_record import calibration_record

_EXPERT = re.compile(r"(?P<parameter>.*?)(?:\[(?P<expert>\d{1,6})\])?", re.DOTALL)
_OF_ONE = {"value", "nll", "seconds", "window_nll", "note", "versions"}


def previous_record(directory: Path) -> dict[str, Any]:
    """Read the record of the checkpoint that a training begins with, checked field by field.

    Args:
        directory: of a checkpoint that Halve has written.

    Returns:
        dict[str, Any]: the content of ``halve.json``, as it stands there.

    Raises:
        InputError: there is none, the run is unfinished, or the checkpoint is packed.
        CorruptFileError, UnreadableFileError: it is not as Halve writes it, or cannot be read.
    """
    pattern_of(record_of(directory, WholeRecord), directory)
    path = contained(directory, directory / RECORD)
    content = read_json(path)
    try:
        check_nesting(content)
    except ValueError as error:
        raise wrong(path, str(error), REMEDY) from error
    return content


def trained_record(
    previous: Mapping[str, Any], entry: Mapping[str, Any], masks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return ``halve.json`` of a checkpoint that was trained, but for the files' sha256, which the store adds.

    What the pruning put on record stays, losses of matrices among it: they are of before the training.

    Args:
        previous: of the checkpoint that the training began with, see `previous_record`.
        entry: the training, as docs/record.md has it; what is not finite becomes None.
        masks: of every pruned matrix by name, as it is now, see `masks_after`.

    Raises:
        HalveError: no reader would take the record; a mask is missing, or one is of no matrix.
    """
    pruned = {matrix["name"] for matrix in previous["matrices"] if matrix.get("status", Status.OK) != Status.FAILED}
    _check_masks(pruned, masks)
    content = {name: value for name, value in previous.items() if name != "files"}
    content["matrices"] = [matrix | dict(masks.get(matrix["name"], {})) for matrix in previous["matrices"]]
    content["trainings"] = [*previous.get("trainings", ()), plain_json(entry)]
    return _readable(content)


def learned_record(
    source: Mapping[str, Any],
    pattern: Pattern,
    method: str,
    matrices: Sequence[Mapping[str, Any]],
    masks: Mapping[str, Mapping[str, Any]],
    excluded: Sequence[Mapping[str, Any]],
    entry: Mapping[str, Any] | None,
    *,
    skip: Sequence[str] = (),
    warnings: Sequence[str] = (),
    before: Path | None = None,
) -> dict[str, Any]:
    """Return ``halve.json`` of a model whose masks a training has learned from dense, but for the files' sha256.

    Args:
        source: the dense model: ``kind``, ``name``, ``revision``, ``sha256``.
        pattern: that the matrices have now.
        method: that learned the masks.
        matrices: of each that has the pattern ``name``, ``tensors`` on disk, ``shape`` (d_out, d_in) and ``layout`` on
            disk.
        masks: of every matrix by name, see `halve.report.record.mask_facts`.
        excluded: of each parameter of two or more dimensions that stayed dense ``name``, ``shape`` and ``reason``.
        entry: the training, as docs/record.md has it; what is not finite becomes None. None where masks were only
            applied, which were learned before.
        skip: what was not to be pruned, as it was asked for.
        warnings: sentences.
        before: the pruned checkpoint that the training began with; None where it began with the dense model. Trainings
            of it and orders of its channels stay on record, and so does what else differs from the dense model since.

    Raises:
        HalveError: no reader would take the record; a mask is missing, or one is of no matrix.
    """
    _check_masks({matrix["name"] for matrix in matrices}, masks)
    applied = {"device": "cpu", "forward_dtype": "float32", "environment": environment()}
    training = applied if entry is None else plain_json(entry)
    since = {} if before is None else previous_record(before)
    if before is not None and entry is not None:
        was = read_record(before, Record)
        training = training | {"tensors": sorted({*training["tensors"], *was.tuned, *was.layouts})}
    done = {"asked": method, "method": method, "refit": "none", "status": str(Status.OK), "reason": "", "facts": {}}
    return _readable(
        {
            "format": FORMAT,
            "source": dict(source),
            "pattern": pattern.text,
            "method": method,
            "refit": "none",
            "options": {},
            "skip": list(skip),
            "fallback": None,
            "min_expert_tokens": 0,
            "reconstruction": None,
            "objective": {"shrinkage": 0.0, "match_dense": 0.0},
            "only_where_faster": None,
            "calibration": calibration_record([]),
            "device": training["device"],
            "forward_dtype": training["forward_dtype"],
            "mean_relative_loss": None,
            "matrices": [plain_json({**matrix, **done, **masks[matrix["name"]]}) for matrix in matrices],
            "blocks": [],
            **({"orders": since["orders"]} if since.get("orders") else {}),
            "trainings": [*since.get("trainings", ()), *([] if entry is None else [training])],
            "excluded": [plain_json(each) for each in excluded],
            "warnings": list(warnings),
            "environment": training["environment"],
        }
    )


def masks_after(loaded: LoadedModel, previous: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what there is to say of the masks of a model in memory, as its weights are written, by matrix.

    Args:
        loaded: the checkpoint of ``previous``, trained since.
        previous: what was on record of it, see `previous_record`.

    Returns:
        dict[str, dict[str, Any]]: as `halve.report.record.mask_facts`, of every matrix that was pruned.

    Raises:
        InputError: the record names a matrix that the model does not have.
        HalveError: a matrix does not have the pattern.
    """
    pattern = Pattern(previous["pattern"])
    found = {}
    for matrix in previous["matrices"]:
        if matrix.get("status", Status.OK) != Status.FAILED:
            held = _Held.of(matrix["name"], matrix.get("layout", "out_in"), loaded)
            weight = matrix_view(loaded.model.get_parameter(held.parameter).detach(), held.expert, held.layout)
            dtype = loaded.layout.tensors[held.tensor].dtype
            found[matrix["name"]] = mask_facts(matrix["name"], weight.to(dtype), pattern)
    return found


def scores_json(before: Sequence[Perplexity], after: Sequence[Perplexity]) -> list[dict[str, Any]]:
    """Return the perplexities around a training as its entry has them, a text each.

    Args:
        before: of the model that the training began with.
        after: of what it left, text by text as ``before``.
    """
    found = []
    for old, new in zip(before, after, strict=True):
        told = new.as_json(old)
        same = {name: value for name, value in told.items() if name not in _OF_ONE}
        values = {"before": finite(old.value), "before_nll": old.nll, "after": finite(new.value), "after_nll": new.nll}
        found.append(same | values)
    return found


def plain_json(value: Any) -> Any:
    """Return a value with texts for keys, lists for tuples, and None for numbers that no record holds."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else f"{key:g}": plain_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(inner) for inner in value]
    return finite(value) if isinstance(value, float) else value


@dataclass(frozen=True)
class _Held:
    """A recorded matrix in a model in memory: the parameter that holds it, how, and a tensor on disk that does."""

    parameter: str
    expert: int | None
    layout: Layout
    tensor: str

    @classmethod
    def of(cls, name: str, layout: Layout, loaded: LoadedModel) -> "_Held":
        """Find a matrix by its name and its layout on disk."""
        found = _EXPERT.fullmatch(name)
        assert found is not None  # noqa: S101 - every text matches
        parameter, expert = found["parameter"], None if found["expert"] is None else int(found["expert"])
        location = loaded.layout.locate(parameter)
        shape = loaded.model.get_parameter(parameter).shape
        if len(shape) != (2 if expert is None else 3) or (expert is not None and expert >= shape[0]):
            raise InputError(f"{RECORD} records a matrix {name!r}, and the model has none there: {tuple(shape)}")
        if location.transposed:
            layout = "in_out" if layout == "out_in" else "out_in"
        return cls(parameter, expert, layout, location.tensors[0])


def _check_masks(pruned: Iterable[str], masks: Mapping[str, Mapping[str, Any]]) -> None:
    if odd := sorted(set(pruned) ^ masks.keys()):
        raise HalveError(f"{odd[0]} is pruned and has no mask, or has one and is not pruned: please report this")


def _readable(content: dict[str, Any]) -> dict[str, Any]:
    """Return a record that every reader takes."""
    try:
        msgspec.convert(content, WholeRecord)
    except msgspec.ValidationError as error:
        raise HalveError(f"the training cannot be put on record ({error}): please report this") from error
    return content
