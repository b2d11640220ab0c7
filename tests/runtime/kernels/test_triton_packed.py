"""The kernels: in Triton's interpreter, compiled for GPUs that need not be there, and run where there is one."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest
import torch

from halve.maths.pattern import Pattern
from halve.runtime import kernels
from halve.runtime.kernels.gpu_matrix import GpuMatrix, sparse_linear, unpacked
from halve.runtime.packed_matrix import pack, unpack
from halve.runtime.quantised_matrix import quantise

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    bool(kernels.unusable()), reason=f"needs a GPU for packed products: {kernels.unusable()}"
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = [(1, 4), (7, 12), (33, 260), (9, 1096), (19, 192)]
"""Of less than a word of the mask, and of less than a tile; longer than one, odd d_out, whole strips and half ones."""
ROWS = (1, 2, 3, 16)
INTERPRETED = """
import sys, torch
from halve.runtime.kernels import triton_packed as kernel
found = {}
for name, (x, parts, bits, bias, splits, config) in torch.load(sys.argv[1]).items():
    if splits:
        found[name] = kernel.multiply(x, parts, bits, bias, splits, config)
    else:
        found[name] = torch.empty_like(x)
        kernel.expand(parts, bits, found[name], config)
torch.save(found, sys.argv[2])
"""


def packed_case(d_out, d_in, dtype, bits, seed=0):
    """Return a packed matrix with rows and groups of zeros, a negative zero and large and tiny weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator) * torch.rand(d_out, 1, generator=generator)
    weight = Pattern("2:4").project(weight)
    weight[d_out // 2] = 0
    weight[:, : d_in // 2][:, :4] = 0
    weight[-1, -1] = -0.0
    packed = pack(weight.to(dtype), "2:4")
    return packed if bits is None else quantise(packed, bits)


def dense(packed, *, stored):
    """Return the matrix in float64: of integers times scales as they are, or, stored, as they are in 16 bits."""
    if hasattr(packed, "mask"):
        return unpack(packed).double()
    exact = unpack(replace(packed, dtype=torch.float32).dequantised())
    return (exact.to(packed.dtype) if stored else exact).double()


def truncated(weight):
    """Cut a matrix off to bfloat16, which is how the interpreter rounds."""
    return (weight.float().view(torch.int32) & -65536).view(torch.float32).double()


def expected(x, packed, bias, *, interpreted):
    """Return the product in float64, and how far rounding may be from it."""
    stored = len(x) > kernels.LANE_ROWS
    weight = dense(packed, stored=stored)
    cut = interpreted and packed.dtype == torch.bfloat16
    if cut and stored and not hasattr(packed, "mask"):
        weight = truncated(dense(packed, stored=False))
    bias = torch.zeros(packed.d_out) if bias is None else bias
    product = x.double() @ weight.T + bias.double()
    magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
    return product, ROUNDING[packed.dtype] * (2 if cut else 1) * product.abs() + 2.0**-20 * magnitude


def parts_of(packed):
    return GpuMatrix.of(packed, torch.device("cpu")).parts


def cases():
    """Return what is multiplied, by name: the packed matrix, x, bias, splits and the blocks of the kernel."""
    found = {}
    generator = torch.Generator().manual_seed(1)
    for number, (d_out, d_in) in enumerate(SHAPES):
        for name, dtype in DTYPES.items():
            for bits in (None, 8, 4):
                packed = packed_case(d_out, d_in, dtype, bits, seed=number)
                for rows in ROWS:
                    x = torch.randn(rows, d_in, generator=generator).to(dtype)
                    # bias, splits and blocks take turns: together all pairs that could disturb each other
                    turn = number + rows + (bits or 0) // 4
                    bias = torch.randn(d_out, generator=generator).to(dtype) if turn % 2 else None
                    blocks = {"BLOCK_ROWS": 32, "BLOCK": (32, 64)[turn % 2]}
                    found[f"{d_out}x{d_in} {name} {bits} {rows}"] = packed, x, bias, (1, 3)[turn // 2 % 2], blocks
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The cases and the kernels' answers; one process for all, starting one takes longer than the work."""
    folder = tmp_path_factory.mktemp("triton")
    given = cases()
    asked = {
        name: (x, parts_of(packed), getattr(packed, "bits", None), bias, splits, blocks)
        for name, (packed, x, bias, splits, blocks) in given.items()
    }
    for name, (packed, *_) in given.items():
        if name.endswith(" 1"):
            start = packed.d_out // 3
            out = torch.empty(packed.d_out - start, packed.d_in, dtype=packed.dtype)
            asked[f"expand {name}"] = out, parts_of(packed), getattr(packed, "bits", None), None, 0, start
    first = next(name for name in asked if name.endswith("1096 float16 4 2"))
    asked["again"] = (*asked[first][:4], 3, {"BLOCK_ROWS": 4, "BLOCK": 16})
    asked["again and again"] = asked["again"]
    torch.save(asked, folder / "cases.pt")
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, folder / "cases.pt", folder / "found.pt"]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    return given, torch.load(folder / "found.pt")


@needs_triton
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_dense_matrix(interpreted, shape, dtype, bits):
    given, found = interpreted
    for rows in ROWS:
        name = f"{shape[0]}x{shape[1]} {dtype} {bits} {rows}"
        packed, x, bias, *_ = given[name]
        product, allowed = expected(x, packed, bias, interpreted=True)
        assert found[name].dtype == DTYPES[dtype]
        assert found[name].shape == (rows, shape[0])
        off = (found[name].double() - product).abs() - allowed
        assert off.max() <= 0, name


@needs_triton
def test_the_cases_split_columns_and_not_with_and_without_bias():
    kinds = {
        (bias is None, splits, len(x) > kernels.LANE_ROWS, hasattr(packed, "mask"))
        for packed, x, bias, splits, _ in cases().values()
    }
    assert len(kinds) == 16


@needs_triton
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_unpacked_to_the_same_bits(interpreted, shape, dtype, bits):
    given, found = interpreted
    packed = given[f"{shape[0]}x{shape[1]} {dtype} {bits} 1"][0]
    whole = dense(packed, stored=True)
    if bits and dtype == "bfloat16":
        whole = truncated(dense(packed, stored=False))
    got = found[f"expand {shape[0]}x{shape[1]} {dtype} {bits} 1"]
    assert torch.equal(got.view(torch.int16), whole[shape[0] // 3 :].to(DTYPES[dtype]).view(torch.int16))


@needs_triton
def test_the_same_call_gives_the_same_bits(interpreted):
    _, found = interpreted
    assert torch.equal(found["again"], found["again and again"])


@needs_triton
@pytest.mark.parametrize("rows", [1, 16])
def test_every_kind_of_weights_is_tuned_by_itself(monkeypatch, rows):
    from halve.runtime.kernels import triton_packed

    if triton_packed.INTERPRETED:
        pytest.skip("the interpreter tunes nothing")
    tuned = set()

    def time(*args, config, **given):
        tuned.add((given.get("BITS"), str(given["KIND"])))
        return [1.0]

    for each in triton_packed._TUNED.values():
        monkeypatch.setattr(each, "cache", {})
        monkeypatch.setattr(each, "_bench", time)
        monkeypatch.setattr(each, "fn", MagicMock())
    monkeypatch.setattr(triton_packed, "_add_up", MagicMock())
    for dtype in DTYPES.values():
        for bits in (None, 8, 4):
            parts = parts_of(packed_case(7, 128, dtype, bits))
            triton_packed.multiply(torch.zeros(rows, 128, dtype=dtype), parts, bits, None, splits=2)
    assert tuned == {(bits, kind) for bits in (None, 8, 4) for kind in ("bf16", "fp16")}


NUMBERS = {"rows": 3, "d_out": 4096, "groups": 1024, "columns": 1024, "splits": 2, "start": 5, "size": 12288}
"""What is multiplied of a large model's matrix; not what decides anything but alignment."""


def compiled_kernel(name, bits, capability=80, **given):
    """Compile a kernel with the first of its configurations, for parts that are aligned as torch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from halve.runtime.kernels import triton_packed

    kernel = getattr(triton_packed, name)
    kind = next((kind for kind, each in triton_packed._KERNELS.items() if each is kernel), None)
    config = triton_packed._CONFIGS[kind][0] if kind else None
    blocks = config.kwargs if config else triton_packed._EXPANDED if "expand" in name else {"BLOCK": 256}
    held = {"places": "*i16", "codes": "*i16", "scales": "*fp16", "mask": "*i32", "values": "*i32", "x": "*i64"}
    held |= {"bias": "*bf16", "out": "*i64" if "expand" in name else "*bf16", "sums": "*fp32"}
    constants = {"KIND": triton.language.bfloat16, "BITS": bits, "WIDE": False, **blocks}
    constants |= {"rows": 1} if name.endswith("lanes") else {}
    constants |= given | {name: number for name, number in (NUMBERS | given).items() if number == 1}
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    types, aligned = {}, {}
    for at, argument in enumerate(kernel.arg_names):
        pointer = held.get(argument.removesuffix("_ptr")) if argument.endswith("_ptr") else None
        types[argument] = "constexpr" if argument in constants else pointer or "i32"
        if argument not in constants and (pointer or NUMBERS[argument] % 16 == 0):
            aligned[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def named(bits, rest):
    return f"_{'numbers' if bits is None else 'integers'}_by_{rest}"


@needs_triton
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("capability", [80, 90])
def test_lanes_read_weights_by_16_bytes_and_exchange_nothing(bits, capability):
    compiled = compiled_kernel(named(bits, "lanes"), bits, capability, bias_ptr=None, splits=1)
    loop = re.search(r"^.*?(scf\.for.*?)tt\.reduce", compiled.asm["ttgir"], re.DOTALL | re.MULTILINE)[1]
    assert "convert_layout" not in loop  # which would go through shared memory, with barriers
    assembly = compiled.asm["ptx"]
    # four loads of two kept weights each for four groups; or places, and codes by eight for each two bits of them
    assert assembly.count("ld.global.v4.b32") == {None: 4, 8: 5, 4: 3}[bits]
    assert "ld.local" not in assembly


@needs_triton
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_more_rows_are_multiplied_by_tensor_cores(bits):
    assembly = compiled_kernel(named(bits, "cores"), bits).asm["ptx"]
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in assembly
    assert "ld.local" not in assembly


@needs_triton
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(
    ("name", "bits", "given"),
    [
        ("_numbers_by_lanes", None, {"rows": 2}),
        ("_integers_by_lanes", 4, {"rows": 2}),
        ("_numbers_by_lanes", None, {"splits": 1, "d_out": 1, "groups": 1, "columns": 1}),
        ("_numbers_by_cores", None, {"splits": 1, "bias_ptr": None, "groups": 1, "columns": 1}),
        ("_add_up", None, {}),
        ("_add_up", None, {"bias_ptr": None, "d_out": 1}),
        ("_expand_numbers", None, {}),
        ("_expand_numbers", None, {"rows": 1, "groups": 1, "columns": 1}),
        ("_expand_integers", 8, {}),
        ("_expand_integers", 4, {}),
    ],
)
def test_every_kind_of_call_compiles(name, bits, given):
    assert "ld.local" not in compiled_kernel(name, bits, **given).asm["ptx"]


@needs_triton
@needs_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape):
    for name, (packed, x, bias, splits, _) in cases().items():
        if not name.startswith(f"{shape[0]}x{shape[1]} "):
            continue
        matrix = GpuMatrix.of(packed, torch.device("cuda"))
        product, allowed = expected(x, packed, bias, interpreted=False)
        got = sparse_linear(x.cuda(), matrix, None if bias is None else bias.cuda(), splits)
        assert ((got.cpu().double() - product).abs() - allowed).max() <= 0, name
        assert torch.equal(unpacked(matrix).cpu().double(), dense(packed, stored=True)), name
