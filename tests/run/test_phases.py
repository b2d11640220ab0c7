import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from halve.run.phases import Phases

CPU = torch.device("cpu")


def test_seconds_add_up_by_phase_and_phases_keep_their_order():
    phases = Phases(CPU)
    for phase in ("solve", "collect", "solve"):
        with phases.timing(phase):
            time.sleep(0.05)
    assert list(phases.seconds) == ["solve", "collect"]
    assert 0.1 <= phases.seconds["solve"] < 1.0
    assert 0.05 <= phases.seconds["collect"] < phases.seconds["solve"]


def test_the_peak_within_a_phase_is_seen_though_it_is_over_at_its_end(monkeypatch):
    # Not this process's memory, which other tests and the system change meanwhile.
    resident = [10**9]
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=resident[0]))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    phases = Phases(CPU)
    with phases.timing("before"):
        pass
    with phases.timing("large"):
        resident[0] += 240 * 10**6
        time.sleep(0.2)
        resident[0] -= 240 * 10**6
    with phases.timing("after"):
        pass
    assert phases.peak_memory["large"] - phases.peak_memory["before"] > 200e6
    assert phases.peak_memory["large"] - phases.peak_memory["after"] > 200e6
    assert phases.peak_device_memory == {}


def test_time_before_a_failure_counts():
    phases = Phases(CPU)

    def fail():
        with phases.timing("solve"):
            time.sleep(0.02)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert phases.seconds["solve"] >= 0.02


def test_what_an_earlier_process_took_is_counted_once():
    first, second = Phases(CPU), Phases(CPU)
    with first.timing("load"):
        pass
    first.seconds = {"load": 1.0, "solve": 2.0}
    first.peak_memory = {"solve": 500}
    one = first.take()
    first.seconds["solve"] = 5.0
    two = first.take()
    assert (one["seconds"], two["seconds"]) == ({"load": 1.0, "solve": 2.0}, {"load": 0.0, "solve": 3.0})
    second.seconds = {"load": 1.5}
    second.peak_memory = {"solve": 100, "load": 50}
    second.add(one)
    second.add(two)
    assert second.seconds == {"load": 2.5, "solve": 5.0}
    assert second.peak_memory == {"solve": 500, "load": 50}
    assert second.take()["seconds"] == {"load": 1.5, "solve": 0.0}  # what was added is not this process's
