"""Tensors put back, and what is told of a model of which only a part was moved."""

import pytest
import torch

from halve.errors import InputError
from halve.order.folds import Move, random_order
from halve.order.undoing import Undoing


def test_two_orders_of_one_tensor_are_undone_last_first():
    one, other = (random_order(1, 8, torch.Generator().manual_seed(seed)) for seed in range(2))
    move = Move("a", 0, 0, 8)
    tensor = torch.arange(8.0)
    moved = move.applied(move.applied(tensor, one), other)
    undoing = Undoing([(one, (move,)), (other, (move,))])
    assert torch.equal(undoing.back("a", moved), tensor)
    assert "a" in undoing
    assert "b" not in undoing


def test_a_tensor_of_another_shape_is_refused():
    undoing = Undoing([(random_order(1, 8, torch.Generator().manual_seed(0)), (Move("a", 1, 0, 8),))])
    for shape in ((8,), (2, 4)):
        with pytest.raises(InputError, match="cannot have had its channels reordered"):
            undoing.back("a", torch.zeros(shape))


def test_a_part_that_was_not_moved_is_told():
    undoing = Undoing(())
    assert undoing.problem == ""
    undoing.undone.append("a")
    assert undoing.problem == ""
    undoing.untouched.append("b")
    assert "'a'" in undoing.problem
    assert "'b'" in undoing.problem
