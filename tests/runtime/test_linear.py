import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from halve.errors import InputError
from halve.runtime.linear import SparseLinear, multiplied_as_decoded
from halve.runtime.native import few_rows, quantised_input
from halve.runtime.packed_matrix import DTYPES, pack, unpack
from halve.runtime.quantised_matrix import QuantisedMatrix
from packed_matrices import assert_close, every_dtype, pruned, same_bits

every_pattern = pytest.mark.parametrize("pattern", ["2:4", "1:4", "60%"])


def test_a_conv1d_is_packed_and_restored_in_its_own_layout():
    conv = Conv1D(24, 96)
    conv.weight.data = pruned(24, 96, "2:4", torch.float32).T.contiguous()
    conv.requires_grad_(False)
    sparse = SparseLinear.of(conv, "2:4")
    x = torch.randn(3, 96)
    torch.testing.assert_close(sparse(x), conv(x))
    assert sparse.weight.is_contiguous()
    for weight in (sparse.weight, sparse.state_dict()["weight"], sparse.plain().weight):
        assert same_bits(weight, conv.weight)
    assert type(sparse.plain()) is Conv1D
    assert torch.equal(sparse.plain()(x), conv(x))
    sparse.load_state_dict({"weight": 2 * conv.weight, "bias": conv.bias})
    assert torch.equal(sparse.weight, 2 * conv.weight)


def layers(pattern="2:4", dtype=torch.float32, d_out=24, d_in=96, biased=True):
    """A plain layer and the packed one."""
    dense = nn.Linear(d_in, d_out, bias=biased, dtype=dtype)
    dense.weight.data = pruned(d_out, d_in, pattern, dtype)
    dense.requires_grad_(False)
    return dense, SparseLinear(pack(dense.weight, pattern), dense.bias)


@every_dtype
@every_pattern
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (3, 7, 96), (0, 96), (40, 96)])
def test_returns_what_the_plain_layer_does(dtype, pattern, biased, shape):
    dense, sparse = layers(pattern, dtype, biased=biased)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = sparse(x)
    assert (got.shape, got.dtype) == ((*shape[:-1], 24), dtype)
    assert_close(got.reshape(-1, 24), x.reshape(-1, 96), dense.weight, dense.bias)


def test_the_operator_passes_torchs_own_checks():
    _, sparse = layers(dtype=torch.float32)
    for x in (torch.randn(5, 96), torch.randn(2, 3, 96, requires_grad=True), torch.randn(96)):
        for bias in (None, torch.randn(24, requires_grad=True)):
            arguments = (x, bias, sparse.mask, sparse.values, None, 96, "2:4", 0, DTYPES.index(torch.float32))
            torch.library.opcheck(torch.ops.halve.sparse_linear.default, arguments)
    torch.library.opcheck(torch.ops.halve.unpack.default, arguments[2:])


