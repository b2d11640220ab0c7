import gc
from functools import partial

import pytest
import torch
from torch import nn

from halve.engines import layer_product
from halve.engines.layer_product import hold, multiply
from halve.runtime.native import sparse_linear
from halve.runtime.packed_matrix import pack
from packed_matrices import assert_close, pruned


class Layer(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.plain = pruned(32, 64, "2:4", torch.float32, seed=seed)
        packed = pack(self.plain, "2:4")
        self.number = hold(self, lambda x, bias: sparse_linear(x, packed, bias))

    def forward(self, x, bias=None):
        return multiply(x, bias, self.number, 32)


@pytest.mark.parametrize("rows", [(3,), (2, 3), (40,)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_product_that_is_held(rows, biased):
    layer, x = Layer(0), torch.randn(*rows, 64)
    bias = torch.randn(32) if biased else None
    assert_close(layer(x, bias), x, layer.plain, bias)


def test_compilers_trace_it_and_depend_on_no_number():
    layer, other = Layer(0), Layer(1)
    torch._dynamo.reset()
    graphs = []

    def note(graph, _inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda x, number: multiply(x, None, number, 32) * 2, backend=note, fullgraph=True)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert_close(compiled(x, layer.number), 2 * x, layer.plain)
        assert_close(compiled(x, other.number), 2 * x, other.plain)
    assert len(graphs) == 1
    assert "layer_product" in graphs[0]


def test_a_product_is_kept_as_long_as_its_layer():
    layer = Layer(0)
    number = int(layer.number)
    assert number in layer_product._products
    del layer
    gc.collect()
    assert number not in layer_product._products


def test_the_operator_is_well_formed():
    layer = Layer(0)
    samples = torch.randn(3, 64), None, layer.number, 32
    checked = torch.library.opcheck(torch.ops.halve.layer_product.default, samples, test_utils="test_schema")
    assert set(checked.values()) == {"SUCCESS"}
    torch.library.opcheck(torch.ops.halve.layer_product.default, samples, test_utils="test_faketensor")
    assert partial(multiply, *samples)().shape == (3, 32)
