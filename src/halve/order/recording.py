"""Orders as plain values: in the state of a run, and in ``halve.json``."""

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from halve.errors import InputError, counted
from halve.order.folds import Fold, Move, Order

_WIDTH_OF_SHORT = 1 << 16
"""Channels of a unit up to which two bytes name one."""


def packed_channels(channels: Tensor) -> str:
    """Return an order as text: base64 of its entries row by row, of two bytes each, four where units are wider.

    Args:
        channels: (units, width) int64, ``0 <= entry < width``.
    """
    size = 2 if channels.shape[1] <= _WIDTH_OF_SHORT else 4
    return b64encode(b"".join(entry.to_bytes(size, "little") for entry in channels.flatten().tolist())).decode()


def read_channels(text: str, units: int, width: int) -> Tensor:
    """Return what `packed_channels` was given.

    Raises:
        InputError: it is no order of so many units.
    """
    size = 2 if width <= _WIDTH_OF_SHORT else 4
    try:
        content = b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"an order of channels is no base64: {error}") from error
    if len(content) != units * width * size or not content:
        raise InputError(f"an order of channels has {len(content)} bytes, not those of {units} x {width} channels")
    flat = [int.from_bytes(content[at : at + size], "little") for at in range(0, len(content), size)]
    channels = torch.tensor(flat, dtype=torch.int64).view(units, width)
    if not torch.equal(channels.sort(dim=1).values, torch.arange(width).expand(units, -1)):
        raise InputError("an order of channels names a channel twice, or one that is not there")
    return channels


class FoldsEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How many folds a run has found and proven, and in how many an order lowered the estimated loss."""

    found: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    proven: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    lowered: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]


def said_of_orders(count: int, *, folds: FoldsEntry | None = None, before: bool = False) -> str:
    """Say that channels were reordered, and of how many folds; nothing where there is nothing to say.

    Args:
        count: orders that channels were put into.
        folds: of the run; None where it was not asked to reorder, or has not said.
        before: whether channels of the model that was pruned had been reordered by then.
    """
    found = []
    if count:
        found.append(
            f"Channels were reordered in {counted(count, 'place')}, folded into neighbouring "
            "weights. Before pruning, the reordered model is the same function; an adapter for the model as it was has "
            "to be merged with `halve merge`"
        )
    if folds is not None and folds.found:
        found.append(
            f"Of {counted(folds.found, 'fold that was', 'folds that were')} found {folds.proven} "
            f"{'was' if folds.proven == 1 else 'were'} proven, and an order that lowers the estimated loss was found "
            f"for {folds.lowered}"
        )
    if before:
        found.append(
            "The checkpoint that this was made from had its channels reordered already: adapters and masks for the "
            "model before that do not fit"
        )
    return ". ".join(found)


def to_plain(order: Order) -> dict[str, Any]:
    """Return an order as values that JSON keeps exactly."""
    fold = fold_to_plain(order.fold)
    moves = fold.pop("moves")
    chosen = {"estimate": order.estimate, "channels": packed_channels(order.channels)}
    return {"block": order.block, **fold, **chosen, "moves": moves}


def from_plain(plain: Mapping[str, Any]) -> Order:
    """Return what `to_plain` was given."""
    fold = fold_from_plain(plain)
    return Order(plain["block"], fold, read_channels(plain["channels"], fold.units, fold.width), plain["estimate"])


def fold_to_plain(fold: Fold) -> dict[str, Any]:
    """Return a fold as values that JSON keeps exactly."""
    moves = [asdict(move) for move in fold.moves]
    return {"consumer": fold.consumer, "units": fold.units, "width": fold.width, "moves": moves}


def fold_from_plain(plain: Mapping[str, Any]) -> Fold:
    """Return what `fold_to_plain` was given."""
    moves = tuple(Move(**move) for move in plain["moves"])
    return Fold(plain["consumer"], plain["units"], plain["width"], moves)
