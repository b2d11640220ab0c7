import pytest
import torch

from halve.errors import InputError, PatternError
from halve.maths.pattern import Pattern
from halve.runtime import speed
from halve.runtime.packed_matrix import DTYPES, pack, unpack
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
        return {"dense": Turns([2.0], [3.0]), "sparse": Turns([4.0], [1.0])}

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
    for product in (*products[0]["dense"], *products[0]["sparse"]):
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
    assert "cuSPARSELt" in speed.describe(torch.device("cuda")) or "CUTLASS" in speed.describe(torch.device("cuda"))
