"""Orders as text and back, and what a stranger may have written instead."""

import json

import pytest
import torch

from halve.errors import InputError
from halve.order.folds import Fold, Move, Order, random_order
from halve.order.recording import FoldsEntry, from_plain, packed_channels, read_channels, said_of_orders, to_plain


@pytest.mark.parametrize(("units", "width"), [(1, 8), (3, 64), (1, 70_000)])
def test_an_order_comes_back_exactly(units, width):
    channels = random_order(units, width, torch.Generator().manual_seed(0))
    fold = Fold(
        "mlp.down.weight", units, width, (Move("mlp.down.weight", 1, 0, width, 2), Move("mlp.up.weight", 0, 4, 9))
    )
    order = from_plain(json.loads(json.dumps(to_plain(Order("layers.3", fold, channels, 0.1 + 0.2)))))
    assert (order.block, order.fold, order.estimate) == ("layers.3", fold, 0.1 + 0.2)
    assert torch.equal(order.channels, channels)


def test_what_is_said_of_folds():
    folds = FoldsEntry(found=14, proven=12, lowered=10)
    assert said_of_orders(10, folds=folds).endswith(
        "Of 14 folds that were found 12 were proven, and an order that lowers the estimated loss was found for 10"
    )
    assert said_of_orders(0, folds=FoldsEntry(found=1, proven=1, lowered=0)).startswith(
        "Of 1 fold that was found 1 was"
    )
    assert said_of_orders(0, folds=FoldsEntry(found=0, proven=0, lowered=0)) == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("§", "no base64"),
        (packed_channels(torch.tensor([[0, 1]])), "has 4 bytes"),
        (packed_channels(torch.tensor([[0, 1, 2, 2]])), "names a channel twice"),
        (packed_channels(torch.tensor([[0, 1, 2, 9]])), "names a channel twice, or one that is not there"),
    ],
)
def test_what_is_no_order_is_refused(text, why):
    with pytest.raises(InputError, match=why):
        read_channels(text, 1, 4)
