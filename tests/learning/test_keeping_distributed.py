"""Kept masks in two processes: the same bytes as in one process that accumulates both batches before each step.

Every scenario of ``kept_processes.py`` is started once; its processes meet at a file, not at a port.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kept_processes
from kept_models import assert_kept, pruned_decoder, zeros

HERE = Path(__file__).parents[1]
PATIENCE = 300
"""Seconds that a scenario may take on a busy machine; it takes some fifteen."""
TOLERANCE = {"muon": 2e-3, "adafactor": 2e-3}
"""Largest difference of a weight, where sums over a matrix are put together in another order."""


def start(scenario, out, world=kept_processes.WORLD):
    """Run a scenario in so many processes, and return what each of them wrote."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folders = [str(HERE), str(HERE / "learning"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(HERE / "kept_processes.py"), scenario]
    processes = []
    for rank in range(world):
        with (out / f"{rank}.log").open("w") as log:
            each = [*command, str(rank), str(world), str(out / "store"), str(out)]
            processes.append(subprocess.Popen(each, env=environment, stdout=log, stderr=log))
    end = time.monotonic() + PATIENCE
    try:  # where one fails, the other waits for it
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < end, "the processes do not come to an end"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((out / f"{rank}.log").read_text() for rank in range(world))
    assert not any(p.returncode for p in processes), logs[-4000:]
    return [torch.load(out / f"{scenario}-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory):
    out = tmp_path_factory.mktemp("data_parallel")
    return out, start("data_parallel", out)


@pytest.fixture(scope="module")
def fully_sharded(tmp_path_factory):
    return start("fully_sharded", tmp_path_factory.mktemp("fully_sharded"))


@pytest.fixture(scope="module")
def alone():
    return {name: kept_processes.alone(name) for name in kept_processes.OPTIMISERS}


def assert_same_training(found, expected, name):
    """Check what each process ended with against one process alone, and that the training went anywhere."""
    before, start_at = zeros(pruned_decoder()), dict(pruned_decoder().named_parameters())
    for state in found:
        assert state.keys() == expected.keys()
        for key, weight in state.items():
            if name in kept_processes.ELEMENTWISE:
                assert torch.equal(weight, expected[key]), key
            else:
                assert (weight - expected[key]).abs().max() <= TOLERANCE[name], key
            if key in before:
                assert not bool((weight[before[key]] != 0).any()), key
                assert (weight - start_at[key]).abs().max() > 2 * TOLERANCE.get(name, 0.0), key


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", kept_processes.OPTIMISERS)
def test_data_parallel_is_one_process_with_two_steps(name, when, data_parallel, alone):
    """Through accelerate; the masks are kept before or after the model is prepared."""
    assert_same_training([found[f"{name} {when}"] for found in data_parallel[1]], alone[name], name)


def test_the_trainer_in_two_processes(data_parallel):
    out, found = data_parallel
    model = pruned_decoder()
    before = zeros(model)
    for state in found:
        model.load_state_dict(state["trainer"])
        assert_kept(model, before)
    assert sorted(path.parent.name for path in out.rglob("halve.masks")) == ["checkpoint-2", "trainer"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", kept_processes.SHARDED)
def test_fully_sharded_is_one_process_with_two_steps(name, when, fully_sharded, alone):
    """By fully_shard, which replaces the parameters: hooks that were set before it are lost.

    The processes also look at rows that are not shared alike, at saved masks, and that FSDP of the first version is
    refused.
    """
    assert_same_training([found[f"{name} {when}"] for found in fully_sharded], alone[name], name)


@pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="accelerate's own FSDP2 shards on accelerators only: there is none"
)
def test_accelerates_own_fsdp2(tmp_path):
    world = min(kept_processes.WORLD, torch.accelerator.device_count())
    assert len(start("accelerated", tmp_path, world)) == world
