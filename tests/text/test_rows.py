"""Passages to rows: every token in its place, and only what has been said by somebody is learned."""

import pytest
import torch

from halve.text.rows import IGNORED, Passage, Rows, rows_of

PAD = 99


def passage(first, length, **settings):
    return Passage(torch.arange(first, first + length, dtype=torch.int32), **settings)


def test_packed_passages_have_positions_of_their_own_and_lose_nothing():
    rows = rows_of([passage(10, 6), passage(20, 7), passage(30, 3)], 4, PAD)
    assert rows.ids.tolist() == [[10, 11, 12, 13], [14, 15, 20, 21], [22, 23, 24, 25], [30, 31, 32, PAD]]
    assert rows.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 0]]
    no = IGNORED
    assert rows.labels.tolist() == [[no, 11, 12, 13], [no, 15, no, 21], [no, 23, 24, 25], [no, 31, 32, no]]
    assert rows.learned == 10
    assert rows.ids.dtype == rows.positions.dtype == rows.labels.dtype == torch.int64


def test_the_last_row_is_filled_up_and_a_single_token_begins_none():
    rows = rows_of([passage(10, 5), passage(20, 2)], 4, PAD)
    assert rows.ids.tolist() == [[10, 11, 12, 13], [20, 21, PAD, PAD]]
    assert rows.positions[1].tolist() == [0, 1, 0, 1]
    assert rows.labels[1].tolist() == [IGNORED, 21, IGNORED, IGNORED]


def test_what_begins_a_row_or_a_passage_is_never_learned():
    """By brute force: a label is what the place before it, in the same passage, has to say."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (40,), generator=generator).tolist()
    rows = rows_of([passage(100 * index, length) for index, length in enumerate(lengths)], 7, PAD)
    for row in range(len(rows)):
        for column in range(7):
            id_, label = int(rows.ids[row, column]), int(rows.labels[row, column])
            goes_on = column > 0 and id_ == int(rows.ids[row, column - 1]) + 1 and id_ % 100 > 0
            assert label == (id_ if goes_on else IGNORED)
            assert goes_on == (int(rows.positions[row, column]) > 0) or id_ == PAD


def test_a_bos_and_what_comes_first_after_it_are_not_learned():
    rows = rows_of([passage(10, 6, lead=2)], 6, PAD)
    assert rows.labels.tolist() == [[IGNORED, IGNORED, IGNORED, 13, 14, 15]]


def test_only_what_is_marked_is_learned():
    learned = torch.tensor([True, False, True, True, False])
    assert rows_of([passage(10, 5, learned=learned)], 5, PAD).labels.tolist() == [[IGNORED, IGNORED, 12, 13, IGNORED]]


def test_a_row_with_nothing_to_learn_is_left_out():
    nothing = torch.zeros(4, dtype=torch.bool)
    rows = rows_of([passage(10, 4, learned=nothing), passage(20, 4)], 4, PAD)
    assert rows.ids.tolist() == [[20, 21, 22, 23]]
    assert len(rows_of([passage(10, 1)], 4, PAD)) == 0


def test_chats_are_not_continued_in_another_row():
    rows = rows_of([passage(10, 3, whole=True), passage(20, 4, whole=True), passage(30, 9, whole=True)], 5, PAD)
    assert rows.ids.tolist() == [[10, 11, 12, PAD, PAD], [20, 21, 22, 23, PAD], [30, 31, 32, 33, 34]]
    assert rows.cut == 1


def test_one_passage_a_row_where_a_model_would_mix_them():
    rows = rows_of([passage(10, 3), passage(20, 6), passage(30, 2)], 4, PAD, apart=True)
    assert [row[0] for row in rows.ids.tolist()] == [10, 20, 24, 30]
    assert rows.positions[0].tolist() == [0, 1, 2, 0]


def test_rows_are_joined_in_order():
    parts = [rows_of([passage(10, 4)], 4, PAD), rows_of([passage(20, 7, whole=True)], 4, PAD)]
    joined = Rows.joined(parts)
    assert joined.ids.tolist() == [[10, 11, 12, 13], [20, 21, 22, 23]]
    assert (joined.cut, joined.learned) == (1, 6)


@pytest.mark.parametrize("apart", [False, True])
def test_a_passage_is_not_changed(apart):
    given = passage(10, 9)
    before = given.ids.clone()
    rows_of([given], 4, PAD, apart=apart)
    assert torch.equal(given.ids, before)
    assert given.labels.tolist() == [IGNORED, *range(11, 19)]
