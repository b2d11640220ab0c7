import pytest
import torch

from halve.errors import InputError, PatternError
from halve.maths.pattern import Pattern
from halve.runtime import speed
from halve.runtime.packed_matrix import DTYPES, pack, unpack
from halve.runtime.quantised_matrix import quantise, quantised_bytes
from halve.runtime.speed import Speed, check_measurable, measure, needed_bytes
from halve.runtime.timing import Turns
from packed_matrices import same_bits

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def small_caches(monkeypatch):
    monkeypatch.setattr(speed, "copies_beyond_cache", lambda _nbytes: 2)


@pytest.mark.usefixtures("small_caches")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measures_every_batch(dtype):
    found = measure(96, 64, [1, 40], dtype=dtype, device=CPU, seconds=0)
    assert [(row.d_out, row.d_in, row.batch) for row in found] == [(96, 64, 1), (96, 64, 40)]
    for row in found:
        assert 0 < row.dense_seconds < 1
        assert 0 < row.sparse_seconds < 1
        assert (row.dense_call_seconds, row.sparse_call_seconds) == (row.dense_seconds, row.sparse_seconds)


@pytest.mark.usefixtures("small_caches")
def test_both_contenders_multiply_the_same_matrix(monkeypatch):
    products = []

    def spy(contenders, **_):
        products.append({name: [call() for call in calls] for name, calls in contenders.items()})
        return {"dense": Turns([2.0], [3.0]), "packed": Turns([4.0], [1.0])}

    monkeypatch.setattr(speed, "take_turns", spy)
    assert measure(100, 64, [3], dtype=torch.float32, device=CPU) == [
        Speed(
            d_out=100,
            d_in=64,
            batch=3,
            dense_seconds=3.0,
            sparse_seconds=1.0,
            dense_call_seconds=2.0,
            sparse_call_seconds=4.0,
        )
    ]
    first = products[0]["dense"][0]
    assert first.shape == (3, 100)
    for product in (*products[0]["dense"], *products[0]["packed"]):
        torch.testing.assert_close(product, first)


def test_ratio_is_dense_over_sparse():
    assert (
        Speed(
            d_out=1,
            d_in=1,
            batch=1,
            dense_seconds=3.0,
            sparse_seconds=2.0,
            dense_call_seconds=1.0,
            sparse_call_seconds=4.0,
        ).ratio
        == 1.5
    )
    assert (
        Speed(
            d_out=1,
            d_in=1,
            batch=1,
            dense_seconds=3.0,
            sparse_seconds=2.0,
            dense_call_seconds=1.0,
            sparse_call_seconds=4.0,
        ).call_ratio
        == 0.25
    )


