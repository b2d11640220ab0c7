"""The Triton kernel: in Triton's interpreter, compiled for a GPU that need not be there, and run where there is one."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from halve.errors import InputError
from halve.maths import kernels
from halve.maths.proximal import prox
from oracles import brute_force_prox, prox_objective
from proximal_groups import ADVERSARIAL, face_boundaries

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
LAMS = [0.01, 0.1, 0.3, 1.0, 1.1, 10.0, 100.0]
SHIPPED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTERPRETED = """
import sys, torch
from halve.maths.kernels import triton_two_of_four as kernel
kernel._BLOCK = 2048  # the interpreter's time goes by the number of programs
torch.save([kernel.prox_two_of_four(z, lam) for z, lam in torch.load(sys.argv[1])], sys.argv[2])
"""


def hard_groups(lam):
    """float32 groups (g, 4): random ones of three scales, ties, zeros, borders between faces, huge and tiny ones."""
    generator = torch.Generator().manual_seed(11)
    random = torch.randn(1600, 4, generator=generator, dtype=torch.float64)
    random[800:] = 0.32 + 0.3 * random[800:].sigmoid()  # where few settle at once
    ties = (torch.randn(200, 4, generator=generator, dtype=torch.float64) * 2).round() / 2
    borders = torch.cat([torch.tensor(ADVERSARIAL, dtype=torch.float64), face_boundaries()]) / lam
    borders = borders * torch.randn(borders.shape, generator=generator).sign()
    extremes = torch.tensor([[1e30, 1e30, -1e30, 1e29], [1e-30, -1e-30, 1e-30, 0.0], [-0.0, 0.0, -0.0, -0.0]])
    z = torch.cat([random, random[:800] / lam, ties, ties / lam, borders, borders.roll(1, -1), extremes.double()])
    return z.float()


def interpret(cases, folder):
    """Apply the kernel to (z, lam) pairs in a process of its own: Triton decides at import whether it interprets."""
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, folder / "cases.pt", folder / "solved.pt"]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    return torch.load(folder / "solved.pt")


def check_against_reference(got, z, lam):
    expected = prox(z.double(), lam, backend="reference")
    best = prox_objective(expected, z, lam, 2)
    assert ((prox_objective(got, z, lam, 2) - best) <= 1e-6 * best).all()
    assert ((got != 0) == (expected != 0)).float().mean() > 0.99  # where faces tie they may differ
    assert (got * z >= 0).all()
    assert not torch.signbit(got[got == 0]).any()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The cases and the kernel's answers; one process for all, starting one takes longer than the work."""
    cases = {f"hard {lam}": (hard_groups(lam), lam) for lam in LAMS}
    order = torch.randperm(len(cases["hard 0.3"][0]), generator=torch.Generator().manual_seed(12))
    cases["shuffled"] = (cases["hard 0.3"][0][order], 0.3)
    cases["shortest"] = (cases["shuffled"][0][:1], 0.3)
    cases["empty"] = (torch.empty(0, 4), 0.3)
    small = torch.randn(300, 4, generator=torch.Generator().manual_seed(13))
    cases.update({name: (small.to(dtype), 0.3) for name, dtype in SHIPPED.items()})
    for bad in (float("nan"), float("inf"), -float("inf")):
        cases[f"holds {bad}"] = (small.clone(), 0.3)
        cases[f"holds {bad}"][0][299, 3] = bad
    solved = interpret(list(cases.values()), tmp_path_factory.mktemp("triton"))
    return {name: (z, got) for (name, (z, _)), got in zip(cases.items(), solved, strict=True)}, order


@needs_triton
@pytest.mark.parametrize("lam", LAMS)
def test_never_worse_than_the_reference_in_float64(interpreted, lam):
    z, got = interpreted[0][f"hard {lam}"]
    assert len(z) > 4000
    check_against_reference(got, z, lam)


@needs_triton
def test_never_worse_than_brute_force(interpreted):
    z, got = (tensor[-1500:-3].double() for tensor in interpreted[0]["hard 1.0"])
    lam = torch.ones(len(z), dtype=torch.float64)
    _, lowest = brute_force_prox(z, lam, 2, levels=7)
    assert ((prox_objective(got, z, 1.0, 2) - lowest) <= 1e-6 * lowest).all()


