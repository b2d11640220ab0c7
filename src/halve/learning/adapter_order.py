"""An adapter for a checkpoint whose channels were reordered: taken as it is, put into that order, or refused by name.

An adapter says nothing of an order; its config says which model it was trained on. One that was trained on the
reordered checkpoint, or on one in the same order that this was trained from or merged into, fits it as it is. One that
was trained on the model from which that was made has its rows and columns moved along. Of any other nobody can tell.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from halve.checkpoint.load import LoadedModel, Source
from halve.checkpoint.validated import shown
from halve.errors import InputError
from halve.learning.adapter import CONFIG, Adapter, Update
from halve.model.layers import is_conv1d
from halve.order.folds import Move
from halve.recorded import SourcedRecord, order_on_record, orders_of


def in_order_of(adapter: Adapter, record: SourcedRecord, source: Source, loaded: LoadedModel) -> Adapter:
    """Return an adapter in the order of the channels of a checkpoint.

    Args:
        adapter: as it was saved.
        record: of the checkpoint.
        source: the checkpoint.
        loaded: its model.

    Raises:
        InputError: the channels that it changes were reordered, and its config names no model whose order is known.
        CorruptFileError: an order on record is none.
    """
    moves = _moves_by_module(adapter, orders_of(record, source.path), loaded)
    origin = record.source
    if not moves and not origin.reordered:
        return adapter
    alike = {source.name, str(source.path), *order_on_record(record).names}
    if _names(adapter.base, alike):
        return adapter
    if not _names(adapter.base, {origin.name}):
        known = [source.name, *sorted(alike - {source.name, str(source.path), origin.name}), origin.name]
        raise InputError(
            f"channels of {source.name} were reordered, and the adapter's base is {shown(repr(adapter.base))}, whose "
            f"order is not on record: name in its {CONFIG} (base_model_name_or_path) which model it was trained on, if "
            f"it is one of {shown(', '.join(map(repr, known)))}"
        )
    updates = {module: _moved(update, moves.get(module, ())) for module, update in adapter.updates.items()}
    return replace(adapter, updates=updates)


def _names(base: str, names: Collection[str]) -> bool:
    """Whether the base that an adapter names is one of these models, by name or by place."""
    places = {Path(name).expanduser().resolve() for name in names}
    return base != "" and (base in names or Path(base).expanduser().resolve() in places)


def _moves_by_module(
    adapter: Adapter, orders: Collection[tuple[Tensor, tuple[Move, ...]]], loaded: LoadedModel
) -> dict[str, list[tuple[Tensor, Move]]]:
    """Return what has moved of each matrix that an adapter changes: dimension 0 is its outputs, 1 its inputs."""
    by_tensor: dict[str, list[tuple[Tensor, Move]]] = {}
    for channels, moves in orders:
        for move in moves:
            by_tensor.setdefault(move.parameter, []).append((channels, move))
    modules = dict(loaded.model.named_modules(remove_duplicate=False))
    found = {}
    for module in adapter.updates.keys() & modules.keys():
        location = loaded.layout.locate(f"{module}.weight")
        on_disk = [each for name in location.tensors for each in by_tensor.get(name, [])]
        flipped = is_conv1d(modules[module]) != location.transposed
        if on_disk:
            found[module] = [
                (order, replace(move, dim=1 - move.dim if flipped else move.dim)) for order, move in on_disk
            ]
    return found


def _moved(update: Update, moves: Collection[tuple[Tensor, Move]]) -> Update:
    for order, move in moves:
        if move.dim == 1:
            update = replace(update, first=move.applied(update.first, order))
            continue
        magnitude = update.magnitude
        update = replace(
            update,
            second=move.applied(update.second, order),
            magnitude=None if magnitude is None else move.applied(magnitude, order),
        )
    return update
