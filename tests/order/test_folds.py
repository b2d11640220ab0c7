"""Orders of channels as indices, against permutation written out entry by entry."""

import pytest
import torch
from torch import nn

from halve.model.layers import patches
from halve.model.plan import Matrix
from halve.order.folds import Fold, Move, Order, inverse, random_order, segments


def by_hand(size, start, stride, repeats, order):
    index = list(range(size))
    units, width = order.shape
    for head in range(units * repeats):
        for channel in range(width):
            index[start + head * stride + channel] = start + head * stride + int(order[head // repeats, channel])
    return index


@pytest.mark.parametrize(("size", "start", "stride", "repeats"), [(24, 0, 4, 1), (40, 16, 4, 2), (72, 8, 12, 2)])
def test_an_index_is_what_it_says(size, start, stride, repeats):
    order = random_order(3, 4, torch.Generator().manual_seed(0))
    move = Move("a", 0, start, stride, repeats)
    assert move.index(order, size).tolist() == by_hand(size, start, stride, repeats, order)


def test_an_inverse_undoes_an_order_to_the_bit():
    order = random_order(2, 8, torch.Generator().manual_seed(1))
    tensor = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    move = Move("a", 1, 8, 16, repeats=1)
    moved = move.applied(tensor, order)
    assert not torch.equal(moved, tensor)
    assert torch.equal(move.applied(moved, inverse(order)), tensor)


def test_heads_that_do_not_fit_are_refused():
    order = random_order(2, 4, torch.Generator().manual_seed(0))
    for move in (Move("a", 0, 9, 4), Move("a", 0, -1, 4), Move("a", 0, 0, 4, repeats=3)):
        with pytest.raises(IndexError, match="do not fit"):
            move.index(order, 16)


def test_two_parts_of_one_parameter_both_move():
    order = torch.tensor([[1, 0]])
    fold = Fold("down", 1, 2, (Move("down", 1, 0, 2), Move("both", 0, 0, 2), Move("both", 0, 2, 2)))
    moved = Order("b", fold, order, 0.5).applied({"b.both": torch.arange(4.0), "b.other": torch.arange(2.0)})
    assert {name: tensor.tolist() for name, tensor in moved.items()} == {"b.both": [1.0, 0.0, 3.0, 2.0]}


def test_inputs_of_a_convolution_move_at_every_tap():
    conv = nn.Conv2d(8, 6, 3)
    channels = random_order(2, 4, torch.Generator().manual_seed(0))
    fold = Fold("conv.weight", 2, 4, (Move("conv.weight", 1, 0, 4), Move("made.weight", 0, 0, 4)))
    order = Order("block", fold, channels, 0.5)
    read = Matrix(
        name="block.conv.weight", parameter="block.conv.weight", block=0, d_out=6, d_in=72, layout="conv", taps=9
    )
    made = Matrix(name="block.made.weight", parameter="block.made.weight", block=0, d_out=8, d_in=4)
    index = order.of_inputs(read)
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1))
    swapped = x[:, torch.cat([channels[0], 4 + channels[1]])]
    torch.testing.assert_close(patches(swapped, conv), patches(x, conv)[..., index], rtol=0, atol=0)
    assert order.of_inputs(made) is None


def test_segments_cover_everything_once():
    assert [list(part) for part in segments(5, 3)] == [[0], [1, 2], [3, 4]]
    assert [list(part) for part in segments(2, 8)] == [[0], [1]]
