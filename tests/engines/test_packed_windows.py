import pytest
import torch

from halve.engines.packed_windows import stacked, window
from halve.errors import InputError
from halve.runtime.native import expand
from halve.runtime.packed_matrix import pack
from halve.runtime.quantised_matrix import quantise
from packed_matrices import every_dtype, pruned, same_bits


def whole(matrix):
    return expand(matrix, 0, matrix.d_out)


@every_dtype
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 7), (0, 136)), ((2, 5), (0, 136)), ((1, 6), (8, 136)), ((0, 7), (72, 80))]
)
def test_a_window_is_that_of_the_plain_matrix(pattern, dtype, rows, columns):
    weight = pruned(7, 136, pattern, dtype)
    found = window(pack(weight, pattern), rows, columns, "w")
    found.check_mask()
    assert same_bits(whole(found), weight[slice(*rows), slice(*columns)].contiguous())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 6), (0, 456)), ((2, 3), (0, 456)), ((1, 6), (64, 192)), ((0, 6), (320, 456))]
)
def test_a_window_of_integers_keeps_them_and_their_scales(bits, rows, columns):
    matrix = quantise(pack(pruned(6, 456, "2:4"), "2:4"), bits)
    found = window(matrix, rows, columns, "w")
    found.check()
    assert same_bits(whole(found), whole(matrix)[slice(*rows), slice(*columns)].contiguous())
    places = slice(columns[0] // 2, columns[1] // 2)
    assert torch.equal(found.integers(), matrix.integers()[slice(*rows), places])


def test_a_window_that_cuts_groups_is_refused():
    packed = pack(pruned(4, 128, "2:4"), "2:4")
    with pytest.raises(
        InputError, match=r"^w would be split at columns 2 to 128, which cuts groups of its pattern 2:4"
    ):
        window(packed, (0, 4), (2, 128), "w")
    with pytest.raises(InputError, match=r"at columns 32 to 128, which cuts 64 columns that share a scale"):
        window(quantise(packed, 8), (0, 4), (32, 128), "w")
    with pytest.raises(InputError, match=r"pattern 50%"):
        window(pack(pruned(4, 128, "50%"), "50%"), (0, 4), (0, 64), "w")


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_stacked_matrices_are_the_plain_ones_below_each_other(bits):
    packed = [pack(pruned(rows, 136, "2:4", seed=rows), "2:4") for rows in (3, 1, 5)]
    packed = packed if bits is None else [quantise(each, bits) for each in packed]
    found = stacked(packed)
    assert same_bits(whole(found), torch.cat([whole(each) for each in packed]))
    assert stacked(packed[:1]) is packed[0]


def test_matrices_packed_in_different_ways_are_not_stacked():
    weight = pruned(4, 128, "2:4")
    packed = pack(weight, "2:4")
    others = [quantise(packed, 8), pack(weight.float(), "2:4"), pack(pruned(4, 128, "1:4"), "1:4")]
    assert [stacked([packed, other]) for other in others] == [None] * 3
    assert stacked([quantise(packed, 8), quantise(packed, 4)]) is None