def test_a_repeated_matrix_is_packed_as_if_it_were_whole():
    slab = speed.random_slab(9, 32, "2:4", torch.bfloat16)
    assert Pattern("2:4").satisfied_by(slab)
    whole = speed.repeated(pack(slab, "2:4"), 21)
    assert same_bits(unpack(whole), slab.repeat(3, 1)[:21])
    for bits in (8, 4):
        one = quantise(pack(slab, "2:4"), bits)
        whole = speed.repeated(one, 21)
        whole.check()
        assert same_bits(unpack(whole.dequantised()), unpack(one.dequantised()).repeat(3, 1)[:21])


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"bfloat16, float16 or float32, not torch.float64"):
        check_measurable("2:4", torch.float64, CPU)
    with pytest.raises(PatternError, match=r"divisible by 4"):
        measure(8, 6, [1], dtype=torch.float32, device=CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no sparse products on cuda: torch sees no CUDA GPU; use --device cpu"):
        check_measurable("2:4", torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(speed.semi_structured, "unusable", lambda _device: "")
    for pattern, dtype in (("1:4", torch.bfloat16), ("2:4", torch.float32)):
        with pytest.raises(InputError, match=rf"not {pattern} in {dtype}"):
            check_measurable(pattern, dtype, torch.device("cuda"))


def test_bytes_of_a_matrix_are_those_it_is_multiplied_from():
    one = pack(Pattern("1:4").project(torch.randn(32, 68)).bfloat16(), "1:4")
    assert speed.sparse_bytes(32, 68, Pattern("1:4"), torch.bfloat16, CPU) == one.nbytes
    assert (
        speed.sparse_bytes(32, 64, Pattern("2:4"), torch.bfloat16, torch.device("cuda")) == 32 * 32 * 2 + 32 * 32 // 4
    )


def test_the_cpu_multiplies_every_shape():
    assert speed.unfit(7, 12, torch.bfloat16, CPU) == ""
    assert speed.unfit(7, 12, torch.bfloat16, torch.device("cuda")).startswith("sparse tensor cores take multiples of")


CUDA = torch.device("cuda")


@pytest.fixture
def usable(monkeypatch):
    """What a GPU cannot do, and why: an imagined one, which can do everything unless a test says otherwise."""
    found = {"packed": "", "cores": ""}
    monkeypatch.setattr(speed.kernels, "unusable", lambda _device: found["packed"])
    monkeypatch.setattr(speed.semi_structured, "unusable", lambda _device: found["cores"])
    monkeypatch.setattr(speed.semi_structured, "_searchable", lambda: True)
    monkeypatch.setattr(speed.kernels, "describe", lambda bits: f"Triton, packed, {bits}")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    return found


def test_on_a_gpu_packed_products_are_for_decoding_and_for_what_has_no_others(usable):
    def kinds(d_out, d_in, batch, bits=None):
        return speed.products(d_out, d_in, batch, torch.bfloat16, CUDA, bits)

    assert kinds(64, 64, 1) == kinds(64, 64, 16) == ("tensor cores", "packed")
    assert kinds(64, 64, 17) == ("tensor cores",)
    assert kinds(7, 12, 1) == kinds(7, 12, 17) == ("packed",)  # sparse tensor cores do not take the shape
    assert kinds(64, 64, 1, 8) == kinds(64, 64, 17, 8) == ("packed",)
    assert speed.unfit(7, 12, torch.bfloat16, CUDA) == ""
    usable["cores"] = "too old"
    assert kinds(64, 64, 17) == ("packed",)
    usable["cores"], usable["packed"] = "", "Triton is not installed"
    assert kinds(64, 64, 1) == ("tensor cores",)
    assert kinds(7, 12, 1) == ()
    assert speed.unfit(7, 12, torch.bfloat16, CUDA).startswith("sparse tensor cores take multiples of")
    assert speed.products(7, 12, 100, torch.bfloat16, CPU) == ("packed",)


def test_a_gpu_without_triton_is_announced(usable):
    assert speed.describe(CUDA) == "Triton, packed, None and cuSPARSELt, algorithm searched, on a GPU"
    assert speed.describe(CUDA, None, {"packed"}) == "Triton, packed, None, on a GPU"
    assert speed.describe(CUDA, None, {"tensor cores"}) == "cuSPARSELt, algorithm searched, on a GPU"
    assert speed.describe(CUDA, 8) == "Triton, packed, 8, on a GPU"
    usable["packed"] = "Triton is not installed"
    assert speed.describe(CUDA) == (
        "cuSPARSELt, algorithm searched, on a GPU; no packed products: Triton is not installed"
    )


def test_one_kind_of_product_on_a_gpu_is_enough(usable):
    usable["cores"] = "too old"
    check_measurable("2:4", torch.bfloat16, CUDA)
    usable["cores"], usable["packed"] = "", "Triton is not installed"
    check_measurable("2:4", torch.bfloat16, CUDA)
    with pytest.raises(InputError, match=r"no quantised products on cuda: Triton is not installed; use --device cpu"):
        check_measurable("2:4", torch.bfloat16, CUDA, 4)
    usable["cores"] = "too old"
    with pytest.raises(InputError, match=r"products on cuda: too old, and Triton is not installed; use --device cpu"):
        check_measurable("2:4", torch.bfloat16, CUDA)
    usable["packed"] = ""
    with pytest.raises(InputError, match=r"quantised products on a GPU are of 2:4 .* not 2:4 in torch.float32"):
        check_measurable("2:4", torch.float32, CUDA, 8)


def test_bytes_on_a_gpu_are_those_it_is_multiplied_from(usable):
    del usable
    assert speed.sparse_bytes(7, 12, Pattern("2:4"), torch.bfloat16, CUDA) == 7 * 8 + 2 * (7 * 6 + 64)
    quantised = quantised_bytes(7, 12, 8)
    assert speed.sparse_bytes(7, 12, Pattern("2:4"), torch.bfloat16, CUDA, 8) == quantised
    needed = needed_bytes(1024, 1024, 1, pattern="2:4", dtype=torch.bfloat16, device=CUDA, bits=8)
    assert 2**22 < needed < 2**23


@pytest.mark.parametrize("faster", ["packed", "tensor cores"])
def test_on_a_gpu_the_faster_product_counts(usable, monkeypatch, faster):
    asked = []

    def turns(contenders, **_):
        asked.append(list(contenders))
        return {"dense": Turns([9.0], [9.0])} | {
            name: Turns([5.0], [1.0 if name == faster else 2.0]) for name in contenders if name != "dense"
        }

    cpu = torch.device("cpu")
    monkeypatch.setattr(speed, "take_turns", turns)
    monkeypatch.setattr(speed.semi_structured, "compress", lambda weight, _rows: weight)
    contenders = speed._on_gpu(torch.zeros(64, 64).bfloat16(), torch.zeros(64, 64).bfloat16(), "2:4", None)
    monkeypatch.setattr(speed, "_on_cpu", lambda *_: contenders)
    monkeypatch.setattr(speed, "products", lambda *_: ("packed", "tensor cores"))
    (row,) = measure(64, 64, [1], dtype=torch.bfloat16, device=cpu)
    assert asked == [["dense", "packed", "tensor cores"]]
    assert (row.product, row.sparse_seconds, row.ratio) == (faster, 1.0, 9.0)
    assert usable == {"packed": "", "cores": ""}


def test_on_a_gpu_the_product_counts_that_gains_more_with_and_without_launches(usable, monkeypatch):
    del usable
    times = {"dense": (8.0, 4.0), "packed": (10.0, 1.0), "tensor cores": (6.0, 3.0)}  # with launches, and without
    monkeypatch.setattr(
        speed, "take_turns", lambda *_, **_given: {name: Turns([call], [own]) for name, (call, own) in times.items()}
    )
    (row,) = measure(64, 64, [1], dtype=torch.bfloat16, device=CPU)
    assert (row.product, row.lesser_ratio) == ("tensor cores", row.call_ratio)
    times["packed"] = (5.0, 1.0)
    (row,) = measure(64, 64, [1], dtype=torch.bfloat16, device=CPU)
    assert (row.product, row.lesser_ratio) == ("packed", 8 / 5)


def test_memory_is_foreseen(monkeypatch):
    monkeypatch.setattr(speed, "copies_beyond_cache", lambda nbytes: max(2, (1 << 25) // nbytes))
    arguments = {"pattern": "2:4", "dtype": torch.bfloat16}
    small = needed_bytes(1024, 1024, 1, device=CPU, **arguments)
    dense, sparse = 1024 * 1024 * 2, 1024 * 1024 * 2 * 36 // 64
    exact = 17 * dense + (1 << 25) // sparse * sparse  # 16 copies and what they are copies of
    assert exact < small < 1.05 * exact
    assert needed_bytes(1024, 1024, 512, device=CPU, **arguments) > small
    assert needed_bytes(1024, 1024, 1, device=torch.device("cuda"), **arguments) > 20 * 1024 * 1024


@needs_gpu
def test_on_a_gpu():
    if speed.semi_structured.unusable():
        pytest.skip(speed.semi_structured.unusable())
    row = measure(1024, 1024, [16], dtype=torch.bfloat16, device=torch.device("cuda"))[0]
    assert 0 < row.sparse_seconds < row.sparse_call_seconds
    row = measure(1024, 1024, [1], dtype=torch.bfloat16, device=torch.device("cuda"), bits=8)[0]
    assert row.product == "packed"
    assert "cuSPARSELt" in speed.describe(torch.device("cuda")) or "CUTLASS" in speed.describe(torch.device("cuda"))
