from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halve.errors import InputError, PatternError
from halve.maths.pattern import Pattern
from halve.runtime import packed_matrix as packed_module
from halve.runtime.packed_matrix import DTYPES, OVERREAD, PackedMatrix, kept_per_row, mask_bytes, pack, unpack
from packed_matrices import PATTERNS, every_dtype, pruned, same_bits


@st.composite
def matrices(draw):
    pattern = draw(st.sampled_from(PATTERNS))
    group = Pattern(pattern).group or 1
    d_in = draw(st.integers(1, 260 // group)) * group
    arguments = {"dtype": draw(st.sampled_from(DTYPES)), "seed": draw(st.integers(0, 1000))}
    return pruned(
        draw(st.integers(1, 9)), d_in, pattern, empty=draw(st.sampled_from([0, 0.3, 1])), **arguments
    ), pattern


@given(matrices())
def test_unpacking_gives_the_same_bits(case):
    weight, pattern = case
    packed = pack(weight, pattern)
    assert (packed.shape, packed.dtype, packed.pattern) == (weight.shape, weight.dtype, pattern)
    assert same_bits(unpack(packed), weight)


@given(matrices())
def test_every_row_keeps_as_much_as_the_pattern_allows(case):
    weight, pattern = case
    packed = pack(weight, pattern)
    # An oracle of its own: bits and values read one by one.
    words = packed.mask.tolist()
    values = iter(packed.values.tolist())
    for row, dense in zip(words, weight.tolist(), strict=True):
        places = [8 * j + i for j, byte in enumerate(row) for i in range(8) if byte >> i & 1]
        assert len(places) == packed.kept
        kept = dict(zip(places, values, strict=False))
        assert [kept.get(place, 0.0) for place in range(len(dense))] == dense
    assert len(list(values)) == OVERREAD


def test_the_format_of_one_row():
    packed = pack(torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0]]), "2:4")
    assert packed.mask.tolist() == [[0b1001_0110, 0, 0, 0, 0, 0, 0, 0]]  # the second group keeps its first zero
    assert packed.values.tolist() == [1.0, 2.0, 0.0, 3.0] + [0.0] * OVERREAD


def test_small_enough():
    weight = pruned(64, 4096, "2:4")
    assert pack(weight, "2:4").nbytes <= 0.58 * weight.nbytes


@every_dtype
def test_a_negative_zero_is_kept_where_there_is_room(dtype):
    weight = torch.tensor([[0.0, 0.0, -0.0, 5.0], [-0.0, 1.0, 2.0, -0.0], [0.0, 0.0, 0.0, -0.0]], dtype=dtype)
    expected = torch.tensor([[0.0, 0.0, -0.0, 5.0], [0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, -0.0]], dtype=dtype)
    assert same_bits(unpack(pack(weight, "2:4")), expected)


def test_what_is_not_finite_is_kept():
    weight = torch.tensor([[float("nan"), 0.0, 0.0, -float("inf")], [0.0, 1e-45, 0.0, 0.0]])
    assert same_bits(unpack(pack(weight, "2:4")), weight)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_matrix_outside_the_pattern_is_refused_and_nothing_selected(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(packed_module, "library", None)
    weight = pruned(6, 64, "2:4")
    weight[4, :4] = 1.0
    with pytest.raises(InputError, match=r"not in pattern 2:4: 1 of its 96 groups .* in row 4"):
        pack(weight, "2:4")
    with pytest.raises(InputError, match=r"not in pattern 60%: 6 of its 6 groups"):
        pack(torch.ones(6, 64), "60%")


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4), torch.zeros(2, 2, 4), torch.zeros(0, 4), torch.zeros(2, 4).double(), torch.zeros(2, 4).int()],
)
def test_what_cannot_be_packed_is_refused(weight):
    with pytest.raises(InputError, match="only matrices in bfloat16 or float16 or float32"):
        pack(weight, "2:4")


def test_rows_that_do_not_fit_the_pattern_are_refused():
    with pytest.raises(PatternError, match="divisible by 4"):
        pack(torch.zeros(2, 6), "2:4")


