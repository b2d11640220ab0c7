import time

import pytest
import torch

from halve.errors import InputError
from halve.runtime import timing
from halve.runtime.timing import Turns, copies_beyond_cache, last_level_cache, take_turns

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def recorded(log, names):
    return {name: [lambda name=name, i=i: log.append((name, i)) for i in range(copies)] for name, copies in names}


def test_contenders_take_turns_and_go_round_their_copies():
    log = []
    found = take_turns(recorded(log, [("a", 2), ("b", 3)]), device=CPU, least=4, most=4)
    assert log == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 2), ("a", 1), ("b", 0), ("a", 0), ("b", 1)]
    assert {name: len(turns.call) for name, turns in found.items()} == {"a": 4, "b": 4}


def test_the_clock_ends_it_after_the_least_rounds():
    log = []
    take_turns(recorded(log, [("a", 1)]), device=CPU, least=3, most=1000, seconds=0)
    assert len(log) == 4
    log.clear()
    take_turns(recorded(log, [("a", 1)]), device=CPU, least=1, most=7, seconds=60)
    assert len(log) == 8


def test_seconds_are_seconds_and_medians_count():
    found = take_turns({"slow": [lambda: time.sleep(0.02)], "fast": [lambda: None]}, device=CPU, least=3, most=3)
    assert 0.02 <= found["slow"].seconds < 0.2
    assert found["fast"].seconds < 0.01
    assert Turns([1, 2, 9], [3, 1, 2]).seconds == 2
    assert Turns([1, 2, 9], [3, 1, 2]).call_seconds == 2


@pytest.mark.parametrize("contenders", [{}, {"a": []}])
def test_nothing_to_time_is_refused(contenders):
    with pytest.raises(InputError, match="nothing to time"):
        take_turns(contenders, device=CPU)


def test_copies_fill_the_caches():
    assert copies_beyond_cache(1 << 20, cache=8 << 20) == 32
    assert copies_beyond_cache(3 << 20, cache=8 << 20) == 11
    assert copies_beyond_cache(1 << 40, cache=8 << 20) == 2


def test_the_cache_is_the_systems_largest(tmp_path, monkeypatch):
    assert last_level_cache() > 1 << 15
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cache"
    monkeypatch.setattr(timing, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert last_level_cache() == 64 << 20
    for index, size in enumerate(["32K", "2M", "nonsense"]):
        (folder / f"index{index}").mkdir(parents=True)
        (folder / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache() == 2 << 20


@needs_gpu
def test_on_a_gpu_the_devices_time_is_within_the_calls():
    x = torch.randn(2048, 2048, device="cuda")
    found = take_turns({"product": [lambda: x @ x]}, device=x.device)
    assert 0 < found["product"].seconds < found["product"].call_seconds
