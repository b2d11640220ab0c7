import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from halve.errors import HalveError, InputError
from halve.maths.pattern import Pattern
from halve.runtime import semi_structured
from halve.runtime.semi_structured import DTYPES, SemiStructuredLinear, compress, padded_rows, unusable

needs_sparse_cores = pytest.mark.skipif(bool(unusable()), reason=f"needs sparse tensor cores: {unusable()}")


def test_says_why_it_cannot_be_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unusable() == "torch sees no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (7, 5), 1: (8, 6), 2: (9, 0)}[device])
    monkeypatch.setattr(semi_structured, "_searchable", lambda: True)
    assert unusable(0) == "GPU 0 has no sparse tensor cores"
    assert not unusable(1)
    assert not unusable(2)
    monkeypatch.setattr(semi_structured, "_searchable", lambda: False)  # CUTLASS's kernels are for Ampere alone
    assert not unusable(1)
    assert unusable(2) == "GPU 2 needs cuSPARSELt, which this build of torch lacks"


def test_rows_are_padded_to_eights():
    assert [padded_rows(rows) for rows in (1, 8, 9, 64)] == [8, 8, 16, 64]


@pytest.mark.parametrize("weight", [torch.zeros(64, 64), torch.zeros(64, dtype=torch.float16)])
def test_other_tensors_are_refused(weight):
    with pytest.raises(InputError, match=r"sparse tensor cores multiply float16 and bfloat16 matrices on a CUDA"):
        compress(weight, 1)