def test_views_and_parameters_are_packed():
    weight = pruned(8, 32, "2:4")
    apart = torch.empty(32, 8, dtype=weight.dtype).T.copy_(weight)
    assert not apart.is_contiguous()
    assert same_bits(unpack(pack(torch.nn.Parameter(apart), "2:4")), weight)


@pytest.mark.parametrize("pattern", ["2:4", "5:16", "60%"])
def test_a_large_matrix_is_worked_on_in_parts(pattern, monkeypatch):
    """By PyTorch: the compiled function needs no parts."""
    weight = pruned(50, 64, pattern)
    monkeypatch.setattr(packed_module, "library", None)
    whole = pack(weight, pattern)
    monkeypatch.setattr(packed_module, "_CHUNK", 7 * 64)
    parts = pack(weight, pattern)
    assert torch.equal(whole.mask, parts.mask)
    assert same_bits(whole.values, parts.values)
    assert same_bits(unpack(whole), weight)
    whole.check_mask()
    wrong = whole.mask.clone()
    wrong[48, 0] ^= 1  # in the last part alone
    with pytest.raises(InputError, match=r"does not keep"):
        replace(whole, mask=wrong).check_mask()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (4, 60)},
        {"shape": (5, 64)},
        {"shape": (4, 64, 1)},
        {"shape": (0, 64)},
        {"pattern": "1:4"},
        {"pattern": "2:3"},
        {"pattern": "nonsense"},
        {"mask": torch.full((4, 8), 0x33, dtype=torch.int8)},
        {"mask": torch.full((4, 7), 0x33, dtype=torch.uint8)},
        {"mask": torch.full((4, 16), 0x33, dtype=torch.uint8)[:, ::2]},
        {"values": torch.zeros(4 * 32 + OVERREAD, dtype=torch.float64)},
        {"values": torch.zeros(4 * 32 + OVERREAD - 1)},
        {"values": torch.zeros(4 * 32 + OVERREAD, 1)},
        {"values": torch.zeros(4 * 32 + OVERREAD, device="meta")},
    ],
)
def test_parts_that_contradict_each_other_are_refused(change):
    packed = PackedMatrix(torch.full((4, 8), 0x33, dtype=torch.uint8), torch.zeros(4 * 32 + OVERREAD), (4, 64), "2:4")
    with pytest.raises(InputError):
        replace(packed, **change)


@given(matrices())
def test_a_mask_is_sound_as_packed_and_not_with_any_bit_changed(case):
    weight, pattern = case
    packed = pack(weight, pattern)
    packed.check_mask()
    for place in {0, len(packed.mask.flatten()) // 2, packed.mask.numel() - 1}:
        mask = packed.mask.clone()
        mask.view(-1)[place] ^= 0x80
        with pytest.raises(InputError, match=r"does not keep what pattern"):
            replace(packed, mask=mask).check_mask()


def test_as_many_bits_a_row_are_not_enough():
    packed = PackedMatrix(torch.full((4, 8), 0x33, dtype=torch.uint8), torch.zeros(4 * 32 + OVERREAD), (4, 64), "2:4")
    with pytest.raises(InputError, match=r"does not keep"):
        replace(packed, mask=torch.full((4, 8), 0x0F, dtype=torch.uint8)).check_mask()


def test_sizes():
    assert [mask_bytes(d_in) for d_in in (1, 64, 65, 4096)] == [8, 8, 16, 512]
    assert [kept_per_row(Pattern(text), 12) for text in ("2:4", "1:3", "50%", "99%")] == [6, 4, 6, 1]


@given(matrices())
def test_without_the_compiled_function_it_is_packed_to_the_same_bits(case):
    weight, pattern = case
    weight.view(-1)[::7] *= -1.0  # zeros become -0.0
    fast = pack(weight, pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_module, "library", None)
        slow = pack(weight, pattern)
    assert torch.equal(fast.mask, slow.mask)
    assert same_bits(fast.values, slow.values)
