import pytest
import torch

from halve.engines.packed_tensor import PackedTensor, taking, tensors
from halve.errors import HalveError
from halve.packed.read import open_packed
from halve.runtime.native import expand
from halve.runtime.packed_matrix import pack
from halve.runtime.quantised_matrix import quantise
from packed_matrices import pruned, same_bits
from packed_models import packed


@pytest.fixture
def weight():
    return pruned(12, 128, "2:4")


CUTS = [
    lambda tensor: tensor,
    lambda tensor: tensor.narrow(0, 4, 6),
    lambda tensor: tensor.narrow(1, 64, 64),
    lambda tensor: tensor[2:10].narrow(0, 3, 2)[:, 32:],
    lambda tensor: tensor.t(),
    lambda tensor: tensor.transpose(0, 1)[64:].narrow(1, 2, 5),
    lambda tensor: tensor.t()[:, 3:].transpose(-1, -2).detach(),
]


@pytest.mark.parametrize("cut", CUTS)
def test_slices_and_transposes_stay_packed_and_are_those_of_the_plain_tensor(weight, cut):
    found, expected = cut(PackedTensor.of(pack(weight, "2:4"), "w")), cut(weight)
    assert isinstance(found, PackedTensor)
    assert found.shape == expected.shape
    assert same_bits(found.plain(), expected)
    matrix = found.window()
    assert same_bits(expand(matrix, 0, matrix.d_out), (expected.T if found.transposed else expected).contiguous())


def test_a_transposed_tensor_on_disk_is_read_as_one(weight):
    tensor = PackedTensor.of(pack(weight, "2:4"), "w", transposed=True)
    assert tensor.shape == (128, 12)
    assert same_bits(tensor.plain(), weight.T)
    assert same_bits(tensor.t().plain(), weight)


def test_whatever_computes_with_it_has_the_plain_tensor(weight):
    tensor = PackedTensor.of(pack(weight, "2:4"), "w")
    for found, expected in [
        (tensor + 1, weight + 1),
        (tensor[::2], weight[::2]),
        (tensor.float(), weight.float()),
        (torch.cat([tensor, tensor]), torch.cat([weight, weight])),
        (tensor.reshape(24, 64), weight.reshape(24, 64)),
        (torch.zeros_like(weight).copy_(tensor), weight),
    ]:
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)
    assert repr(tensor) == "PackedTensor(w, shape=(12, 128), dtype=torch.bfloat16)"


def add_to_it(tensor):
    tensor += 1


def set_a_row(tensor):
    tensor[0] = 1


def set_some(tensor):
    tensor[tensor == 0] = 1


@pytest.mark.parametrize(
    "write",
    [
        add_to_it,
        set_a_row,
        set_some,
        lambda tensor: tensor.mul_(2),
        lambda tensor: tensor[2:6].zero_(),
        lambda tensor: tensor.t().fill_(1),
        lambda tensor: tensor.data.clamp_(min=0),
        lambda tensor: tensor.copy_(torch.ones(12, 128)),
        lambda tensor: torch.add(torch.ones(12, 128), 1, out=tensor),
        lambda tensor: torch._foreach_mul_([tensor], 2.0),
    ],
)
def test_nothing_is_written_to_it(weight, write):
    tensor = PackedTensor.of(pack(weight, "2:4"), "w")
    with pytest.raises(HalveError, match=r"^w is packed and cannot be written to in place"):
        write(tensor)
    assert same_bits(tensor.plain(), weight)


def test_a_copy_is_offered_and_made_if_nobody_takes_it(weight):
    offered = []
    target, source = torch.zeros(20, 128, dtype=torch.bfloat16), PackedTensor.of(pack(weight, "2:4"), "w")
    with taking(lambda target, source: offered.append((target.shape, source.name_on_disk)) or True):
        target[8:].copy_(source)
    assert offered == [((12, 128), "w")]
    assert not target.any()
    with taking(lambda _target, _source: False):
        target[8:].copy_(source)
    assert torch.equal(target[8:], weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_checkpoint_gives_the_tensors_of_the_plain_one(family, tmp_path):
    checkpoint = open_packed(packed(tmp_path, family))
    plain = {entry.name: checkpoint.tensor(entry) for shard in checkpoint.plain for entry in shard.tensors}
    found = dict(tensors(checkpoint))
    assert {
        name for name, tensor in found.items() if isinstance(tensor, PackedTensor)
    } == checkpoint.manifest.matrices.keys()
    assert list(found) == list(plain)
    for name, tensor in found.items():
        assert torch.equal(tensor + 0, plain[name] + 0), name


def test_integers_are_handed_on(weight):
    matrix = quantise(pack(weight, "2:4"), 4)
    assert PackedTensor.of(matrix, "w").window() is matrix
