import pytest
import torch

from halve.errors import InputError
from halve.runtime import kernels
from halve.runtime.kernels.gpu_matrix import GpuMatrix, column_splits, sparse_linear, unpacked
from halve.runtime.packed_matrix import pack
from halve.runtime.quantised_matrix import quantise
from packed_matrices import pruned, same_bits

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(
    bool(kernels.unusable()), reason=f"needs a GPU for packed products: {kernels.unusable()}"
)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_there_and_back_a_matrix_is_the_same(bits):
    packed = pack(pruned(5, 36, "2:4"), "2:4")
    packed = packed if bits is None else quantise(packed, bits)
    matrix = GpuMatrix.of(packed, CPU)
    assert matrix.nbytes == packed.nbytes
    again = matrix.packed()
    assert type(again) is type(packed)
    assert all(
        same_bits(a.view(torch.int16), b.view(torch.int16))
        for a, b in zip(matrix.parts, GpuMatrix.of(again, CPU).parts, strict=True)
    )
    assert (again.shape, again.dtype) == (packed.shape, packed.dtype)


def test_other_patterns_are_refused():
    with pytest.raises(InputError, match=r"multiplied on a GPU at 2:4 alone, not at 1:4"):
        GpuMatrix.of(pack(pruned(5, 36, "1:4"), "1:4"), CPU)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(1, 32).bfloat16(), None, r"x is torch.bfloat16 of shape \(1, 32\) on cpu, which does not go with"),
        (torch.zeros(1, 36), None, r"x is torch.float32 of shape \(1, 36\)"),
        (torch.zeros(1, 36, dtype=torch.bfloat16, device="meta"), None, r"on meta, which does not go with"),
        (torch.zeros(1, 36).bfloat16(), torch.zeros(4).bfloat16(), r"bias is torch.bfloat16 of shape \(4,\)"),
        (torch.zeros(1, 36).bfloat16().requires_grad_(), None, r"have no gradient: .* detach x"),
        (
            torch.zeros(1, 36).bfloat16(),
            None,
            r"this packed matrix is on cpu, and multiplied on a GPU alone|by Triton, which is not",
        ),
    ],
)
def test_what_cannot_be_multiplied_is_refused(x, bias, message):
    with pytest.raises(InputError, match=message):
        sparse_linear(x, GpuMatrix.of(pack(pruned(5, 36, "2:4"), "2:4"), CPU), bias)


def test_columns_are_split_where_rows_are_too_few_to_keep_a_gpu_busy():
    assert column_splits(28672, 4096, 1, 132) == 1
    assert column_splits(4096, 14336, 1, 132) == 1
    assert column_splits(1024, 8192, 1, 132) == 4
    assert column_splits(4096, 14336, 16, 132) == 4  # tensor cores take more rows at a time
    assert column_splits(1024, 2048, 16, 132) == 2  # each has 1024 columns at least
    assert column_splits(64, 1 << 20, 1, 132) == 16
    assert column_splits(64, 64, 1, 132) == 1


@needs_gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 300])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_on_a_gpu_at_the_size_of_a_model(rows, bits):
    generator = torch.Generator().manual_seed(rows)
    weight = pruned(1536, 4096, "2:4")
    packed = pack(weight, "2:4") if bits is None else quantise(pack(weight, "2:4"), bits)
    matrix = GpuMatrix.of(packed, torch.device("cuda"))
    stored = unpacked(matrix).double()
    x = torch.randn(rows, 4096, generator=generator).bfloat16().cuda()
    exact, magnitude = x.double() @ stored.T, x.double().abs() @ stored.T.abs()
    # up to two rows integers are not rounded to bfloat16 with their scales
    allowed = 2.0**-8 * exact.abs() + (2.0**-10 if bits else 2.0**-20) * magnitude
    assert ((sparse_linear(x, matrix).double() - exact).abs() <= allowed).all()
