"""What was done to a block as plain JSON values and back, for a run that is continued by another process."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from halve.model.reconstruct import Tuned
from halve.order.folds import Order
from halve.order.recording import from_plain, to_plain
from halve.run.events import BlockReport, MatrixReport
from halve.solve.outcome import Status


def to_record(
    matrices: Sequence[MatrixReport], block: BlockReport | None, orders: Sequence[Order], spent: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the reports of one block as values that JSON keeps exactly.

    Args:
        matrices: of its matrices, in order.
        block: of its reconstruction, None if there was none.
        orders: of its channels.
        spent: what it took (`halve.run.phases.Phases.take`).
    """
    return {
        "matrices": [asdict(matrix) for matrix in matrices],
        "block": None if block is None else asdict(block),
        "orders": [to_plain(order) for order in orders],
        "spent": dict(spent),
    }


def from_record(
    record: Mapping[str, Any],
) -> tuple[list[MatrixReport], BlockReport | None, list[Order], dict[str, Any]]:
    """Return what `to_record` was given."""
    matrices = [
        MatrixReport(**{**entry, "shape": tuple(entry["shape"]), "status": Status(entry["status"])})
        for entry in record["matrices"]
    ]
    block = record["block"]
    tuned = None
    if block is not None:
        tuned = BlockReport(block["name"], tuple(block["parameters"]), Tuned(**block["tuned"]))
    return matrices, tuned, [from_plain(order) for order in record["orders"]], record["spent"]
