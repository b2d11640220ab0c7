import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from halve import memory
from halve.errors import InputError
from halve.memory import available_memory, check_memory, free_memory, peak_memory, would_fill


def test_what_is_available_is_what_the_system_says(monkeypatch):
    assert 1e6 < available_memory() < 1e15
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=9216, available=3072, free=1024))
    assert available_memory() == 3072
    check_memory("dwarfs", 3072, "do less")
    with pytest.raises(InputError, match=r"^giants need 5\.0 GB and 0\.0 GB of memory are available: do less$"):
        check_memory("giants", 5 * 10**9, "do less")


@pytest.mark.parametrize(
    ("limit", "used", "stat", "expected"),
    [
        ("1000", "700", "anon 5\ninactive_file 200", 500),
        ("1000", "700", "inactive_file 100\nactive_file 150", 550),
        ("1000", "700", "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 20", 420),
        ("1000", "1200", "anon 5", 0),
        ("max", "700", "anon 5", 3072),
        ("9000", "700", "anon 5", 3072),  # the machine has less
    ],
)
@pytest.mark.parametrize("group", [0, 1])
def test_a_container_may_have_less(monkeypatch, tmp_path, group, limit, used, stat, expected):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=3072))
    named = [(tmp_path / str(number), *names) for number, (_, *names) in enumerate(memory._GROUPS)]
    monkeypatch.setattr(memory, "_GROUPS", named)
    folder, of_limit, of_use = named[group]
    folder.mkdir()
    for name, text in ((of_limit, limit), (of_use, used), ("memory.stat", stat)):
        (folder / name).write_text(text + "\n")
    assert available_memory() == expected


def test_half_of_what_is_free_would_fill_it(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert not would_fill(500)
    assert would_fill(501)


def test_what_pytorch_keeps_on_a_gpu_is_free_too(monkeypatch):
    gpu = torch.device("cuda", 1)
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 70), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value if device == gpu else None)
    assert free_memory(gpu) == 140
    check_memory("dwarfs", 140, "do less", gpu)
    with pytest.raises(InputError, match=r"^giants need"):
        check_memory("giants", 141, "do less", gpu)


def test_the_peak_stays_after_the_memory_is_given_back_and_is_in_bytes():
    program = """
import psutil
from halve.memory import peak_memory
before = peak_memory()
held = bytearray(300_000_000)
held[::4096] = b"x" * len(held[::4096])
held_at_once = psutil.Process().memory_info().rss
del held
print(before, held_at_once, peak_memory())
"""
    # The shell in between is small: what is started begins with the peak of whoever starts it.
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, held_at_once, peak = map(int, done.stdout.split())
    assert peak - before > 250e6
    assert peak == pytest.approx(held_at_once, rel=0.05)  # the kernel counts pages in batches


def test_macos_counts_the_peak_in_bytes(monkeypatch):
    monkeypatch.setattr(memory.resource, "getrusage", lambda _who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert peak_memory() == 5000
    monkeypatch.setattr(memory.sys, "platform", "linux")
    assert peak_memory() == 5000 * 1024
