from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.runtime import native
from halve.runtime.compiled import quantised_instruction_sets
from halve.runtime.native import (
    REFERENCE,
    dense_integers_linear,
    expand,
    quantised_input,
    register_rows,
    sparse_linear,
)
from halve.runtime.packed_matrix import DTYPES, OVERREAD, pack, unpack
from halve.runtime.quantised_matrix import QuantisedMatrix, quantise, quantise_dense, quantised_bytes, why_not
from packed_matrices import UNIT, every_dtype, pruned, same_bits

ALL = ("avx512", "avxvnni", "avx2", "portable")
needs_kernel = pytest.mark.skipif(not quantised_instruction_sets(), reason=native.describe())
every_set = pytest.mark.parametrize(
    "instruction_set",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in quantised_instruction_sets(), reason=f"no {name} here"))
        for name in ALL
    ],
)
every_width = pytest.mark.parametrize("bits", [8, 4])


@st.composite
def matrices(draw):
    d_in, d_out = draw(st.integers(1, 175)) * 4, draw(st.integers(1, 13))
    dtype, seed, empty = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999)), draw(st.sampled_from([0, 0.3, 1]))
    return quantise(pack(pruned(d_out, d_in, "2:4", dtype, seed, empty), "2:4"), draw(st.sampled_from([8, 4])))


