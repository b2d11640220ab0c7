import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halve.errors import InputError
from halve.runtime import compiled, native
from halve.runtime.native import REFERENCE, dense_linear, expand, register_rows, sparse_linear
from halve.runtime.packed_matrix import DTYPES, pack, unpack
from packed_matrices import PATTERNS, assert_close, every_dtype, pruned, same_bits

ALL = ("avx512", "avx2", "portable")
needs_kernel = pytest.mark.skipif(not compiled.instruction_sets(), reason=native.describe())
every_set = pytest.mark.parametrize(
    "instruction_set",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in compiled.instruction_sets(), reason=f"no {name} here"))
        for name in ALL
    ],
)
BATCH = 16


def inputs(packed, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, packed.d_in, generator=generator).to(packed.dtype)
    return x, torch.randn(packed.d_out, generator=generator).to(packed.dtype)


def most_rows(instruction_set, dtype):
    """Return the largest batch whose products are summed by our kernels, not by torch."""
    return register_rows(instruction_set, dtype, native._amx(dtype))


@st.composite
def products(draw):
    pattern = draw(st.sampled_from(PATTERNS))
    group = {"2:4": 4, "1:2": 2, "1:4": 4, "3:4": 4, "4:8": 8, "2:8": 8, "5:12": 12, "16:32": 32}.get(pattern, 1)
    d_in, d_out = draw(st.integers(1, 400 // group)) * group, draw(st.integers(1, 19))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000))
    weight = pruned(d_out, d_in, pattern, dtype, seed, empty=draw(st.sampled_from([0, 0.3, 1])))
    return weight, pack(weight, pattern), draw(st.integers(0, BATCH + 3)), draw(st.booleans())


@needs_kernel
@every_set
@given(case=products())
def test_products_are_those_of_float64(instruction_set, case):
    weight, packed, batch, biased = case
    x, bias = inputs(packed, batch)
    bias = bias if biased else None
    got = sparse_linear(x, packed, bias, instruction_set)
    assert (got.shape, got.dtype) == ((batch, packed.d_out), packed.dtype)
    assert_close(got, x, weight, bias)


@given(case=products())
def test_so_is_the_reference(case):
    weight, packed, batch, biased = case
    x, bias = inputs(packed, batch)
    bias = bias if biased else None
    assert_close(sparse_linear(x, packed, bias, REFERENCE), x, weight, bias)


@needs_kernel
@every_set
@every_dtype
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])
def test_every_column_and_row_has_its_weight(instruction_set, dtype, pattern):
    # Each weight and each unit vector is exact in every dtype, so nothing may differ.
    weight = torch.arange(1, 12 * 76 + 1, dtype=torch.float32).reshape(12, 76).remainder(251).to(dtype)
    packed = pack(pruned(12, 76, pattern).ne(0).to(dtype) * weight, pattern)
    unit = torch.eye(76, dtype=dtype)
    columns = torch.cat([sparse_linear(rows, packed, None, instruction_set) for rows in unit.split(5)])
    assert torch.equal(columns.T, unpack(packed))


@needs_kernel
@every_set
@given(case=products(), places=st.tuples(st.integers(0, 19), st.integers(0, 19)))
def test_expanded_rows_have_the_bits_of_the_matrix(instruction_set, case, places):
    weight, packed, _, _ = case
    start, stop = sorted(min(place, packed.d_out) for place in places)
    assert same_bits(expand(packed, start, stop, instruction_set), weight[start:stop])
    assert same_bits(expand(packed, start, stop, REFERENCE), weight[start:stop])


@needs_kernel
@every_set
@every_dtype
def test_zeros_keep_their_sign_and_nothing_else_its_size(instruction_set, dtype):
    weight = torch.tensor([[-0.0, 0.0, 0.0, 1.0], [0.0, float("inf"), -float("inf"), 0.0]], dtype=dtype)
    assert same_bits(expand(pack(weight, "2:4"), 0, 2, instruction_set), weight)


@needs_kernel
@every_set
@every_dtype
def test_what_is_not_finite_gives_what_a_dense_product_gives(instruction_set, dtype):
    weight = pruned(5, 72, "2:4", dtype)
    packed = pack(weight, "2:4")
    for bad in (float("nan"), float("inf"), -float("inf")):
        x, _ = inputs(packed, 3)
        x[1, 70] = bad
        got = sparse_linear(x, packed, None, instruction_set)
        expected = x.double() @ weight.double().T
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


