import pytest
import torch
from torch.nn.functional import linear

from halve.errors import InputError
from halve.pattern import Pattern
from halve.runtime import semi_structured
from halve.runtime.semi_structured import DTYPES, compress, padded_rows, unusable

needs_sparse_cores = pytest.mark.skipif(bool(unusable()), reason=f"needs sparse tensor cores: {unusable()}")


def test_says_why_it_cannot_be_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unusable() == "torch sees no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Turing")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert unusable() == "Turing has no sparse tensor cores"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not unusable()


def test_rows_are_padded_to_eights():
    assert [padded_rows(rows) for rows in (1, 8, 9, 64)] == [8, 8, 16, 64]


@pytest.mark.parametrize("weight", [torch.zeros(64, 64), torch.zeros(64, dtype=torch.float16)])
def test_other_tensors_are_refused(weight):
    with pytest.raises(InputError, match=r"sparse tensor cores multiply float16 and bfloat16 matrices on a CUDA"):
        compress(weight, 1)


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
    with pytest.raises(InputError, match=r"do not take a weight of shape \(7, 12\)"):
        semi_structured.compress(torch.zeros(7, 12, dtype=torch.float16, device="cuda"), 8)
