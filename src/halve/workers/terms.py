"""What driver and worker say to each other: the content of every message, beside its tensors."""

from dataclasses import asdict
from typing import Any

from msgspec import Struct, to_builtins
from torch import Tensor

from halve.errors import (
    CalibrationError,
    CorruptFileError,
    FactorisationError,
    HalveError,
    InputError,
    LayerFailedError,
    ResumeMismatchError,
    UnreadableFileError,
    UnsupportedModelError,
    one_line,
)
from halve.solve.outcome import Outcome, Status
from halve.workers.messages import Message, pack

_ERRORS = {
    kind.__name__: kind
    for kind in (
        *(HalveError, InputError, UnsupportedModelError, CalibrationError, LayerFailedError, FactorisationError),
        *(CorruptFileError, UnreadableFileError, ResumeMismatchError),
    )
}
LOST = "lost"
"""Stands for the kind of an error where a worker could not get what another one had summed; the text says which."""


class Charge(Struct, frozen=True, kw_only=True):
    """What a worker is to work on; the message holds the calibration batches besides, as ``batch.argument``.

    Attributes:
        request: what is asked for (`halve.serial.to_plain`), as far as it concerns a worker.
        model: path of the model on the driver's machine.
        mark: fields of the fingerprint that a worker must have too: of the model's files, and of the environment.
        files: size of every file of the model, by its path below the model's directory, for workers without them.
        threads: of the CPU.
        batches: of the calibration set.
        shards: all of them, as ranges of batches: the first and the one after the last.
        scratch: a folder of this machine; empty where the worker makes its own.
        collect: whether statistics are needed.
        fixed: full names of parameters and buffers whose channels must not move.
        together: names of parameters that are stored in one tensor.
        neighbours: workers on one machine, as far as that is known.
    """

    request: dict[str, Any]
    model: str
    mark: dict[str, str]
    files: dict[str, int]
    threads: int
    batches: int
    shards: list[tuple[int, int]]
    scratch: str
    collect: bool
    fixed: list[str]
    together: list[list[str]]
    neighbours: int


def plain(charge: Charge) -> dict[str, Any]:
    """Return a charge as plain JSON values."""
    found: dict[str, Any] = to_builtins(charge)
    return found


class Answer(Struct, frozen=True, kw_only=True):
    """What every answer of a worker has.

    Attributes:
        failed: kind of an error and its sentence; None where all went well.
    """

    failed: tuple[str, str] | None = None


class Hired(Answer, frozen=True, kw_only=True):
    """Whether a worker needs the model's files, since they are not on its disk, and what its node is called."""

    needs_files: bool = False
    node: str = ""


class Part(Struct, frozen=True, kw_only=True):
    """What a worker has summed over some of its shards.

    Attributes:
        first: index of the first of these shards.
        shards: indices of all of them.
        leaders: for every matrix that received inputs, the one under whose name they were summed.
        sums: for each of those, the number of input features, and the tokens in each sum.
    """

    first: int
    shards: list[int]
    leaders: dict[str, str]
    sums: dict[str, tuple[int, list[int]]]


class Collected(Answer, frozen=True, kw_only=True):
    """What a worker has summed over its shards, in their order."""

    parts: list[Part] = []


class Summed(Answer, frozen=True, kw_only=True):
    """Sums over the inputs of one matrix (`halve.maths.gram.GramAccumulator.tensors` are the message's)."""

    d_in: int = 0
    counts: list[int] = []


class Changed(Struct, frozen=True, kw_only=True):
    """The parameters of a block that differ from the dense model's are the message's tensors."""

    block: int


class Folds(Answer, frozen=True, kw_only=True):
    """The proven folds of a block (`halve.order.recording.fold_to_plain`), and how many were found."""

    folds: list[dict[str, Any]] = []
    found: int = 0


class Choice(Struct, frozen=True, kw_only=True):
    """The matrix whose inputs an order is to be chosen for, and all folds of its block, as in `Folds`."""

    block: int
    matrix: str
    folds: list[dict[str, Any]]


class Chosen(Answer, frozen=True, kw_only=True):
    """Orders that were chosen (`halve.order.recording.to_plain`), and sentences about those that could not be."""

    orders: list[dict[str, Any]] = []
    cautions: list[str] = []


class Task(Struct, frozen=True, kw_only=True):
    """Matrices to prune together, by name, the options for them, and the orders that they come into first."""

    block: int
    matrices: list[str]
    options: dict[str, Any]
    orders: list[dict[str, Any]]


class SolvedMatrix(Struct, frozen=True, kw_only=True):
    """The outcome of one matrix but for its weights."""

    status: Status
    method: str
    reason: str
    facts: dict[str, float]


class Solved(Answer, frozen=True, kw_only=True):
    """Outcomes of a task, in its order; the weights are the message's tensors, by their place in it."""

    outcomes: list[SolvedMatrix] = []

    def outcomes_with(self, tensors: dict[str, Tensor]) -> list[Outcome]:
        """Return the outcomes with their weights."""
        return [
            Outcome(tensors[str(index)], each.status, each.method, each.reason, each.facts)
            for index, each in enumerate(self.outcomes)
        ]


class Tuning(Struct, frozen=True, kw_only=True):
    """How to reconstruct a block (`halve.model.reconstruct.Reconstruction`); its pruned weights are the tensors."""

    block: int
    options: dict[str, Any]


class TunedBlock(Answer, frozen=True, kw_only=True):
    """What a reconstruction achieved (`halve.model.reconstruct.Tuned`); what it changed are the message's tensors."""

    tuned: dict[str, Any] = {}


class Spent(Answer, frozen=True, kw_only=True):
    """Seconds that a worker has spent, by what it did."""

    seconds: dict[str, float] = {}


def solved(outcomes: list[Outcome]) -> Message:
    """Return the message about outcomes."""
    told = [{name: value for name, value in asdict(each).items() if name != "weight"} for each in outcomes]
    return pack({"outcomes": told}, {str(index): each.weight for index, each in enumerate(outcomes)})


def no_room(error: Exception) -> HalveError:
    """Return what is said where Ray's store has no room."""
    return HalveError(
        f"Ray's object store is full ({one_line(error)[:120]}): give it more memory (object_store_memory) or room to "
        "spill to, or use fewer workers or shards; then go on with halve resume"
    )


def failed(error: HalveError) -> Message:
    """Return the message that something went wrong."""
    kind = next((each.__name__ for each in type(error).__mro__ if each.__name__ in _ERRORS), "HalveError")
    return pack({"failed": [kind, str(error)]})


def check(answer: Answer) -> None:
    """Raise the error that an answer tells of.

    Raises:
        HalveError: of the kind that was raised by the worker.
    """
    if answer.failed is not None:
        kind, text = answer.failed
        raise _ERRORS.get(kind, HalveError)(text)