@needs_kernel
@every_set
def test_rounding_is_to_nearest_even_and_overflow_infinite(instruction_set):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        mantissas = torch.randint(128, 256, (2, 500), generator=generator) / 128
        x, w = (mantissas * 2.0 ** torch.randint(-12, 6, (2, 500), generator=generator)).to(dtype)
        weight = torch.zeros(500, 4, dtype=dtype)
        weight[:, 1] = w
        x = x[: min(BATCH, most_rows(instruction_set, dtype))]
        inputs_of_four = x.unsqueeze(-1).expand(-1, 4)
        got = sparse_linear(inputs_of_four, pack(weight, "2:4"), None, instruction_set)
        # One product for each number: exact in float32, rounded once, some to subnormal halves.
        assert torch.equal(got, torch.outer(x.float(), w.float()).to(dtype))
    big = pack(torch.tensor([[60000.0, 60000.0, 0.0, 0.0]], dtype=torch.float16), "2:4")
    assert sparse_linear(torch.ones(4, dtype=torch.float16), big, None, instruction_set).isinf().all()


@needs_kernel
@every_set
@every_dtype
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_bits_depend_on_neither_the_place_nor_the_neighbours(instruction_set, dtype, pattern):
    weight = pruned(29, 320, pattern, dtype)
    packed = pack(weight, pattern)
    rows = min(BATCH, most_rows(instruction_set, dtype))
    x, bias = inputs(packed, rows)
    expected = sparse_linear(x, packed, bias, instruction_set)
    for batch in range(2, rows):
        assert torch.equal(sparse_linear(x[-batch:], packed, bias, instruction_set), expected[-batch:])
    alone = sparse_linear(x[:1], packed, bias, instruction_set)  # which may be summed in another order
    for first in range(1, 9):
        rows = pack(weight[first:], pattern)
        assert torch.equal(sparse_linear(x, rows, bias[first:], instruction_set), expected[:, first:])
        assert torch.equal(sparse_linear(x[:1], rows, bias[first:], instruction_set), alone[:, first:])


