"""What compressed layers share, shown with a compression that is easy to follow: only what is not zero is kept."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from halve.errors import InputError
from halve.model.layers import is_conv1d, layer_matrix
from halve.runtime.compressed_linear import CompressedLinear


class AtMostHalf(CompressedLinear):
    def __init__(self, layer):
        matrix = layer_matrix(layer)
        super().__init__(tuple(matrix.shape), layer.bias, "in_out" if is_conv1d(layer) else "out_in")
        self._take(matrix)

    @property
    def nbytes(self):
        return self._kept.nbytes

    def _dense(self):
        dense = torch.zeros(self.out_features, self.in_features)
        dense[self._where] = self._kept
        return dense

    def _take(self, matrix):
        where = matrix != 0
        if where.sum() > where.numel() // 2:
            raise InputError("more than half is there")
        self._where, self._kept = where, matrix[where].float()


def sparse_layer(kind, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(6, 4) if kind is nn.Linear else Conv1D(4, 6)
    nn.init.normal_(layer.bias)
    with torch.no_grad():
        layer_matrix(layer)[:, ::2] = 0
    return layer


kinds = pytest.mark.parametrize("kind", [nn.Linear, Conv1D])


@kinds
def test_its_state_is_that_of_the_plain_layer(kind):
    layer, other = sparse_layer(kind), sparse_layer(kind, seed=1)
    compressed = AtMostHalf(layer)
    assert (compressed.out_features, compressed.in_features) == (4, 6)
    assert compressed.state_dict().keys() == layer.state_dict().keys()
    for name, expected in layer.state_dict().items():
        assert torch.equal(compressed.state_dict()[name], expected)
    compressed.load_state_dict(other.state_dict())
    assert torch.equal(compressed.weight, other.weight)
    assert torch.equal(compressed.bias, other.bias)


@kinds
def test_the_plain_layer_comes_back_with_the_bias_itself(kind):
    layer = sparse_layer(kind)
    plain = AtMostHalf(layer).plain()
    assert type(plain) is kind
    assert torch.equal(plain.weight, layer.weight)
    assert plain.bias is layer.bias


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"weight": torch.ones(4, 6), "bias": torch.zeros(4)}, r"weight cannot be packed: more than half is there"),
        ({"weight": torch.zeros(4, 5), "bias": torch.zeros(4)}, r"weight is a matrix of shape \(4, 5\), not \(4, 6\)"),
        ({"bias": torch.zeros(4)}, r"Missing key.*weight"),
        ({"weight": torch.zeros(4, 6), "bias": torch.zeros(4), "mask": torch.zeros(1)}, r"Unexpected key.*mask"),
    ],
)
def test_state_that_does_not_fit_is_refused(state, says):
    layer = sparse_layer(nn.Linear)
    compressed = AtMostHalf(layer)
    with pytest.raises(RuntimeError, match=says):
        compressed.load_state_dict(state)
    assert torch.equal(compressed.weight, layer.weight) or "mask" in state
