import subprocess
import sys
import threading

import pytest
import torch

from halve.errors import InputError
from halve.maths import kernels
from halve.maths.proximal import prox
from oracles import brute_force_prox, prox_objective

needs_kernel = pytest.mark.skipif(not kernels.available(), reason=kernels.describe())
every_set = pytest.mark.parametrize("instruction_set", kernels.instruction_sets() or ["none"])
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def groups(count, dtype, scale=1.0, seed=0):
    """Random groups, some with equal entries and zeros."""
    z = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z[: count // 8] = (z[: count // 8] * 2).round() / 2
    return (z * scale).to(dtype)


@needs_kernel
@every_set
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lam", [1e-4, 1e-2, 0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 30.0, 1e4])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_never_worse_than_the_reference_and_the_same_support(instruction_set, dtype, lam, scale):
    z = groups(4000, dtype, scale)
    got = kernels.prox_two_of_four(z, lam, instruction_set)
    expected = prox(z, lam, backend="reference")
    best = prox_objective(expected, z, lam, 2)
    assert ((prox_objective(got, z, lam, 2) - best) <= TOLERANCE[dtype] * best).all()
    free = slice(len(z) // 8, None)  # equal entries, which come first, let faces tie
    assert ((got != 0) == (expected != 0))[free].float().mean() > 0.999


@needs_kernel
@every_set
@pytest.mark.parametrize("lam", [0.05, 0.3, 1.0])
def test_never_worse_than_brute_force(instruction_set, lam):
    z = groups(300, torch.float64, seed=1)
    got = kernels.prox_two_of_four(z, lam, instruction_set)
    _, best = brute_force_prox(z, torch.full((300,), lam, dtype=torch.float64), 2, levels=7)
    assert (prox_objective(got, z, lam, 2) - best <= 1e-12 * best).all()


@needs_kernel
@every_set
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 15, 16, 17, 31, 33, 40_001])
def test_any_number_of_groups_and_threads_gives_the_same_bits(instruction_set, count):
    z = groups(count, torch.float32, seed=2)
    whole = kernels.prox_two_of_four(z, 0.2, instruction_set)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(whole, kernels.prox_two_of_four(z, 0.2, instruction_set))
    finally:
        torch.set_num_threads(before)
    if count:
        alone = kernels.prox_two_of_four(z[-1:].contiguous(), 0.2, instruction_set)
        assert torch.equal(whole[-1:], alone)


@needs_kernel
@every_set
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lam", [0.05, 0.3, 1.0])
def test_bits_depend_on_neither_the_place_nor_the_neighbours(instruction_set, dtype, lam):
    z = groups(40_000, dtype, seed=3)
    expected = kernels.prox_two_of_four(z, lam, instruction_set)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(4))
    assert torch.equal(kernels.prox_two_of_four(z[order], lam, instruction_set), expected[order])


@needs_kernel
@every_set
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_groups_that_wait_are_written_even_at_the_end(instruction_set, lanes):
    # One group short of a full queue, and then several more in the last, partial vector.
    easy = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    hard = 0.32 + 0.3 * torch.rand(3000, 4, generator=torch.Generator().manual_seed(5))  # one in 100 has to wait
    for group in hard.split(1):
        z = torch.cat([group.repeat(lanes - 1, 1), easy, group.repeat(3, 1)])
        got = kernels.prox_two_of_four(z, 1.0, instruction_set)
        same = torch.cat([got[: lanes - 1], got[lanes:]])
        assert torch.equal(same, same[:1].expand_as(same)), group


@needs_kernel
@every_set
def test_ties_signs_and_zeros(instruction_set):
    z = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-0.0, 0.0, -0.0, 2.0], [0.0] * 4, [-3.0, 1e-30, -2.0, 1e-30]])
    got = kernels.prox_two_of_four(z, 100.0, instruction_set)
    assert got.tolist() == [[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0], [0.0] * 4, [-3.0, 0.0, -2.0, 0.0]]
    assert not torch.signbit(got[got == 0]).any()


@needs_kernel
@every_set
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 3, 1029, 4001])
def test_what_is_not_finite_is_noticed_wherever_it_is(instruction_set, bad, place):
    z = groups(1001, torch.float32)
    z.view(-1)[place] = bad
    assert kernels.prox_two_of_four(z, 0.1, instruction_set) is None
    with pytest.raises(InputError, match="NaN or infinity"):
        prox(z, 0.1, backend="native")


@needs_kernel
def test_threads_may_call_at_once():
    z = groups(100_000, torch.float32)
    expected = kernels.prox_two_of_four(z, 0.1)
    results = []
    workers = [threading.Thread(target=lambda: results.append(kernels.prox_two_of_four(z, 0.1))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


@needs_kernel
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="sse9"):
        kernels.prox_two_of_four(groups(4, torch.float32), 0.1, "sse9")


@needs_kernel
def test_auto_takes_the_kernel_only_where_it_fits(monkeypatch):
    calls = []
    real = kernels.prox_two_of_four
    monkeypatch.setattr(kernels, "prox_two_of_four", lambda *args: calls.append(1) or real(*args))
    z = groups(8, torch.float32)
    prox(z, 0.1)
    assert calls == [1]
    prox(z.bfloat16(), 0.1)
    prox(z.T.contiguous().T, 0.1)
    assert len(calls) == 3
    prox(z, 0.1, backend="reference")
    prox(z, 0.1, "1:4")
    prox(z, 0.0)
    assert len(calls) == 3
    with pytest.raises(InputError, match="no kernel for 1:4"):
        prox(z, 0.1, "1:4", backend="native")
    with pytest.raises(InputError, match="backend 'gpu' is unknown"):
        prox(z, 0.1, backend="gpu")


def test_without_the_compiled_module_everything_works_and_says_so():
    code = (
        "import sys; sys.modules['halve.maths.kernels._native'] = None\n"
        "import torch; from halve.maths import kernels; from halve.maths.proximal import prox\n"
        "assert not kernels.available(); print(kernels.describe())\n"
        "assert prox(torch.tensor([3.0, 2.0, 1.0, 1.0]), 10.0).tolist() == [3.0, 2.0, 0.0, 0.0]\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "slower PyTorch reference" in result.stdout


@needs_kernel
def test_what_the_kernel_cannot_read_is_refused():
    for z in (torch.zeros(6), torch.zeros(8).bfloat16(), torch.zeros(4, 4).T[:, :2]):
        with pytest.raises(ValueError, match="no kernel for"):
            kernels.prox_two_of_four(z, 0.1)
