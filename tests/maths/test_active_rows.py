import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.maths.active_rows import ActiveRows


def halvings(start, target, limit):
    """What the iteration below gives where no row is ever left out: rows of halved values, and how often each was."""
    value, steps = start.clone(), torch.zeros(len(start), dtype=torch.int64)
    for _ in range(limit):
        open_rows = value.abs().amax(-1) > target
        value[open_rows] /= 2
        steps += open_rows
    return value, steps


def packed_halvings(start, target, limit, share):
    """The same with rows that go on being halved after they have finished, until they are left out."""
    active, value, steps = ActiveRows(start.clone(), share), start.clone(), torch.full((len(start),), limit)
    for step in range(limit):
        steps[active.finish(value.abs().amax(-1) <= target, value)] = step
        value, target = active.pack(value, target)
        assert len(active) == len(value) == len(active.finished)
        assert int((~active.finished).sum()) == active.unfinished
        value = value / 2
    return active.result(value), steps


@given(
    exponents=st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=2), max_size=12),
    limit=st.integers(0, 16),
    share=st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 1.0]),
)
@settings(deadline=None)
def test_every_row_ends_as_it_does_where_none_is_ever_left_out(exponents, limit, share):
    start = 2.0 ** torch.tensor(exponents, dtype=torch.float32).reshape(-1, 2)
    target = torch.ones(len(start))
    expected, steps = halvings(start, target, limit)
    got, counted = packed_halvings(start, target, limit, share)
    assert torch.equal(got, expected)
    assert torch.equal(counted, steps)


@pytest.mark.parametrize(("share", "left_out"), [(0.1, 3), (0.3, 3), (0.31, 0), (1.0, 0)])
def test_rows_are_left_out_once_the_share_has_finished(share, left_out):
    active = ActiveRows(torch.zeros(10, 2), share)
    ready = torch.arange(10) < 3
    assert active.finish(ready, torch.ones(10, 2)).tolist() == [0, 1, 2]
    value, numbers = active.pack(torch.ones(10, 2), torch.arange(10))
    assert len(active) == len(value) == 10 - left_out
    assert numbers.tolist() == list(range(left_out, 10))
    assert active.unfinished == 7


def test_what_becomes_of_a_finished_row_is_ignored():
    result = torch.full((4, 1), -1.0)
    active = ActiveRows(result, 0.9)
    assert active.finish(torch.tensor([False, True, False, False]), torch.full((4, 1), 5.0)).tolist() == [1]
    assert result.squeeze().tolist() == [-1.0, 5.0, -1.0, -1.0]
    assert active.finish(torch.tensor([True, True, False, False]), torch.full((4, 1), 6.0)).tolist() == [0]
    assert active.result(torch.full((4, 1), 7.0)).squeeze().tolist() == [6.0, 5.0, 7.0, 7.0]
    assert active.result(torch.full((4, 1), 8.0)) is result
