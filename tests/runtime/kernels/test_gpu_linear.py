import copy
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from halve.errors import InputError
from halve.runtime import kernels
from halve.runtime.kernels.gpu_linear import GpuLinear
from halve.runtime.product_check import reference_of
from packed_models import prune_layers

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    bool(kernels.unusable()), reason=f"needs a GPU for packed products: {kernels.unusable()}"
)
INTERPRETED = """
import sys, torch
from halve.runtime.kernels import gpu_matrix
gpu_matrix._TILE = 64 * 6  # so that more rows than 16 take several tiles
found = {}
for name, (layer, x) in torch.load(sys.argv[1], weights_only=False).items():
    found[name] = layer(x)
    scales = None if layer.scales is None else layer.scales.view(torch.float16)
    parts = layer.mask, layer.values, scales, layer.in_features, layer.bits or 0, layer.empty.dtype
    found[f"operator {name}"] = torch.ops.halve.gpu_linear(x, layer.bias, *parts)
    if x.dtype == torch.float16:
        with torch.autocast("cpu", torch.bfloat16):
            found[f"autocast {name}"] = layer(x.float())
        found[f"unpacked {name}"] = gpu_matrix.unpacked(layer.matrix)
torch.save(found, sys.argv[2])
"""


def pruned_layer(bits=None, seed=0, kind=nn.Linear, dtype=torch.float16):
    """A layer of shape (20, 64) and its packed one, on the CPU, where it cannot multiply unless it is interpreted."""
    torch.manual_seed(seed)
    layer = (nn.Linear(64, 20) if kind is nn.Linear else Conv1D(20, 64)).to(dtype)
    prune_layers(layer if kind is not nn.Linear else nn.ModuleList([layer]), "2:4")
    nn.init.normal_(layer.bias)
    return layer.requires_grad_(False), GpuLinear.of(layer, bits)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_its_state_is_that_of_the_plain_layer(bits):
    layer, sparse = pruned_layer(bits)
    other, _ = pruned_layer(seed=1)
    assert sparse.nbytes == sparse.packed.nbytes
    assert sparse.state_dict().keys() == {"weight", "bias"}
    if bits is None:
        assert torch.equal(sparse.weight, layer.weight)
    else:
        assert 0 < (sparse.weight - layer.weight).norm() < {8: 0.01, 4: 0.15}[bits] * layer.weight.norm()
    rounded, held = sparse.state_dict(), sparse.values
    sparse.load_state_dict(rounded)
    assert torch.equal(sparse.weight, rounded["weight"])
    assert (sparse.values is held) == (bits is not None)  # weights of its own are not rounded again
    sparse.load_state_dict(other.state_dict())
    assert torch.equal(copy.deepcopy(sparse).bias, other.bias)
    if bits is None:
        assert torch.equal(sparse.plain().weight, other.weight)
    with pytest.raises(RuntimeError, match=r"weight cannot be packed: the matrix is not in pattern 2:4"):
        sparse.load_state_dict({"weight": torch.ones(20, 64), "bias": torch.zeros(20)})


@pytest.mark.parametrize("bits", [None, 8])
def test_elsewhere_and_in_float32_it_keeps_the_weight_and_refuses_to_multiply(bits):
    _, sparse = pruned_layer(bits)
    with pytest.raises(
        InputError, match=r"is on cpu, and multiplied on a GPU alone: move it back|which is not installed"
    ):
        sparse(torch.zeros(1, 64, dtype=torch.float16))
    with pytest.raises(InputError, match=r"have no gradient: restore the plain layer"):
        sparse(torch.zeros(1, 64, dtype=torch.float16, requires_grad=True))
    before = sparse.weight
    sparse.float()
    assert sparse.weight.dtype == torch.float32
    assert torch.equal(sparse.weight.half(), before)
    assert torch.equal(sparse.half().weight, before)
    assert f"bias=True, dtype=torch.float16{', values=int8' if bits else ''}" in repr(sparse)


