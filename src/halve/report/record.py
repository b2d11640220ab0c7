"""What was done, as the JSON that lies beside the checkpoint (``halve.json``)."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint.disk_layout import Location
from halve.checkpoint.mapped import Weights
from halve.checkpoint.shards import tensor_bytes
from halve.errors import HalveError
from halve.maths.pattern import Pattern
from halve.model.plan import Matrix
from halve.order.folds import Order
from halve.order.recording import to_plain as order_to_plain
from halve.provenance import environment
from halve.recorded import FORMAT, MOST
from halve.run.events import BlockReport, MatrixReport, RunReport
from halve.run.settings import Settings
from halve.serial import to_plain


def to_json(
    report: RunReport,
    settings: Settings,
    locations: Mapping[str, Location],
    masks: Mapping[str, Mapping[str, Any]],
    changed: Mapping[str, Sequence[str]],
    *,
    source: Mapping[str, Any],
    notes: Sequence[str],
    calibration: Mapping[str, Any],
    device: str,
    precision: str,
    moved: Mapping[str, Location] | None = None,
) -> dict[str, Any]:
    """Return ``halve.json`` without the file hashes, which the store adds; no times, so that equal runs are equal.

    Args:
        report: what the run did.
        settings: what was asked.
        locations: for each matrix by name, where it lies on disk; empty when nothing is written.
        masks: for each matrix by name, what `masks` says of it.
        changed: for each changed parameter by name, the tensors on disk that hold it; empty when nothing is written.
        source: what was pruned (name, kind, revision).
        notes: sentences on how that lies on disk.
        calibration: source, counts, seed and hash of the calibration data.
        device: where the run happened.
        precision: dtype of the forward products.
        moved: for each parameter whose channels were reordered, where it lies on disk; nothing when nothing is written.
    """
    asked = settings_json(settings)
    if not any("match_dense" in matrix.facts for matrix in report.matrices):  # a mixture of experts, or no statistics
        asked["objective"]["match_dense"] = 0.0
    return {
        "format": FORMAT,
        "source": dict(source),
        **asked,
        "calibration": dict(calibration),
        "device": device,
        "forward_dtype": precision,
        "mean_relative_loss": finite(report.mean_relative_loss),
        "matrices": [
            _matrix(matrix, locations.get(matrix.name)) | dict(masks.get(matrix.name, {})) for matrix in report.matrices
        ],
        "blocks": [_block(block, changed) for block in report.reconstructions],
        "norm_statistics": sorted(tensor for norm in report.norms for tensor in changed.get(norm, ())),
        **({"orders": [_order(order, moved or {}) for order in report.orders]} if report.orders else {}),
        **({"folds": _folds(report)} if settings.reorders else {}),
        "excluded": [
            {"name": entry.name, "shape": list(entry.shape), "reason": entry.reason} for entry in report.excluded
        ],
        "warnings": [*notes, *report.warnings],
        "environment": environment(),
    }


def mask_sha256(weight: Tensor) -> str:
    """Return the sha256 of a matrix's mask: one bit a weight, 1 where it is not zero, row by row, eight to a byte.

    Args:
        weight: (d_out, d_in), whatever way it lies in memory or on disk.
    """
    kept = (weight != 0).flatten()
    bits = nn.functional.pad(kept, (0, -kept.numel() % 8)).view(-1, 8).to(torch.uint8)
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return hashlib.sha256(tensor_bytes((bits * places).sum(1, dtype=torch.uint8))).hexdigest()


def masks(
    model: nn.Module,
    matrices: Iterable[MatrixReport | Matrix],
    pattern: Pattern,
    dtype: torch.dtype | None,
    weights: Weights | None = None,
) -> dict[str, dict[str, Any]]:
    """Return what there is to say of the mask of every pruned matrix, by the matrix's name.

    Args:
        model: the pruned model.
        matrices: that were pruned in it.
        pattern: that they have.
        dtype: that the weights are written in; None for their own.
        weights: where they lie; None is memory.

    Returns:
        dict[str, dict[str, Any]]: as `mask_facts`.

    Raises:
        HalveError: as `mask_facts`.
    """
    found = {}
    for matrix in matrices:
        parameter = model.get_parameter(matrix.parameter)
        weight = matrix.view(parameter.data)
        found[matrix.name] = mask_facts(matrix.name, weight if dtype is None else weight.to(dtype), pattern)
        if weights is not None:
            weights.done_with(parameter)
    return found


def mask_facts(name: str, weight: Tensor, pattern: Pattern) -> dict[str, Any]:
    """Return what there is to say of the mask of one pruned matrix.

    Args:
        name: of the matrix, for the message.
        weight: (d_out, d_in), as it is written.
        pattern: that it has.

    Returns:
        dict[str, Any]: ``mask_sha256``, and ``kept_per_group``: how many groups keep 0, 1, … N weights, None for an
        unstructured pattern.

    Raises:
        HalveError: it does not have the pattern.
    """
    kept = pattern.kept_per_group(weight)
    if kept is None:
        return {"mask_sha256": mask_sha256(weight), "kept_per_group": None}
    most = pattern.budget(weight.shape[1])[0]
    counts = kept.tolist()
    if any(counts[most + 1 :]):
        raise HalveError(f"{name} is not {pattern} after pruning, do not use it: please report this")
    return {"mask_sha256": mask_sha256(weight), "kept_per_group": counts[: most + 1]}


def settings_json(settings: Settings) -> dict[str, Any]:
    """Return what was asked for, every default filled in (`Settings.as_followed`), as plain JSON values."""
    return dict(to_plain(settings.as_followed))


def _matrix(matrix: MatrixReport, location: Location | None) -> dict[str, Any]:
    layout = matrix.layout
    if location is not None and location.transposed:
        layout = "in_out" if layout == "out_in" else "out_in"
    return {
        "name": matrix.name,
        "tensors": [] if location is None else list(location.tensors),
        "shape": list(matrix.shape),
        "layout": layout,
        "asked": matrix.asked,
        "method": matrix.method,
        "refit": matrix.refit,
        "status": str(matrix.status),
        "reason": matrix.reason,
        "facts": {key: finite(value) for key, value in matrix.facts.items() if key != "seconds"},
    }


def _block(block: BlockReport, changed: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "name": block.name,
        "error_before": block.tuned.before,
        "error_after": block.tuned.after,
        "epoch": block.tuned.epoch,
        "learning_rate": block.tuned.learning_rate,
        "steps": block.tuned.steps,
        "held_out_batches": block.tuned.held_out,
        "tensors": [tensor for parameter in block.parameters for tensor in changed.get(parameter, ())],
    }


def _folds(report: RunReport) -> dict[str, int]:
    return {"found": report.folds_found, "proven": report.folds_proven, "lowered": len(report.orders)}


def _order(order: Order, moved: Mapping[str, Location]) -> dict[str, Any]:
    """Return an order with its moves as they are on disk."""
    plain = order_to_plain(order)
    plain["consumer"] = f"{order.block}.{order.fold.consumer}"
    for move in plain["moves"]:
        name = f"{order.block}.{move.pop('parameter')}"
        location = moved.get(name)
        move["tensor"] = name if location is None else location.tensors[0]
        if location is not None and location.transposed:
            move["dim"] = 1 - move["dim"]
    return plain


def finite(value: float) -> float | None:
    """Return a number, None (null in JSON) for one that is not finite, or larger than readers take."""
    return value if abs(value) < MOST else None