@needs_kernel
@every_set
@pytest.mark.parametrize("batch", [1, 3, BATCH, 257])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_threads_give_the_same_bits(instruction_set, batch, pattern):
    packed = pack(pruned(1037, 512, pattern), pattern)
    x, bias = inputs(packed, batch)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results += [sparse_linear(x, packed, bias, instruction_set) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    if batch <= most_rows(instruction_set, packed.dtype):
        assert all(torch.equal(result, results[0]) for result in results)
    assert_close(results[-1], x, unpack(packed), bias)


@needs_kernel
def test_threads_may_call_at_once():
    packed = pack(pruned(2048, 1024, "2:4"), "2:4")
    x, bias = inputs(packed, 2)
    before = torch.get_num_threads()
    wrong = []
    try:
        torch.set_num_threads(4)
        expected = sparse_linear(x, packed, bias)

        def call():
            torch.set_num_threads(4)
            for _ in range(50):
                wrong.extend([1] * (not torch.equal(sparse_linear(x, packed, bias), expected)))

        workers = [threading.Thread(target=call) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


SHARING = """
import os, torch
from halve.runtime.native import sparse_linear
from halve.runtime.packed_matrix import pack
torch.set_num_threads(3)
packed = pack(torch.zeros(4096, 512), "2:4")
torch.zeros(1 << 20).add_(1)  # starts the threads
before = os.listdir("/proc/self/task")
for batch in (1, 2, 7):
    sparse_linear(torch.ones(batch, 512), packed)
assert len(before) >= 3 and os.listdir("/proc/self/task") == before
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="no OpenMP")
def test_the_threads_are_those_of_torch():
    subprocess.run([sys.executable, "-c", SHARING], check=True, timeout=120)


FORKING = """
import os, threading, torch
from halve.runtime.native import sparse_linear
from halve.runtime.packed_matrix import pack
torch.set_num_threads(3)
weight = torch.zeros(4096, 512); weight[:, ::4] = 1.0
packed, x = pack(weight, "1:4"), torch.ones(2, 512)
right = lambda: bool((sparse_linear(x, packed) == 128.0).all())
assert right()
stop = threading.Event()
busy = threading.Thread(target=lambda: [right() for _ in iter(lambda: stop.is_set(), True)])
busy.start()  # so that the child finds the locks in any state
for _ in range(20):
    child = os.fork()
    if not child:
        os._exit(0 if all(right() for _ in range(5)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right()
stop.set()
busy.join()
"""


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKING], check=True, timeout=120)


@every_dtype
def test_shapes_and_strides_of_x(dtype):
    weight = pruned(6, 40, "2:4", dtype)
    packed = pack(weight, "2:4")
    x, bias = inputs(packed, 12)
    expected = sparse_linear(x, packed, bias)
    assert torch.equal(sparse_linear(x[0], packed, bias), sparse_linear(x[:1], packed, bias)[0])
    assert torch.equal(sparse_linear(x.view(2, 3, 2, 40), packed, bias), expected.view(2, 3, 2, 6))
    assert sparse_linear(x[:0], packed, bias).shape == (0, 6)
    assert sparse_linear(x.view(3, 4, 40)[:, :0], packed).shape == (3, 0, 6)
    apart = torch.empty(40, 12, dtype=dtype).T.copy_(x)
    assert torch.equal(sparse_linear(apart, packed, bias), expected)
    assert torch.equal(sparse_linear(x[::2], packed, bias), expected[::2])
    strided = torch.stack([bias, bias], dim=1)[:, 0]
    assert torch.equal(sparse_linear(x, packed, strided), expected)
    with torch.no_grad():
        assert torch.equal(sparse_linear(x.requires_grad_(), packed, torch.nn.Parameter(bias)), expected)


@needs_kernel
@every_set
@every_dtype
@pytest.mark.parametrize("multiplies", [False, True])
def test_larger_batches_are_multiplied_tile_by_tile(instruction_set, dtype, multiplies, monkeypatch):
    seen, tiles = [], native._tiles
    monkeypatch.setattr(
        native, "_tiles", lambda *of: (seen.append((len(tile), tile.dtype)) or (row, tile) for row, tile in tiles(*of))
    )
    monkeypatch.setattr(native, "_multiplies", lambda dtype: multiplies or dtype == torch.float32)
    monkeypatch.setattr(native, "_TILE", 5 * 44)
    weight = pruned(23, 44, "2:4", dtype)
    packed = pack(weight, "2:4")
    most = most_rows(instruction_set, dtype)
    x, bias = inputs(packed, most + 1)
    got = sparse_linear(x, packed, bias, instruction_set)
    assert seen == [(rows, dtype if multiplies else torch.float32) for rows in (5, 5, 5, 5, 3)]
    if multiplies and dtype == torch.float16:  # torch's own rounds sums of it as it pleases
        torch.testing.assert_close(got, (x.float() @ weight.float().T + bias.float()).half(), rtol=1e-2, atol=1e-2)
    else:
        assert_close(got, x, weight, bias)
        assert_close(sparse_linear(x, packed, None, instruction_set), x, weight)
        del seen[5:]
    sparse_linear(x[:most], packed, bias, instruction_set)
    assert len(seen) == 5


@pytest.mark.parametrize("instruction_set", [REFERENCE, None])
@pytest.mark.parametrize("lowered", [torch.bfloat16, torch.float16])
def test_autocast_lowers_nothing(instruction_set, lowered):
    weight = pruned(8, 64, "2:4", torch.float32)
    packed, x = pack(weight, "2:4"), 100 * torch.ones(300, 64)  # more rows than the kernels take
    with torch.autocast("cpu", lowered):
        got = sparse_linear(x, packed, None, instruction_set)
    assert torch.equal(got, sparse_linear(x, packed, None, instruction_set))


def test_who_multiplies_how_many_rows():
    rows = {
        (name, dtype, amx): register_rows(name, dtype, amx) for name in ALL for dtype in DTYPES for amx in (False, True)
    }
    half, single = (torch.bfloat16, torch.float16), torch.float32
    assert {rows["avx512", dtype, True] for dtype in half} == {4}
    assert {rows["avx512", dtype, False] for dtype in DTYPES} == {rows["avx512", single, True]} == {16}
    assert {rows["avx2", dtype, False] for dtype in half} == {256}
    assert rows["avx2", single, False] == 64
    assert {rows["portable", dtype, False] for dtype in DTYPES} == {8}


def test_what_the_processor_has_decides(monkeypatch):
    for name, dtype in (("amx_bf16", torch.bfloat16), ("amx_fp16", torch.float16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert [native._amx(other) for other in DTYPES] == [other == dtype for other in DTYPES]
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not any(native._amx(dtype) for dtype in DTYPES)


@needs_kernel
@every_set
@every_dtype
@pytest.mark.parametrize("pattern", ["2:4", "2:8", "60%"])
def test_a_mask_changed_behind_our_back_reads_nothing_outside(instruction_set, dtype, pattern):
    # Run under the address sanitizer by tests/native; here it shows that the last row cannot fault.
    packed = pack(pruned(3, 256, pattern, dtype), pattern)
    packed.mask.fill_(255)
    x, _ = inputs(packed, 1)
    assert sparse_linear(x, packed, None, instruction_set).shape == (1, 3)
    assert expand(packed, 0, 3, instruction_set).shape == (3, 256)


@needs_kernel
@every_set
@every_dtype
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, BATCH])
def test_the_dense_kernel_of_the_benchmarks(instruction_set, dtype, batch):
    weight = torch.randn(11, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = torch.randn(batch, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert_close(dense_linear(x, weight, instruction_set), x, weight)


@needs_kernel
def test_what_the_dense_kernel_cannot_read_is_refused():
    weight, x = torch.zeros(4, 64), torch.zeros(1, 64)
    for wrong in ((x[:, :32], weight[:, :32]), (x, weight.bfloat16()), (x[0], weight), (x[:0], weight)):
        with pytest.raises(InputError, match="no dense kernel"):
            dense_linear(*wrong)
    with pytest.raises(InputError, match="no dense kernel"):
        dense_linear(x, weight, REFERENCE)


def test_what_does_not_go_together_is_refused():
    packed = pack(pruned(6, 40, "2:4"), "2:4")
    x, bias = inputs(packed, 2)
    for wrong in (x.float(), x[:, :36], x[0, 0], torch.empty_like(x, device="meta")):
        with pytest.raises(InputError, match="x is torch"):
            sparse_linear(wrong, packed)
    for wrong in (bias.float(), bias[:5], bias.unsqueeze(0)):
        with pytest.raises(InputError, match="bias is torch"):
            sparse_linear(x, packed, wrong)
    with pytest.raises(InputError, match="no gradient"):
        sparse_linear(x, packed, torch.nn.Parameter(bias))
    with pytest.raises(InputError, match="'sse9'"):
        sparse_linear(x, packed, None, "sse9")
    for rows in ((-1, 2), (3, 2), (0, 7)):
        with pytest.raises(InputError, match="do not exist"):
            expand(packed, *rows)


def test_without_the_compiled_module_everything_works_and_says_so():
    code = (
        "import sys; sys.modules['halve.runtime._native'] = None\n"
        "import torch; from halve.runtime import compiled, native; from halve.runtime.packed_matrix import pack\n"
        "packed = pack(torch.tensor([[3.0, 0.0, 0.0, 2.0]]), '2:4')\n"
        "assert not compiled.instruction_sets(); print(native.describe())\n"
        "assert native.sparse_linear(torch.ones(40, 4), packed).eq(5.0).all()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "every product unpacks its weights" in result.stdout


def test_without_the_kernels_it_says_so_once(monkeypatch):
    monkeypatch.setattr(compiled, "library", None)
    compiled.instruction_sets.cache_clear()
    native._best.cache_clear()
    packed = pack(pruned(4, 16, "2:4"), "2:4")
    x, _ = inputs(packed, 2)
    try:
        assert native.describe().startswith("the packed kernels are not built")
        with monkeypatch.context() as patch:
            patch.setattr(native, "broken", "undefined symbol: x")
            assert native.describe().startswith("the packed kernels cannot be loaded (undefined symbol: x): every")
        with pytest.warns(RuntimeWarning, match=r"not built .*every product unpacks its weights"):
            got = sparse_linear(x, packed)
        assert torch.equal(got, native.reference(x, packed))
        sparse_linear(x, packed)  # and not again: a warning is an error here
    finally:
        compiled.instruction_sets.cache_clear()
        native._best.cache_clear()
