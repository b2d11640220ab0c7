import pytest
import torch

from halve.engines import sparse_cores
from halve.engines.sparse_cores import compressed_product
from halve.runtime import semi_structured
from packed_matrices import assert_close, pruned

needs_sparse_cores = pytest.mark.skipif(
    bool(semi_structured.unusable()), reason=f"needs sparse tensor cores: {semi_structured.unusable()}"
)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Compress without a GPU, and multiply what comes back from the compressed form."""
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(kind, "_validate_device_dim_dtype_shape", lambda _tensor: None)
    monkeypatch.setattr(semi_structured, "_searchable", lambda: False)
    monkeypatch.setattr(semi_structured, "_multiplied", lambda matrix: matrix.dtype in semi_structured.DTYPES)
    monkeypatch.setattr(semi_structured, "unusable", lambda _device=None: "")
    dense = torch.nn.functional.linear
    monkeypatch.setattr(
        semi_structured, "linear", lambda x, held, bias: dense(x, semi_structured._expanded(held), bias)
    )


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("rows", [1, 16, 19])
def test_the_product_is_the_dense_one_where_it_is_faster(monkeypatch, rows):
    monkeypatch.setattr(sparse_cores, "_gain", lambda _product, _weight: 1.3)
    weight, x = pruned(64, 128, "2:4"), torch.randn(rows, 128).bfloat16()
    product, nbytes, reason = compressed_product(weight, {})
    assert not reason
    assert nbytes == 64 * 128 * 2 * 9 // 16
    assert_close(product(x, None), x, weight)
    bias = torch.randn(64).bfloat16()
    assert torch.equal(product(x, bias), product(x, None) + bias)


@pytest.mark.usefixtures("on_the_cpu")
def test_the_layer_stays_dense_where_it_is_not(monkeypatch):
    monkeypatch.setattr(sparse_cores, "_gain", lambda _product, _weight: 0.91)
    product, _, reason = compressed_product(pruned(64, 128, "2:4"), {})
    assert product is None
    assert reason == "sparse tensor cores are 0.91 times as fast as a dense product"


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(("gain", "compressed"), [(0.91, 2), (1.3, 3)])
def test_layers_of_one_shape_and_dtype_are_measured_once(monkeypatch, gain, compressed):
    measured, made, gains = [], [], {}
    layer = sparse_cores.SemiStructuredLinear
    monkeypatch.setattr(sparse_cores, "_gain", lambda _product, weight: measured.append(weight.shape) or gain)
    monkeypatch.setattr(sparse_cores, "SemiStructuredLinear", lambda *given: made.append(given) or layer(*given))
    reasons = {compressed_product(pruned(rows, 128, "2:4"), gains)[2] for rows in (64, 64, 96)}
    assert measured == [(64, 128), (96, 128)]
    assert len(made) == compressed
    assert len(reasons) == 1


@pytest.mark.usefixtures("on_the_cpu")
def test_without_room_to_compress_it_stays_dense(monkeypatch):
    monkeypatch.setattr(sparse_cores, "_gain", lambda _product, _weight: 1.3)
    monkeypatch.setattr(sparse_cores, "free_memory", lambda _device: 3 * 64 * 128 * 2 + 128 * 128 * 2 - 1)
    assert compressed_product(pruned(64, 128, "2:4"), {}) == (None, 0, "there is no room to compress it")


@pytest.mark.usefixtures("on_the_cpu")
def test_what_the_cores_do_not_take_says_why():
    assert "take multiples of" in compressed_product(pruned(60, 128, "2:4"), {})[2]
    assert compressed_product(pruned(64, 128, "2:4", torch.float32), {})[2].endswith("do not multiply float32")


def test_without_a_gpu_it_stays_dense(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compressed_product(pruned(64, 128, "2:4"), {}) == (None, 0, "torch sees no CUDA GPU")


def test_the_gain_is_the_ratio_of_medians(monkeypatch):
    calls = []
    weight = pruned(64, 128, "2:4")
    gain = sparse_cores._gain(
        lambda x, _bias: calls.append(x.shape) or [torch.zeros(2000, 2000).sum() for _ in range(3)], weight
    )
    assert gain < 1
    assert set(calls) == {(16, 128)}


@needs_sparse_cores
def test_on_a_gpu_it_is_the_dense_product(monkeypatch):
    monkeypatch.setattr(sparse_cores, "_MARGIN", 0.0)
    weight, x = pruned(256, 512, "2:4").cuda(), torch.randn(16, 512, device="cuda").bfloat16()
    product, _, reason = compressed_product(weight, {})
    assert not reason
    assert_close(product(x, None).cpu(), x.cpu(), weight.cpu())
