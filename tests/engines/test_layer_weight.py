import pytest
import torch

from halve.engines.layer_weight import LayerWeight, check_split, why_dense
from halve.engines.packed_tensor import PackedTensor, taking
from halve.errors import InputError
from halve.runtime.native import expand
from halve.runtime.packed_matrix import PackedMatrix, pack
from halve.runtime.quantised_matrix import QuantisedMatrix, quantise
from packed_matrices import pruned, same_bits

SIZES = {"q": 8, "k": 4, "v": 4}


def parts(bits=None, pattern="2:4"):
    """The queries', keys' and values' matrices of a checkpoint: plain, and as its tensors."""
    plain = {name: pruned(rows, 128, pattern, seed=rows) for name, rows in SIZES.items()}
    matrices = {name: pack(weight, pattern) for name, weight in plain.items()}
    matrices = matrices if bits is None else {name: quantise(matrix, bits) for name, matrix in matrices.items()}
    return plain, {name: PackedTensor.of(matrix, name) for name, matrix in matrices.items()}


def fused(given, dtype=torch.bfloat16):
    """Load tensors as vLLM does: each into its rows of a fused weight."""
    weight = LayerWeight(torch.full((16, 128), torch.nan, dtype=dtype))
    start = 0
    for name, tensor in given.items():
        with taking(weight.take):
            weight.data.narrow(0, start, SIZES[name]).copy_(tensor)
        start += SIZES[name]
    return weight


def whole(matrix):
    return expand(matrix, 0, matrix.d_out)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_plain_fused_weight_is_packed_as_one(bits):
    plain, _ = parts()
    weight = torch.cat(list(plain.values()))
    matrix, reason = fused(plain).became(bits)
    packed = pack(weight, "2:4")
    assert not reason
    assert same_bits(whole(matrix), whole(packed if bits is None else quantise(packed, bits)))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_packed_parts_become_one_packed_matrix_and_no_dense_one(bits):
    _, given = parts(bits)
    weight = fused(given)
    matrix, reason = weight.became(None)
    assert not reason
    assert isinstance(matrix, PackedMatrix if bits is None else QuantisedMatrix)
    assert same_bits(whole(matrix), torch.cat([tensor.plain() for tensor in given.values()]))
    assert weight.data.isnan().all()  # never written


def test_packed_parts_in_another_dtype_become_the_model_s():
    plain, given = parts()
    matrix, _ = fused(given, torch.float32).became(None)
    assert torch.equal(whole(matrix), torch.cat(list(plain.values())).float())


@pytest.mark.parametrize("order", [["q", "k", "v"], ["v", "k", "q"]])
def test_parts_of_which_one_is_plain_are_packed_from_the_plain_weight(order):
    plain, given = parts()
    weight = LayerWeight(torch.full((16, 128), torch.nan, dtype=torch.bfloat16))
    starts = {"q": 0, "k": 8, "v": 12}
    for name in order:
        with taking(weight.take):
            weight.data[starts[name] : starts[name] + SIZES[name]].copy_(plain[name] if name == "k" else given[name])
    matrix, reason = weight.became(None)
    assert not reason
    assert same_bits(whole(matrix), torch.cat(list(plain.values())))


def test_parts_packed_in_different_ways_stay_dense():
    _, given = parts()
    _, integers = parts(8)
    weight = fused(given | {"k": integers["k"]})
    assert weight.became(None) == (None, "its fused parts are packed in different ways")
    assert torch.equal(weight.data, torch.cat([given["q"].plain(), integers["k"].plain(), given["v"].plain()]))


def test_a_part_that_does_not_lie_in_rows_is_unpacked():
    weight = pruned(16, 256, "2:4")
    layer = LayerWeight(torch.zeros(16, 256, dtype=torch.bfloat16))
    tensor = PackedTensor.of(pack(weight, "2:4"), "w")
    with taking(layer.take):
        layer.data[:8].copy_(tensor[:8])
        layer.data[8:, :128].copy_(tensor[8:, :128])
        layer.data[8:, 128:].copy_(tensor[8:, 128:])
    assert torch.equal(layer.data, weight)
    matrix, _ = layer.became(None)
    assert same_bits(whole(matrix), weight)


def test_a_row_parallel_piece_is_packed_too():
    weight = pruned(16, 256, "2:4")
    layer = LayerWeight(torch.zeros(16, 128, dtype=torch.bfloat16))
    with taking(layer.take):
        layer.data.copy_(PackedTensor.of(pack(weight, "2:4"), "w").narrow(1, 128, 128))
    matrix, reason = layer.became(None)
    assert not reason
    assert same_bits(whole(matrix), weight[:, 128:].contiguous())
    assert not layer.data.any()


def test_what_stays_dense_says_why():
    weight = pruned(4, 8, "2:4")
    assert not why_dense(weight)
    assert why_dense(torch.ones(4, 8)) == "it is not at 2:4"
    assert why_dense(torch.zeros(4, 6)) == "its rows are no whole groups of four"
    assert why_dense(torch.zeros(4, 1, 4)) == "it has 3 dimensions"
    assert why_dense(weight.double()) == "float64 is not packed"
    assert why_dense(torch.where(weight == weight.max(), torch.inf, weight)) == "it holds NaN or infinity"
    layer = LayerWeight(torch.ones(4, 8))
    assert layer.became(8) == (None, "it is not at 2:4")
    assert torch.equal(layer.data, torch.ones(4, 8))


def test_splits_keep_groups_of_four_whole():
    check_split("down_proj", 30, 30)
    check_split("down_proj", 24, 12)
    with pytest.raises(
        InputError, match=r"^down_proj would be split after every 6 of its 24 inputs, which cuts groups"
    ):
        check_split("down_proj", 24, 6)