@pytest.mark.parametrize(("searchable", "rows", "columns"), [(True, 16, 16), (False, 32, 64)])
def test_says_which_shapes_the_hardware_takes(monkeypatch, searchable, rows, columns):
    monkeypatch.setattr(semi_structured, "_searchable", lambda: searchable)
    assert not semi_structured.unfit(rows, columns, torch.bfloat16)
    assert not semi_structured.unfit(32 * rows, 7 * columns, torch.float16)
    reason = f"sparse tensor cores take multiples of {rows} x {columns} in bfloat16"
    assert semi_structured.unfit(rows + 8, columns, torch.bfloat16) == reason
    assert semi_structured.unfit(rows, columns + 8, torch.bfloat16) == reason


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Compress without a GPU: PyTorch has the layout on the CPU too, only no products."""
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(kind, "_validate_device_dim_dtype_shape", lambda _tensor: None)
    monkeypatch.setattr(semi_structured, "_searchable", lambda: False)
    monkeypatch.setattr(semi_structured, "_multiplied", lambda matrix: matrix.dtype in DTYPES)


def pruned_layer(seed=0, dtype=torch.bfloat16):
    layer = nn.Linear(128, 64).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    weight = Pattern("2:4").project(torch.randn(64, 128, generator=generator)).to(dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.usefixtures("on_the_cpu")
def test_its_state_is_that_of_the_plain_layer():
    layer, other = pruned_layer(), pruned_layer(seed=1)
    sparse = SemiStructuredLinear.of(layer, 8)
    assert sparse.nbytes == 64 * 128 * 2 * 9 // 16
    assert sparse.state_dict().keys() == {"weight", "bias"}
    assert torch.equal(sparse.state_dict()["weight"], layer.weight)
    sparse.load_state_dict(other.float().state_dict())
    assert torch.equal(sparse.weight.float(), other.weight)
    assert torch.equal(sparse.plain().weight.float(), other.weight)
    assert torch.equal(copy.deepcopy(sparse).bias.float(), other.bias)
    with pytest.raises(RuntimeError, match=r"weight cannot be packed: the matrix is not in pattern 2:4"):
        sparse.load_state_dict({"weight": torch.ones(64, 128), "bias": torch.zeros(64)})
    assert torch.equal(sparse.weight.float(), other.weight)


@pytest.mark.usefixtures("on_the_cpu")
def test_converted_to_what_has_no_products_it_keeps_the_weight_and_refuses_to_multiply():
    layer = pruned_layer()
    sparse = SemiStructuredLinear.of(layer, 8).float()
    assert torch.equal(sparse.weight, layer.weight.float())
    assert sparse.nbytes == 64 * 128 * 4
    with pytest.raises(InputError, match=r"is torch.float32 on cpu, where they do not multiply: move it back"):
        sparse(torch.ones(1, 128))
    with pytest.raises(RuntimeError, match=r"not in pattern 2:4"):
        sparse.load_state_dict({"weight": torch.ones(64, 128), "bias": torch.zeros(64)})
    sparse.to(torch.bfloat16)
    assert sparse.nbytes == 64 * 128 * 2 * 9 // 16
    assert torch.equal(sparse.weight, layer.weight)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("shape", [(1,), (8,), (2, 17), ()])
def test_rows_are_padded_for_the_product_and_cut_from_it(monkeypatch, shape):
    seen = []

    def multiply(x, weight, bias):
        seen.append((len(x), weight.alg_id_cusparselt))
        return linear(x, weight.to_dense(), bias)

    monkeypatch.setattr(semi_structured, "linear", multiply)
    layer = pruned_layer()
    sparse = SemiStructuredLinear.of(layer, 8)
    sparse._algorithm = 5
    x = torch.randn(*shape, 128, dtype=torch.bfloat16)
    torch.testing.assert_close(sparse(x), layer(x))
    rows = padded_rows(x.numel() // 128)
    assert seen == [(rows, 5 if rows == 8 else 0)]
    assert sparse._held.alg_id_cusparselt == seen[0][1]
    with torch.autocast("cpu", torch.float16):
        got = sparse(x.float())
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, layer(x).half())


@pytest.mark.usefixtures("on_the_cpu")
def test_no_rows_give_no_rows_and_gradients_are_refused():
    sparse = SemiStructuredLinear.of(pruned_layer(), 8)
    assert sparse(torch.empty(2, 0, 128, dtype=torch.bfloat16)).shape == (2, 0, 64)
    with pytest.raises(InputError, match=r"have no gradient: restore the plain layer"):
        sparse(torch.ones(1, 128, dtype=torch.bfloat16, requires_grad=True))


@pytest.mark.usefixtures("on_the_cpu")
def test_a_matrix_that_does_not_come_back_is_not_let_go(monkeypatch):
    monkeypatch.setattr(semi_structured, "_expanded", lambda compressed: compressed.to_dense() * 2)
    with pytest.raises(HalveError, match=r"a matrix of shape \(64, 128\) does not come back from its compressed form"):
        SemiStructuredLinear.of(pruned_layer(), 8)


@pytest.mark.usefixtures("on_the_cpu")
def test_layers_alike_share_what_was_searched(monkeypatch):
    searched = []
    monkeypatch.setattr(semi_structured, "_algorithms", {})
    monkeypatch.setattr(semi_structured, "_layout_type", lambda: torch.sparse.SparseSemiStructuredTensorCUTLASS)
    monkeypatch.setattr(semi_structured, "_searchable", lambda: True)
    monkeypatch.setattr(semi_structured, "_fastest", lambda weight, rows: searched.append((weight.shape, rows)) or 7)
    assert [compress(pruned_layer(seed).weight, rows).alg_id_cusparselt for seed, rows in ((0, 3), (1, 8), (0, 9))] == [
        7,
        7,
        7,
    ]
    assert searched == [((64, 128), 8), ((64, 128), 16)]


@pytest.mark.usefixtures("on_the_cpu")
def test_a_denser_matrix_is_refused_before_weights_are_dropped():
    with pytest.raises(InputError, match=r"not in pattern 2:4"):
        SemiStructuredLinear.of(nn.Linear(128, 64, dtype=torch.bfloat16), 8)


@needs_sparse_cores
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_a_layer_moves_to_the_cpu_and_back(rows):
    layer = pruned_layer().cuda()
    x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
    sparse = SemiStructuredLinear.of(layer, 8)
    torch.testing.assert_close(sparse(x), layer(x), rtol=2e-2, atol=5e-2)
    sparse.cpu()
    assert torch.equal(sparse.weight, layer.weight.cpu())
    with pytest.raises(InputError, match=r"on cpu, where they do not multiply"):
        sparse(x.cpu())
    sparse.cuda()
    torch.testing.assert_close(sparse(x), layer(x), rtol=2e-2, atol=5e-2)
    other = pruned_layer(seed=1).cuda()
    sparse.load_state_dict(other.state_dict())
    torch.testing.assert_close(sparse(x), other(x), rtol=2e-2, atol=5e-2)


@needs_sparse_cores
def test_under_autocast_any_input_goes_and_the_dtype_is_autocasts():
    layer = pruned_layer().cuda()
    x = torch.randn(3, 128, device="cuda")
    with torch.autocast("cuda", torch.float16), torch.no_grad():
        y = SemiStructuredLinear.of(layer, 8)(x)
        torch.testing.assert_close(y, layer(x), rtol=2e-2, atol=5e-2)
    assert y.dtype == torch.float16


@needs_sparse_cores
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 33, 512])
@pytest.mark.parametrize("searched", [True, False])
def test_products_on_a_gpu_are_those_of_the_cpu(dtype, rows, searched):
    generator = torch.Generator().manual_seed(rows)
    weight = Pattern("2:4").project(torch.randn(256, 128, generator=generator)).to(dtype)
    x = torch.randn(rows, 128, generator=generator).to(dtype)
    compressed = compress(weight.cuda(), rows if searched else None)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x.cuda(), compressed).cpu().double(), expected, rtol=2e-2, atol=5e-2)


@needs_sparse_cores
def test_shapes_that_the_hardware_does_not_take_are_refused():
    with pytest.raises(InputError, match=r"a weight of shape \(7, 12\) cannot be compressed: .* take multiples of"):
        semi_structured.compress(torch.zeros(7, 12, dtype=torch.float16, device="cuda"), 8)