def read_by_hand(matrix):
    """The dense matrix in float64, its bytes read as docs/packed-format.md says, one weight after the other."""
    strips, (d_out, d_in) = -(-matrix.d_in // 128), matrix.shape
    dense = torch.zeros(d_out, d_in, dtype=torch.float64)
    for row in range(d_out):
        for kept in range(d_in // 2):
            strip, index = divmod(kept, 64)
            place = int(matrix.places[row, 16 * strip + index % 16]) >> 2 * (index // 16) & 3
            if matrix.bits == 8:
                byte = int(matrix.codes[row, kept])
                integer = byte - 256 if byte > 127 else byte
            else:
                integer = (int(matrix.codes[row, 32 * strip + index % 32]) >> 4 * (index // 32) & 15) - 8
            scale = float(matrix.scales[2 * strips * row + kept // 32])
            dense[row, kept // 2 * 4 + place] = integer * scale
    return dense


@given(matrix=matrices())
def test_the_bytes_mean_what_the_format_says(matrix):
    matrix.check()
    assert torch.equal(unpack(matrix.dequantised()), read_by_hand(matrix).to(matrix.dtype))
    assert matrix.nbytes == quantised_bytes(*matrix.shape, matrix.bits)


@every_dtype
def test_eight_bits_are_the_nearest_of_their_scale(dtype):
    weight = pruned(7, 192, "2:4", dtype)
    matrix = quantise(pack(weight, "2:4"), 8)
    assert matrix.scales_of_rows.shape == (7, 4)
    for row, word in ((0, 0), (3, 1), (6, 2)):
        part = weight[row, 64 * word : 64 * word + 64].double()
        scale = matrix.scales_of_rows[row, word]
        assert scale == (part.abs().max().float() / 127).half()
        off = (unpack(replace(matrix, dtype=torch.float32).dequantised())[row, 64 * word : 64 * word + 64] - part).abs()
        slack = part.abs().max() * 2**-10  # the largest weight's integer is at most 127, whatever float16 made of it
        assert (off <= float(scale) / 2 + slack).all()


@every_dtype
def test_what_is_on_a_grid_of_four_bits_stays_to_the_bit_and_packs_to_the_same_bytes(dtype):
    weight = pruned(5, 256, "2:4", dtype, empty=0.1)
    matrix = quantise(pack(weight, "2:4"), 4)
    once = unpack(matrix.dequantised())
    again = quantise(pack(once, "2:4"), 4)
    assert same_bits(unpack(again.dequantised()), once)
    for part in ("places", "codes", "scales"):
        assert torch.equal(getattr(again, part), getattr(matrix, part))


@every_width
def test_a_word_of_zeros_has_no_scale(bits):
    matrix = quantise(pack(torch.zeros(2, 64), "2:4"), bits)
    assert not matrix.scales.any()
    assert not unpack(matrix.dequantised()).any()


@every_width
def test_sizes_at_two_of_four(bits):
    matrix = quantise(pack(pruned(64, 4096, "2:4"), "2:4"), bits)
    assert (matrix.nbytes - 2 * OVERREAD) * 8 / (64 * 4096) == (5.25 if bits == 8 else 3.25)


@pytest.mark.parametrize("pattern", ["50%", "1:4", "4:8"])
def test_other_patterns_are_refused(pattern):
    with pytest.raises(InputError, match=rf"weights are quantised at 2:4 alone, not at {pattern}"):
        quantise(pack(pruned(4, 64, pattern), pattern), 8)
    assert why_not(Pattern(pattern))


@every_width
def test_weights_beyond_a_scale_are_refused(bits):
    with pytest.raises(InputError, match=r"too large to be quantised"):
        quantise(pack(torch.tensor([[1e9, 0.0, 0.0, 0.0]]), "2:4"), bits)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (4, 132)},
        {"shape": (4, 126)},
        {"shape": (0, 128)},
        {"shape": (4, 128, 1)},
        {"bits": 4},
        {"bits": 3},
        {"dtype": torch.float64},
        {"places": torch.full((4, 16), 0x44, dtype=torch.int8)},
        {"places": torch.full((4, 15), 0x44, dtype=torch.uint8)},
        {"codes": torch.zeros(4, 64, dtype=torch.int8)},
        {"codes": torch.zeros(4, 63, dtype=torch.uint8)},
        {"scales": torch.zeros(8 + OVERREAD)},
        {"scales": torch.zeros(8 + OVERREAD - 1, dtype=torch.float16)},
    ],
)
def test_parts_that_contradict_each_other_are_refused(change):
    with pytest.raises(InputError):
        replace(sound(), **change)


def sound(d_in=128):
    """Four rows of zeros, the first two of every group kept."""
    places = torch.tensor([0, 0x55], dtype=torch.uint8).repeat(4, 8)
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(8 + OVERREAD, dtype=torch.float16)
    return QuantisedMatrix(places, codes, scales, (4, d_in), 8, torch.float32)


@pytest.mark.parametrize(
    ("part", "place", "value", "complaint"),
    [
        ("places", 9, 0x54, "do not rise"),
        ("places", 8, 0x03, "do not rise"),
        ("codes", 5, 0x80, "is -128"),
        ("codes", 127, 0x01, "fills up a row .* is not 0"),
        ("scales", 1, float("nan"), "negative or not finite"),
        ("scales", 1, float("inf"), "negative or not finite"),
        ("scales", 1, -1.0, "negative or not finite"),
    ],
)
def test_parts_that_mean_nothing_are_found(part, place, value, complaint):
    matrix = sound(124)
    matrix.check()
    getattr(matrix, part).view(-1)[place] = value
    with pytest.raises(InputError, match=complaint):
        matrix.check()


def inputs(matrix, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, matrix.d_in, generator=generator) * torch.rand(matrix.d_in, generator=generator) ** 4
    return x.to(matrix.dtype), torch.randn(matrix.d_out, generator=generator).to(matrix.dtype)


def assert_close(got, x, weight, bias):
    """Hold `got` to float64, within what summing in float32 in any order and rounding once may miss."""
    exact, magnitude = x.double() @ weight.T + bias.double(), x.double().abs() @ weight.T.abs() + bias.double().abs()
    summed = (weight.shape[1] + 3) * 2**-24 * magnitude
    assert ((got.double() - exact).abs() <= summed + UNIT[got.dtype] * (exact.abs() + summed) + 1e-7).all()


@needs_kernel
@every_set
@given(matrix=matrices(), batch=st.integers(0, 8))
def test_products_are_those_of_quantised_inputs_in_float64(instruction_set, matrix, batch):
    x, bias = inputs(matrix, batch)
    assert batch <= register_rows(instruction_set, None, amx=False)
    got = sparse_linear(x, matrix, bias, instruction_set)
    assert (got.shape, got.dtype) == ((batch, matrix.d_out), matrix.dtype)
    assert_close(got, quantised_input(x), read_by_hand(matrix), bias)


@needs_kernel
@every_set
@given(d_in=st.integers(1, 300), d_out=st.integers(1, 13), dtype=st.sampled_from(DTYPES), batch=st.integers(0, 8))
def test_products_with_dense_integers_are_those_of_quantised_inputs_in_float64(
    instruction_set, d_in, d_out, dtype, batch
):
    generator = torch.Generator().manual_seed(d_in)
    weight = torch.randn(d_out, d_in, generator=generator).to(dtype)
    x = torch.randn(batch, d_in, generator=generator).to(dtype)
    matrix = quantise_dense(weight)
    held = torch.zeros(d_out, d_in, dtype=torch.float64)
    for row in range(d_out):
        for column in range(d_in):
            scale = float(matrix.scales[row * 2 * -(-d_in // 128) + column // 64])
            held[row, column] = int(matrix.codes[row, column]) * scale
            assert abs(float(weight[row, column]) - float(held[row, column])) <= scale * 0.51
    got = dense_integers_linear(x, matrix, instruction_set)
    assert (got.shape, got.dtype) == ((batch, d_out), dtype)
    assert_close(got, quantised_input(x), held, torch.zeros(d_out))


@needs_kernel
def test_dense_integers_multiply_nothing_that_does_not_go_with_them():
    matrix = quantise_dense(torch.randn(8, 64))
    for x in (torch.randn(2, 65), torch.randn(2, 64).double(), torch.randn(64, device="meta")):
        with pytest.raises(InputError, match="no kernel for x"):
            dense_integers_linear(x, matrix)
    with pytest.raises(InputError, match="too large to be quantised"):
        quantise_dense(torch.full((2, 64), 1e30))


@needs_kernel
@every_set
@every_width
@every_dtype
def test_many_rows_are_multiplied_unpacked_and_not_quantised(instruction_set, bits, dtype):
    matrix = quantise(pack(pruned(12, 192, "2:4", dtype), "2:4"), bits)
    x, bias = inputs(matrix, register_rows(instruction_set, None, amx=False) + 1)
    expected = sparse_linear(x, matrix.dequantised(), bias, REFERENCE)
    torch.testing.assert_close(sparse_linear(x, matrix, bias, instruction_set), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(sparse_linear(x, matrix, bias, REFERENCE), expected)


@needs_kernel
@every_set
@given(matrix=matrices(), places=st.tuples(st.integers(0, 13), st.integers(0, 13)))
def test_expanded_rows_have_the_bits_of_the_matrix(instruction_set, matrix, places):
    start, stop = sorted(min(place, matrix.d_out) for place in places)
    expected = unpack(matrix.dequantised())[start:stop]
    assert torch.equal(expand(matrix, start, stop, instruction_set), expected)
    assert same_bits(expand(matrix, start, stop, REFERENCE), expected)


@needs_kernel
@every_set
@every_width
def test_every_instruction_set_quantises_alike(instruction_set, bits):
    matrix = quantise(pack(pruned(16, 1028, "2:4", torch.float32), "2:4"), bits)
    for seed in range(50):
        x, bias = inputs(matrix, 4, seed)
        got = sparse_linear(x, matrix, bias, instruction_set)
        assert_close(got, quantised_input(x), unpack(matrix.dequantised()).double(), bias)


@needs_kernel
@every_set
@every_width
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_row_alone(instruction_set, bits, bad):
    matrix = quantise(pack(pruned(5, 72, "2:4", torch.float32), "2:4"), bits)
    x, bias = inputs(matrix, 3)
    sound_rows = sparse_linear(x, matrix, bias, instruction_set)
    x[1, 70] = bad
    got = sparse_linear(x, matrix, bias, instruction_set)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], sound_rows[[0, 2]])


@needs_kernel
@every_set
def test_tiny_inputs_count_for_nothing_and_large_ones_do_not_overflow(instruction_set):
    matrix = quantise(pack(pruned(5, 64, "2:4", torch.float32, empty=0), "2:4"), 8)
    assert not sparse_linear(torch.full((1, 64), 1e-35), matrix, None, instruction_set).any()
    large = sparse_linear(torch.full((1, 64), 1e30), matrix, None, instruction_set)
    torch.testing.assert_close(large, 1e30 * unpack(matrix.dequantised()).sum(-1)[None], rtol=1e-5, atol=1e26)


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"no instruction set called 'avx999'"):
        sparse_linear(torch.ones(1, 128), sound(), None, "avx999")


def test_weights_beyond_their_dtype_are_found():
    matrix = replace(sound(), dtype=torch.float16)
    matrix.codes[:, 5] = 100
    matrix.check()
    matrix.scales[:8] = 700.0  # times 100 is beyond float16, and not beyond bfloat16
    with pytest.raises(InputError, match=r"weights of a packed matrix are beyond float16"):
        matrix.check()
    assert matrix.fits(torch.bfloat16)
    codes, scales = torch.full((4, 32), 0x88, dtype=torch.uint8), matrix.scales * 0 + 9000
    four = QuantisedMatrix(matrix.places, codes, scales, (4, 128), 4, torch.float16)
    four.check()
    four.codes[0, 0] = 0x80  # -8 times 9000
    with pytest.raises(InputError, match=r"beyond float16"):
        four.check()