@needs_triton
def test_bits_depend_on_neither_the_place_nor_the_neighbours(interpreted):
    cases, order = interpreted
    shuffled = cases["shuffled"][1]
    assert torch.equal(shuffled, cases["hard 0.3"][1][order])
    assert torch.equal(cases["shortest"][1], shuffled[:1])
    assert cases["empty"][1].shape == (0, 4)


@needs_triton
@pytest.mark.parametrize("name", SHIPPED)
def test_narrow_dtypes_are_computed_in_float32(interpreted, name):
    z, got = interpreted[0][name]
    assert got.dtype == z.dtype == SHIPPED[name]
    expected = prox(z.float(), 0.3, backend="reference").to(z.dtype)
    rounding = {"float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-7}[name]  # the interpreter truncates to bfloat16
    torch.testing.assert_close(got, expected, rtol=rounding, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_noticed(interpreted, bad):
    assert interpreted[0][f"holds {bad}"][1] is None


@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_compiles_for_a_gpu_and_moves_every_weight_once(dtype, monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from halve.maths.kernels import triton_two_of_four

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointer = f"*{dtype}"
    types = {"z_ptr": pointer, "out_ptr": pointer, "spoiled_ptr": "*i32", "size": "i32", "lam": "fp32"}
    aligned = {(argument,): [["tt.divisibility", 16]] for argument in (0, 1, 3)}  # as torch allocates
    source = ASTSource(triton_two_of_four._solve, {**types, "BLOCK": "constexpr"}, {"BLOCK": 256}, aligned)
    assembly = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    words = "v4" if dtype == "fp32" else "v2"  # 128 threads, two groups each, and the flag
    assert assembly.count("ld.global") == assembly.count(f"ld.global.{words}.b32") == 2
    assert assembly.count("st.global") - 1 == assembly.count(f"st.global.{words}.b32") == 2
    assert "ld.local" not in assembly


@needs_triton
def test_says_what_a_gpu_would_use():
    import triton

    assert kernels.available("cuda")
    assert kernels.describe("cuda") == f"Triton {triton.__version__}"


def test_without_triton_the_fallback_is_announced():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from halve.maths import kernels\n"
        "torch.cuda.is_available = lambda: True\n"
        "assert not kernels.available('cuda'); print(kernels.missing()[-1])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "Triton is not installed: the slower PyTorch reference runs\n"


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the first attempt succeeds on this machine's GPU")
def test_a_gpu_that_triton_cannot_use_is_announced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels._on_gpu.cache_clear()
    try:
        assert not kernels.available("cuda")
        assert "Triton cannot run here (" in kernels.describe("cuda")
        assert kernels.missing()[-1].endswith("the slower PyTorch reference runs")
    finally:
        kernels._on_gpu.cache_clear()


def test_other_devices_have_no_kernel():
    z = torch.ones(8, device="meta")
    assert kernels.describe("meta") == "there is no kernel for meta: the slower PyTorch reference runs"
    with pytest.raises(InputError, match=r"no kernel for 2:4 in torch\.float32 on meta \(there is no kernel for meta"):
        prox(z, 0.1, backend="native")
    with pytest.raises(ValueError, match=r"no kernel for torch\.float32"):
        kernels.prox_two_of_four(z, 0.1)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("lam", LAMS)
def test_on_a_gpu(lam):
    z = hard_groups(lam)
    got = prox(z.cuda(), lam, backend="native")
    assert got.is_cuda
    check_against_reference(got.cpu(), z, lam)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = z[:2000].to(dtype).cuda()
        expected = prox(narrow.float(), lam, backend="native").to(dtype)
        assert torch.equal(prox(narrow, lam, backend="native"), expected)
    with pytest.raises(InputError, match=r"no kernel for 2:4 in torch\.float64"):
        prox(z.double().cuda(), lam, backend="native")
    torch.testing.assert_close(prox(z.double().cuda(), lam).cpu(), prox(z.double(), lam, backend="reference"))
