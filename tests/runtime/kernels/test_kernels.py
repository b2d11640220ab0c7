import importlib.metadata
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from halve.runtime import kernels

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def a_gpu(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: capability)
    kernels._unusable.cache_clear()


@pytest.fixture(autouse=True)
def forgetful():
    yield
    kernels._unusable.cache_clear()


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.unusable() == "torch sees no CUDA GPU"


def test_without_triton_it_says_so_and_all_else_can_be_imported():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from halve.runtime import kernels, accelerate\n"
        "torch.cuda.is_available = lambda: True; torch.cuda.current_device = lambda: 0\n"
        "print(kernels.unusable())\n"
        "from halve.runtime.kernels.gpu_matrix import GpuMatrix, sparse_linear\n"
        "from halve.runtime.packed_matrix import pack\n"
        "x = torch.zeros(1, 4, dtype=torch.float16)\n"
        "try: sparse_linear(x, GpuMatrix.of(pack(x, '2:4'), x.device))\n"
        "except kernels.gpu_matrix.InputError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "Triton is not installed",
        "packed matrices are multiplied on a GPU by Triton, which is not installed: install it",
    ]


def test_old_gpus_have_none(monkeypatch):
    a_gpu(monkeypatch, (7, 5))
    monkeypatch.setattr(kernels, "compiled", lambda: torch)
    assert kernels.unusable() == "a GPU has no tensor cores for bfloat16"


@needs_triton
def test_a_gpu_that_triton_cannot_use_is_announced(monkeypatch):
    def fail(device):
        raise RuntimeError(f"no compiler\nfor {device}")

    a_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "_try", fail)
    assert kernels.unusable() == "Triton cannot run here (RuntimeError: no compiler for cuda:0)"
    a_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "_try", lambda _device: None)
    assert kernels.unusable(torch.device("cuda", 1)) == ""


@needs_triton
@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), 2),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 2),
        (RuntimeError("no compiler"), 1),
    ],
    ids=str,
)
def test_a_gpu_that_was_full_is_tried_again(monkeypatch, error, tries):
    tried = []

    def fail(device):
        tried.append(device)
        raise error

    a_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "_try", fail)
    for _ in range(2):
        assert kernels.unusable() == f"Triton cannot run here ({type(error).__name__}: {error})"
    assert len(tried) == tries
    monkeypatch.setattr(kernels, "_try", lambda _device: None)
    assert (kernels.unusable() == "") == (tries == 2)


@needs_triton
@pytest.mark.parametrize("right", [True, False])
def test_a_product_is_tried_before_any_is_trusted(monkeypatch, right):
    from halve.runtime.kernels import gpu_matrix

    tried = []

    def product(x, matrix):
        tried.append((len(x), matrix.shape))
        return x if right else x + 1

    monkeypatch.setattr(gpu_matrix, "sparse_linear", product)
    if right:
        kernels._try(torch.device("cpu"))
        assert tried == [(1, (64, 64)), (16, (64, 64))]
    else:
        with pytest.raises(RuntimeError, match="a product of 1 rows is wrong"):
            kernels._try(torch.device("cpu"))


@needs_triton
def test_says_what_multiplies(monkeypatch):
    import triton

    def without(name):  # as a build of another name is installed
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert kernels.describe() == f"Triton {triton.__version__}, packed"
    assert kernels.describe(8) == f"Triton {triton.__version__}, packed, int8"
