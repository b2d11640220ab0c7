import pytest
import torch

from halve import memory
from halve.errors import InputError
from halve.memory import available_memory, check_memory, free_memory


def test_what_is_available_is_what_the_system_says(tmp_path, monkeypatch):
    free = available_memory()
    assert free is None or 1e6 < free < 1e15
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert available_memory() is None
    check_memory("giants", 1 << 80, "do less")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   3 kB\nSwapFree: 1 kB\n")
    assert available_memory() == 3072
    check_memory("dwarfs", 3072, "do less")
    with pytest.raises(InputError, match=r"^giants need 5\.0 GB and 0\.0 GB of memory are available: do less$"):
        check_memory("giants", 5 * 10**9, "do less")


def test_what_pytorch_keeps_on_a_gpu_is_free_too(monkeypatch):
    gpu = torch.device("cuda", 1)
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 70), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value if device == gpu else None)
    assert free_memory(gpu) == 140
    check_memory("dwarfs", 140, "do less", gpu)
    with pytest.raises(InputError, match=r"^giants need"):
        check_memory("giants", 141, "do less", gpu)
