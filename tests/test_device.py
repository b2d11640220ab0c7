from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from halve import device
from halve.device import (
    autocast,
    compute_dtype,
    evaluation_mode,
    forward_precision,
    model_device,
    on_device,
    parse_dtype,
    processor_maker,
    resolve_device,
    weight_dtype,
)
from halve.errors import InputError

CPU = torch.device("cpu")


def fake_cpu(monkeypatch, *, amx, avx512):
    known = {"amx_bf16": amx, "avx512_bf16": avx512}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)


def test_auto_is_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


def test_literal_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cpu") == CPU
    assert resolve_device(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"'cuda:2' is not present: torch sees 2"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"'cuda' is not present"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "mps", "meta", "cuda:", "cuda:-1"])
def test_unknown_device(name):
    with pytest.raises(InputError, match="not understood"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("amx", "avx512", "maker", "expected"),
    [
        (True, False, "GenuineIntel", torch.bfloat16),
        (True, True, "GenuineIntel", torch.bfloat16),
        (True, True, "", torch.bfloat16),
        (False, True, "AuthenticAMD", torch.bfloat16),
        (False, True, "GenuineIntel", torch.float32),  # AMX hidden by a virtual machine: float32 is twice as fast
        (False, True, "", torch.float32),
        (False, False, "AuthenticAMD", torch.float32),
    ],
)
def test_a_cpu_with_fast_bfloat16_units_uses_them(monkeypatch, amx, avx512, maker, expected):
    fake_cpu(monkeypatch, amx=amx, avx512=avx512)
    monkeypatch.setattr(device, "processor_maker", lambda: maker)
    assert compute_dtype(CPU) == expected


@pytest.mark.parametrize(
    ("told", "maker"),
    [
        ("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n", "GenuineIntel"),
        ("vendor_id\t: AuthenticAMD\n", "AuthenticAMD"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", ""),
    ],
)
def test_the_maker_of_the_processor(monkeypatch, told, maker):
    monkeypatch.setattr(Path, "exists", lambda _path: True)
    monkeypatch.setattr(Path, "read_text", lambda _path: told)
    assert processor_maker.__wrapped__() == maker


def test_the_maker_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _path: False)
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD")
    assert processor_maker.__wrapped__() == "AuthenticAMD"
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert processor_maker.__wrapped__() == ""


def test_a_cpu_without_bfloat16_units(monkeypatch):
    fake_cpu(monkeypatch, amx=False, avx512=False)
    assert compute_dtype(CPU) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    for query in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, query, raising=False)
    assert compute_dtype(CPU) == torch.float32


@pytest.mark.parametrize("query", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_an_old_torch_is_asked_in_its_own_way(monkeypatch, query):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(device, "processor_maker", lambda: "AuthenticAMD")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == query, raising=False)
    assert compute_dtype(CPU) == torch.bfloat16


def test_other_devices(monkeypatch):
    asked = {}

    def supported(**arguments):
        asked.update(arguments)
        return True

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16
    assert asked == {"including_emulation": False}
    assert compute_dtype(torch.device("meta")) == torch.float32


def test_forward_precision(monkeypatch):
    fake_cpu(monkeypatch, amx=False, avx512=False)
    assert forward_precision("auto", CPU) == torch.float32
    assert forward_precision("bfloat16", CPU) == torch.bfloat16
    fake_cpu(monkeypatch, amx=True, avx512=False)
    assert forward_precision("auto", CPU) == torch.bfloat16
    assert forward_precision("float32", CPU) == torch.float32
    with pytest.raises(InputError, match="forward dtype 'float16' is not understood: choose auto, float32, bfloat16"):
        forward_precision("float16", CPU)


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_lowers_float32_and_restores(frozen):
    model = nn.Linear(8, 8).requires_grad_(not frozen)
    x = torch.randn(2, 8)
    with torch.no_grad(), autocast(model, torch.bfloat16) as used:
        assert used == torch.bfloat16
        assert model(x).dtype == torch.bfloat16
    assert [parameter.requires_grad for parameter in model.parameters()] == [not frozen] * 2
    assert model(x).dtype == torch.float32


def test_autocast_converts_a_frozen_matrix_once():
    """Autocast's copy is kept: a change of the weights meanwhile goes unseen."""
    model = nn.Linear(8, 8, bias=False).requires_grad_(False)
    x = torch.ones(1, 8)
    with torch.no_grad(), autocast(model, torch.bfloat16):
        before = model(x)
        model.weight.zero_()
        assert torch.equal(model(x), before)


def test_autocast_leaves_other_weights_alone():
    x = torch.randn(2, 8, dtype=torch.float64)
    model = nn.Linear(8, 8).double()
    with torch.no_grad(), autocast(model, torch.bfloat16) as used:
        assert used == torch.float64
        assert model(x).dtype == torch.float64
    with autocast(nn.Linear(8, 8).bfloat16(), torch.float32) as used:
        assert used == torch.bfloat16
    with torch.no_grad(), autocast(nn.Linear(8, 8), torch.float32) as used:
        assert used == torch.float32
        assert nn.Linear(8, 8)(x.float()).dtype == torch.float32


def test_weight_dtype_is_the_majority():
    model = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.LayerNorm(8), nn.LayerNorm(8))
    assert weight_dtype(model) == torch.bfloat16
    assert weight_dtype(nn.ReLU()) == torch.float32
    assert model_device(nn.Linear(1, 1, device="meta")).type == "meta"
    assert model_device(nn.ReLU()) == CPU


def test_evaluation_mode_restores_every_module():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.ones(1, 2)).requires_grad
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_evaluation_mode_restores_after_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="shapes"), evaluation_mode(model):
        model(torch.ones(1, 3))
    assert model.training
    assert torch.is_grad_enabled()


def test_a_gpu_is_the_current_one_for_a_while(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(("on", device)))
    with on_device(torch.device("cuda", 1)) as entered:
        assert entered == ("on", torch.device("cuda", 1))
    with on_device(torch.device("cpu")) as entered:
        assert entered is None


def test_dtypes_of_weights_have_names():
    assert parse_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(InputError, match="dtype 'int8' is not known: choose one of float32, bfloat16, float16"):
        parse_dtype("int8")
