"""``bench/gpu_decode.py``: what it says without a GPU, and what needs none of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_decode
from gpu_decode import DENSE, PACKED, Row, check, packed_slab, show, summary
from halve.errors import HalveError
from halve.maths.pattern import Pattern
from halve.runtime.packed_matrix import unpack

SCRIPT = Path(gpu_decode.__file__)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_it_ends_with_one_sentence():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "packed products on a GPU cannot be measured here: torch sees no CUDA GPU\n"


def test_the_shapes_are_those_of_whole_models():
    for model, layers in {"8B": 32, "70B": 80}.items():
        shapes = gpu_decode.MODELS[model]
        assert all(d_out % 64 == 0 and Pattern("2:4").fits(d_in) for d_out, d_in in shapes.values())
        weights = sum(shapes[name][0] * shapes[name][1] for name in ("qkv", "q, o", "gate-up", "down"))
        assert 0.85 < layers * weights / float(model[:-1]) / 1e9 < 1


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_wrong_product_is_told_from_a_right_one(bits):
    slab = packed_slab(64, 5, bits)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = unpack(slab if bits is None else slab.dequantised())
    product = (x.double() @ weight.double().T).bfloat16().repeat(1, 3)[:, :13]
    check(product, x, slab)
    product[2, 12] *= 1.1
    with pytest.raises(HalveError, match=r"shape \(3, 13\) is wrong in 1 elements"):
        check(product, x, slab)


def test_says_how_many_times_as_fast_as_dense():
    rows = [
        Row("8B", name, 64, 64, 1, label, 10 / ratio, 20_000, ratio)
        for name in ("q, o", "down")
        for label, ratio in ((DENSE, 1.0), (PACKED, 1.0 if name == "down" else 4.0))
    ]
    assert summary(rows) == [
        "8B, batch 1, packed: 2.00 times as fast as dense, from 1.00 to 4.00",
        "the aim, 1.4 times dense at batch 1 on the 8B shapes: reached",
    ]
    assert show(rows[0], 4e9).split() == ["8B", "q,", "o", "64x64", "1", "dense", "10.0", "2", "50%", "1.00"]