@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 20, 96)])
def test_gradients_are_those_of_the_plain_layer(shape):
    dense, sparse = layers(dtype=torch.float32)
    sparse.bias.requires_grad_(True)
    dense.bias.requires_grad_(True)
    found = []
    for layer in (dense, sparse):
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).requires_grad_()
        (layer(x) ** 2).sum().backward()
        found.append((x.grad, layer.bias.grad))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_compiles_without_a_graph_break_and_for_any_batch():
    torch._dynamo.reset()
    _, sparse = layers(dtype=torch.float32)
    model = nn.Sequential(sparse, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (1, 5, 33):
        x = torch.randn(batch, 96)
        torch.testing.assert_close(compiled(x), model(x))
    x = torch.randn(4, 96, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None


def test_whatever_records_it_records_the_product():
    dense, sparse = layers()
    first, second = torch.randn(3, 96), torch.randn(3, 96)
    with pytest.warns(DeprecationWarning, match=r"torch.jit.trace"):
        traced = torch.jit.trace(sparse, first)
    for recorded in (traced, make_fx(sparse)(first), torch.export.export(sparse, (first,)).module()):
        torch.testing.assert_close(recorded(second), dense(second))
    torch.testing.assert_close(sparse(nn.Parameter(first, requires_grad=False)), dense(first))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_it_has_no_rule_for_is_refused():
    _, sparse = layers()
    x = torch.randn(3, 96)
    with forward_ad.dual_level(), pytest.raises(InputError, match=r"no forward-mode derivative"):
        sparse(forward_ad.make_dual(x, x))
    with pytest.raises(InputError, match=r"no forward-mode derivative"):
        torch.func.jvp(sparse, (x,), (x,))
    torch.testing.assert_close(torch.vmap(sparse)(x), sparse(x))


@every_dtype
def test_its_state_is_that_of_the_plain_layer(dtype):
    dense, sparse = layers(dtype=dtype)
    state = sparse.state_dict()
    assert set(state) == {"weight", "bias"}
    assert same_bits(state["weight"], dense.weight)
    other = layers(dtype=dtype)[1]
    weight = pruned(24, 96, "2:4", dtype, seed=5)
    other.load_state_dict({"weight": weight, "bias": dense.bias + 1})
    assert same_bits(other.weight, weight)
    assert torch.equal(other.bias, dense.bias + 1)
    assert_close(other(torch.ones(1, 96, dtype=dtype)), torch.ones(1, 96, dtype=dtype), weight, dense.bias + 1)


def test_a_state_that_is_denser_is_refused():
    _, sparse = layers()
    with pytest.raises(RuntimeError, match=r"weight cannot be packed: .*not in pattern 2:4"):
        sparse.load_state_dict({"weight": torch.ones(24, 96), "bias": torch.zeros(24)})


def test_copies_conversions_and_pickles_keep_the_product():
    dense, sparse = layers()
    x = torch.randn(3, 96)
    kept = io.BytesIO()
    torch.save(sparse, kept)
    kept.seek(0)
    for layer in (copy.deepcopy(sparse), torch.load(kept, weights_only=False)):
        assert torch.equal(layer(x), sparse(x))
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert_close(half(x.bfloat16()), x.bfloat16(), dense.weight.bfloat16(), dense.bias.bfloat16())


def test_under_autocast_any_input_goes_and_the_dtype_is_autocasts():
    _, sparse = layers()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for x in (torch.ones(2, 96), torch.ones(2, 96, dtype=torch.bfloat16)):
            got = sparse(x)
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got, sparse._multiply(x.float()).bfloat16())


def test_other_dtypes_are_refused_and_so_is_a_bias_that_does_not_fit():
    _, sparse = layers()
    with pytest.raises(InputError, match=r"x is torch.bfloat16 .* does not go with"):
        sparse(torch.ones(2, 96, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"on the CPU"):
        sparse.to("meta")(torch.ones(2, 96, device="meta"))
    with pytest.raises(InputError, match=r"a bias of torch.float32 and shape \(3,\)"):
        SparseLinear(layers()[1].packed, torch.zeros(3))


def test_the_plain_layer_comes_back():
    dense, sparse = layers()
    plain = sparse.plain()
    assert type(plain) is nn.Linear
    assert same_bits(plain.weight, dense.weight)
    assert not plain.weight.requires_grad
    assert plain.bias is sparse.bias
    assert SparseLinear.of(plain, "2:4").nbytes == sparse.nbytes == sparse.packed.nbytes
    assert layers(biased=False)[1].plain().bias is None


def test_says_what_it_is():
    assert repr(layers()[1]) == (
        "SparseLinear(in_features=96, out_features=24, bias=True, pattern=2:4, dtype=torch.float32)"
    )


def test_weight_is_the_dense_matrix():
    dense, sparse = layers()
    x = torch.randn(2, 96)
    torch.testing.assert_close(linear(x, sparse.weight, sparse.bias), dense(x))


def quantised_layer(bits, dtype=torch.bfloat16):
    dense = nn.Linear(96, 24, dtype=dtype)
    dense.weight.data = pruned(24, 96, "2:4", dtype)
    return SparseLinear.of(dense.requires_grad_(False), "2:4", bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_layer_is_a_linear_one_with_its_dequantised_weight(bits):
    sparse = quantised_layer(bits)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    exact = unpack(replace(sparse.packed, dtype=torch.float32).dequantised())
    expected = linear(quantised_input(x), exact, sparse.bias.float())
    torch.testing.assert_close(sparse(x).float(), expected, rtol=0.02, atol=0.02)
    assert same_bits(sparse.state_dict()["weight"], sparse.weight)
    assert same_bits(sparse.plain().weight, sparse.weight)
    assert sparse.nbytes < 24 * 96 * 2
    assert f"dtype=torch.bfloat16, values=int{bits})" in repr(sparse)
    other = quantised_layer(bits)
    other.load_state_dict({"weight": sparse.weight, "bias": sparse.bias})
    torch.testing.assert_close(other.weight, sparse.weight, rtol=0.02, atol=0.02)
    assert isinstance(other.packed, QuantisedMatrix)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_layer_keeps_its_scales_when_it_is_converted(bits):
    sparse = quantised_layer(bits, torch.float32)
    x = torch.randn(3, 96)
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert torch.equal(half.packed.scales, sparse.packed.scales)
    assert half.weight.dtype == torch.bfloat16
    expected = linear(quantised_input(x.bfloat16()), sparse.weight, half.bias.float())
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0.02, atol=0.02)
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    with pytest.raises(InputError, match=r"packed matrices multiply bfloat16, float16 or float32, not torch.float64"):
        copy.deepcopy(sparse).double()(x.double())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_layer_is_traced_and_gives_gradients(bits):
    torch._dynamo.reset()
    sparse = quantised_layer(bits, torch.float32)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (1, 5):
        x = torch.randn(batch, 96, requires_grad=True)
        torch.testing.assert_close(compiled(x), sparse(x))
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, sparse.weight.sum(0).expand(batch, -1))
    packed = sparse.packed
    arguments = (packed.places, packed.codes, packed.scales, 96, "2:4", bits, DTYPES.index(torch.float32))
    torch.library.opcheck(torch.ops.halve.sparse_linear.default, (x.detach(), None, *arguments))
    torch.library.opcheck(torch.ops.halve.unpack.default, arguments)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_layers_own_state_does_not_change_it(bits):
    sparse = quantised_layer(bits)
    before = sparse.packed
    sparse.load_state_dict(sparse.state_dict())
    assert sparse.packed is before
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert sparse(torch.ones(2, 96)).dtype == torch.bfloat16


@pytest.mark.skipif(few_rows(torch.float32) < 4, reason="no kernels here")
def test_as_decoded_any_number_of_rows_is_multiplied_like_a_few():
    model = nn.Sequential(SparseLinear.of(layers()[0], "2:4", 8))
    x = torch.randn(3, 25, 96, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.cat([model(row.unsqueeze(0)) for row in rows]) for rows in x])
    many = model(x)
    with multiplied_as_decoded(model) as count:
        found = model(x)
    assert count == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - many).norm() > 1e-3 * many.norm()  # whose inputs are not rounded
    assert torch.equal(model(x), many)
