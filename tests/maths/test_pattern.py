import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halve.errors import PatternError
from halve.maths.pattern import MAX_GROUP, Pattern, Tournament, apply_mask


@pytest.mark.parametrize(
    ("text", "keep", "group"), [("2:4", 2, 4), (" 1:4 ", 1, 4), ("04:08", 4, 8), ("31:32", 31, 32)]
)
def test_n_of_m_means_keep_n(text, keep, group):
    pattern = Pattern(text)
    assert (pattern.keep, pattern.group) == (keep, group)
    assert pattern == Pattern(f"{keep}:{group}")
    assert str(pattern) == f"{keep}:{group}"
    assert pattern.sparsity == pytest.approx(1 - keep / group)


@pytest.mark.parametrize(
    "text",
    ["", "2", "4:4", "5:4", "0:4", "1:33", "2:4:8", "-1:4", "2.0:4", "50", "0%", "100%", "-5%", "nan%", "a:b", None],
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(PatternError, match="is not understood"):
        Pattern(text)


def test_parse_returns_the_pattern_it_is_given():
    pattern = Pattern("2:4")
    assert Pattern.parse(pattern) is pattern
    assert Pattern.parse("2:4") == pattern


def test_percentages_count_zeros_within_a_row():
    pattern = Pattern("70%")
    assert not pattern.structured
    mask = pattern.keep_mask(torch.rand(5, 10))
    assert mask.sum(-1).tolist() == [3] * 5
    assert Pattern("50.0%") == Pattern("50%")


@pytest.mark.parametrize("d_in", [0, 1, 2, 3, 5, 6, 7])
def test_rows_that_do_not_divide_are_refused(d_in):
    with pytest.raises(PatternError, match=f"divisible by 4, got d_in = {d_in}"):
        Pattern("2:4").keep_mask(torch.ones(2, d_in))
    assert not Pattern("2:4").fits(d_in)


def _brute_force_mask(scores: list[float], keep: int) -> list[bool]:
    """Best subset by total order: larger score first, then lower index; checked over all subsets."""
    order = {i: (-scores[i], i) for i in range(len(scores))}
    best = min(itertools.combinations(range(len(scores)), keep), key=lambda kept: sorted(order[i] for i in kept))
    return [i in best for i in range(len(scores))]


@given(
    st.sampled_from(["1:2", "1:4", "2:4", "3:4", "4:8", "2:8", "6:8"]),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 3.5]), min_size=8, max_size=8),
)
def test_keep_mask_equals_brute_force_with_ties_to_the_lowest_index(text, scores):
    pattern = Pattern(text)
    mask = pattern.keep_mask(torch.tensor(scores))
    expected = [
        kept
        for start in range(0, 8, pattern.group)
        for kept in _brute_force_mask(scores[start : start + pattern.group], pattern.keep)
    ]
    assert mask.tolist() == expected


def test_unstructured_ties_go_to_the_lowest_index():
    assert Pattern("50%").keep_mask(torch.ones(1, 6)).tolist() == [[True] * 3 + [False] * 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_largest_group_and_every_float_dtype(dtype):
    scores = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(dtype).reshape(1, 64)
    mask = Pattern(f"3:{MAX_GROUP}").keep_mask(scores)
    for start in (0, 32):
        kept = scores[0, start : start + 32][mask[0, start : start + 32]]
        assert sorted(kept.tolist()) == sorted(scores[0, start : start + 32].topk(3).values.tolist())
    assert mask.sum() == 6


def test_project_keeps_the_largest_magnitudes_and_writes_no_negative_zero():
    weight = torch.tensor([[-3.0, 1.0, -0.0, 2.0, -0.0, -0.0, 5.0, 0.0]])
    projected = Pattern("2:4").project(weight)
    assert projected.tolist() == [[-3.0, 0.0, 0.0, 2.0, 0.0, 0.0, 5.0, 0.0]]
    assert not torch.signbit(projected[projected == 0]).any()


def test_apply_mask_also_cleans_kept_negative_zeros():
    cleaned = apply_mask(torch.tensor([-0.0, -1.0]), torch.tensor([True, False]))
    assert not torch.signbit(cleaned).any()


def test_only_more_than_n_is_a_violation():
    weight = torch.tensor([[1.0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]])
    assert Pattern("2:4").violating_groups(weight).tolist() == [[False, False, True, False]]
    assert not Pattern("2:4").satisfied_by(weight)
    assert Pattern("3:4").satisfied_by(weight)
    assert Pattern("2:4").satisfied_by(torch.tensor([[1.0, float("nan"), 0, 0]]))
    assert not Pattern("1:4").satisfied_by(torch.tensor([[1.0, float("nan"), 0, 0]]))


@pytest.mark.parametrize("text", ["2:4", "50%"])
def test_no_rows_are_fine(text):
    empty = torch.zeros(0, 8)
    assert Pattern(text).project(empty).shape == (0, 8)
    assert Pattern(text).satisfied_by(empty)


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "4:8", "1:2", "31:32"])
def test_a_tournament_prunes_what_keep_mask_does_ties_included(text):
    pattern = Pattern(text)
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat(
        (
            torch.randint(0, 3, (500, pattern.group), generator=generator).float(),  # many ties
            torch.rand(500, pattern.group, generator=generator),
        )
    )
    losers = Tournament(pattern.keep, pattern.group, scores.device).losers(scores.mT.contiguous())
    assert torch.equal(losers.mT, (~pattern.keep_mask(scores)).float())
