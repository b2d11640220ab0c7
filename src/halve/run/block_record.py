"""What was done to a block as plain JSON values and back, for a run that is continued by another process."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from halve.model.reconstruct import Tuned
from halve.order.recording import from_plain, to_plain
from halve.order.reordering import Reordered
from halve.run.events import BlockReport, MatrixReport
from halve.solve.outcome import Status


def to_record(
    matrices: Sequence[MatrixReport],
    block: BlockReport | None,
    reordered: Reordered,
    norms: Sequence[str],
    spent: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the reports of one block as values that JSON keeps exactly.

    Args:
        matrices: of its matrices, in order.
        block: of its reconstruction, None if there was none.
        reordered: what came of the folds of its channels.
        norms: full names of the statistics of its batch norms that were estimated anew.
        spent: what it took (`halve.run.phases.Phases.take`).
    """
    return {
        "matrices": [asdict(matrix) for matrix in matrices],
        "block": None if block is None else asdict(block),
        "orders": [to_plain(order) for order in reordered.orders],
        "folds": {"found": reordered.found, "proven": reordered.proven},
        "norms": list(norms),
        "spent": dict(spent),
    }


def from_record(
    record: Mapping[str, Any],
) -> tuple[list[MatrixReport], BlockReport | None, Reordered, list[str], dict[str, Any]]:
    """Return what `to_record` was given."""
    matrices = [
        MatrixReport(**{**entry, "shape": tuple(entry["shape"]), "status": Status(entry["status"])})
        for entry in record["matrices"]
    ]
    block = record["block"]
    tuned = None
    if block is not None:
        tuned = BlockReport(block["name"], tuple(block["parameters"]), Tuned(**block["tuned"]))
    reordered = Reordered(tuple(from_plain(order) for order in record["orders"]), **record["folds"])
    return matrices, tuned, reordered, record["norms"], record["spent"]