@needs_triton
def test_products_of_any_number_of_rows_in_the_interpreter(tmp_path):
    given = {}
    for bits in (None, 8, 4):
        for shape in ((1,), (2, 1), (2, 2), (5, 5), (0,), ()) if bits is None else ((2, 1), (5, 5)):
            x = torch.randn(*shape, 64).half()
            given[f"{bits} {shape}"] = pruned_layer(bits)[1], x
    given["transposed"] = pruned_layer(kind=Conv1D)[1], torch.randn(3, 64).half()
    given["askew"] = given["None (1,)"][0], torch.randn(3 * 65).half()[1:193].view(3, 64)
    torch.save(given, tmp_path / "given.pt")
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, tmp_path / "given.pt", tmp_path / "found.pt"]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    found = torch.load(tmp_path / "found.pt")
    for name, (sparse, x) in given.items():
        expected = x.double() @ float64_weight(sparse).T + sparse.bias.double()
        assert found[name].shape == (*x.shape[:-1], 20)
        torch.testing.assert_close(found[name].double(), expected, rtol=2e-3, atol=2e-3)
        assert torch.equal(found[f"operator {name}"], found[name])
        assert torch.equal(found[f"unpacked {name}"], sparse._dense())
        assert found[f"autocast {name}"].dtype == torch.bfloat16
        torch.testing.assert_close(found[f"autocast {name}"].double(), expected, rtol=1e-2, atol=2e-2)


def float64_weight(sparse):
    """Return a layer's weight in float64, (d_out, d_in)."""
    return sparse._dense().double()


def test_the_product_to_be_held_to_is_of_integers_for_few_rows_and_of_rounded_weights_for_more():
    layer, sparse = pruned_layer(4, dtype=torch.bfloat16)
    expected = reference_of(layer, sparse)
    few, more = (expected(torch.eye(64)[:rows].bfloat16()) - sparse.bias.float() for rows in (2, 3))
    assert torch.equal(more, more.bfloat16().float())
    assert not torch.equal(few, more[:2])
    torch.testing.assert_close(few, more[:2], rtol=2**-8, atol=2**-8)
    plain, same = pruned_layer()
    x = torch.randn(3, 64).half()
    assert torch.equal(reference_of(plain, same)(x), plain(x).float())


def test_what_traces_the_layer_sees_its_shape():
    _, sparse = pruned_layer()
    parts = sparse.mask.to("meta"), sparse.values.to("meta")
    product = torch.ops.halve.gpu_linear(
        torch.empty(2, 3, 64, dtype=torch.float16, device="meta"), None, *parts, None, 64, 0, torch.float16
    )
    assert (product.shape, product.dtype) == ((2, 3, 20), torch.float16)


def operands(sparse):
    """Return what the operator takes of a layer after x and bias."""
    scales = None if sparse.scales is None else sparse.scales.view(torch.float16)
    return sparse.mask, sparse.values, scales, sparse.in_features, sparse.bits or 0, sparse.empty.dtype


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_operator_refuses_inputs_of_another_dtype(bits, dtype):
    _, sparse = pruned_layer(bits)
    with pytest.raises(InputError, match=rf"x is {dtype} .* does not go with a packed matrix .* in torch.float16"):
        torch.ops.halve.gpu_linear(torch.ones(2, 64, dtype=dtype), None, *operands(sparse))


@pytest.mark.parametrize("bits", [None, 8])
def test_a_compiled_layer_refuses_inputs_of_another_dtype(bits):
    _, sparse = pruned_layer(bits)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(InputError, match=r"x is torch.bfloat16 .* does not go with a packed matrix"):
        compiled(torch.ones(2, 64, dtype=torch.bfloat16))


@needs_gpu
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_on_a_gpu_a_layer_moves_and_compiles(bits):
    layer, _ = pruned_layer(bits)
    layer.cuda()
    sparse = GpuLinear.of(layer, bits)
    x = torch.randn(2, 64, device="cuda").half()
    expected = reference_of(layer, sparse)(x)
    torch.testing.assert_close(sparse(x).float(), expected, rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), sparse(x))
    sparse.cpu()
    with pytest.raises(InputError):
        sparse(x)
    torch.testing.assert_close(sparse.cuda()(x).float(), expected, rtol=2e-3, atol=2e-3)


def test_a_denser_matrix_is_refused():
    with pytest.raises(InputError, match=r"not in pattern 2:4"):
        GpuLinear.of(nn.Linear(64, 20, dtype=torch.float16))
