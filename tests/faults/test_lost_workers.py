"""Runs on a Ray cluster of separate processes, some of which are killed: they end with the bytes of any run."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import halve
from halve.checkpoint.durable import CRASH_POINT
from halve.errors import HalveError, InputError
from halve.run.phases import Phase
from halve.workers import roster
from models import decoder, save, tokens
from ray_workers import workers_below

ray = pytest.importorskip("ray", reason="workers need Ray: pip install 'halve[ray]'")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TEXT = [{"input_ids": tokens(2, 16, seed=seed)} for seed in range(6)]
ASKED = {
    "calibration": TEXT,
    "shards": 4,
    "device": "cpu",
    "forward_dtype": "float32",
    "method": "sparsegpt",
    "refit": "cg",
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Nodes:
    """A head and further nodes, each a set of processes of its own."""

    def __init__(self, folder):
        self.address = f"127.0.0.1:{free_port()}"
        self._folder = folder
        self._ours = []
        self.start("--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false")

    def start(self, *options):
        """Start a node with one processor, and return its raylet."""
        before = set(self._raylets())
        command = [str(Path(sys.executable).parent / "ray"), "start", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
        command += ["--disable-usage-stats", "--object-store-memory=100000000", *options]
        environment = {**os.environ, "RAY_TMPDIR": str(self._folder)}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
        (raylet,) = set(self._raylets()) - before
        self._ours.append(raylet)
        return raylet

    def _raylets(self):
        found = psutil.process_iter(["name", "cmdline"])
        named = ((each, each.info["name"] == "raylet", " ".join(each.info["cmdline"] or [])) for each in found)
        return [each for each, is_raylet, line in named if is_raylet and str(self._folder) in line]

    def workers(self):
        """Return the processes of workers on all nodes."""
        return [worker for raylet in self._ours for worker in workers_below(raylet)]

    def stop(self):
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if process in self._ours or self.address in line or str(self._folder) in line:
                process.kill()


@pytest.fixture
def nodes():
    folder = Path("/tmp") / f"ray-{os.getpid()}-{random.randrange(10**6)}"  # noqa: S108 - paths of sockets must be short
    folder.mkdir()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = Nodes(folder)
    yield found
    found.stop()
    torch.set_num_threads(before)
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def written(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


def test_a_node_that_is_removed_takes_nothing_with_it(tmp_path, nodes, monkeypatch):
    source = save(decoder("llama"), tmp_path / "model")
    halve.prune(source, tmp_path / "alone", **ASKED)
    second = nodes.start(f"--address={nodes.address}")
    monkeypatch.setattr(roster, "_STARTS", 5.0)
    killed, notes = [], []

    def listen(step):
        notes.append(step.note)
        if not killed and step.phase is Phase.SOLVE and step.block == 1:
            killed.extend([second, *second.children(recursive=True)])
            for each in killed:
                os.kill(each.pid, signal.SIGKILL)

    done = halve.prune(source, tmp_path / "out", listen=listen, workers=nodes.address, worker_threads=1, **ASKED)
    assert killed
    assert written(tmp_path / "out") == written(tmp_path / "alone")
    assert [each.shards for each in done.report.workers] == [(0, 1, 2, 3)]
    assert "2 workers for 4 shards" in notes
    assert any("was lost, and is replaced" in note for note in notes)


def test_workers_killed_at_random_cost_nothing_but_time(tmp_path, nodes):
    """Seeded; another seed is another test: the times are not those of the first."""
    source = save(decoder("llama"), tmp_path / "model")
    halve.prune(source, tmp_path / "alone", **ASKED)
    nodes.start(f"--address={nodes.address}")
    chance, killed = random.Random(0), []

    def listen(step):
        chosen = step.matrix is None and step.blocks and len(killed) < 4 and chance.random() < 0.3
        if chosen and (workers := nodes.workers()):
            killed.append(chance.choice(workers))
            time.sleep(chance.random() / 5)
            killed[-1].kill()

    halve.prune(source, tmp_path / "out", listen=listen, workers=nodes.address, worker_threads=1, **ASKED)
    assert killed
    assert written(tmp_path / "out") == written(tmp_path / "alone")


OFTEN = ("worker.collect.done@2", "worker.solve.start@2")
POINTS = (*OFTEN, "worker.collect.start@2", "worker.solve.done@2")


@pytest.mark.parametrize(
    "point", [pytest.param(each, marks=() if each in OFTEN else pytest.mark.slow) for each in POINTS]
)
def test_workers_that_die_at_every_named_point_cost_nothing_but_time(tmp_path, monkeypatch, point):
    """Every worker dies there, those that take the place of others too, so that each block loses one or more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    source, notes = save(decoder("llama"), tmp_path / "model"), []
    halve.prune(source, tmp_path / "alone", **ASKED)
    monkeypatch.setenv(CRASH_POINT, point)
    try:
        halve.prune(source, tmp_path / "out", workers=2, listen=lambda step: notes.append(step.note), **ASKED)
    finally:
        torch.set_num_threads(before)
    assert any("was lost, and is replaced" in note for note in notes), point
    assert written(tmp_path / "out") == written(tmp_path / "alone")


def test_workers_that_always_die_stop_the_run_in_a_sentence_and_it_goes_on_without(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    source, out = save(decoder("llama"), tmp_path / "model"), tmp_path / "out"
    try:
        halve.prune(source, tmp_path / "alone", **ASKED)
        with monkeypatch.context() as patch:
            patch.setenv(CRASH_POINT, "worker.advance.start@1")
            with pytest.raises(HalveError, match="4 workers were lost at one block") as caught:
                halve.prune(source, out, workers=1, **ASKED)
        assert caught.value.unfinished == out
        assert halve.prune(source, out, **ASKED).report.resumed_blocks == 1
    finally:
        torch.set_num_threads(before)
    assert written(out) == written(tmp_path / "alone")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", r"the cluster at 127\.0\.0\.1:1 cannot be reached"),
        ("ray://127.0.0.1:1", r"the cluster at ray://127\.0\.0\.1:1 cannot be reached"),
        ("four", "workers = 'four' is neither a number nor an address"),
    ],
)
def test_an_address_where_nothing_listens_is_refused(tmp_path, address, sentence):
    source = save(decoder("llama"), tmp_path / "model")
    with pytest.raises(InputError, match=sentence):
        halve.prune(source, tmp_path / "out", workers=address, **ASKED)
    assert not (tmp_path / "out").exists()
