"""A worker in this process, without Ray: what it is told and what it answers are messages all the same."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from halve.checkpoint.load import resolve
from halve.errors import HalveError, ResumeMismatchError
from halve.maths.gram import GramAccumulator
from halve.provenance import deciding_environment, flat, source_fields
from halve.run.request import Request
from halve.serial import to_plain
from halve.workers import terms
from halve.workers.messages import pack, unpack
from halve.workers.worker import Worker, must_agree
from models import tokens


def charge(model, scratch, *, mark=None, path=None, shards=((0, 2), (2, 3)), files=None):
    """Return the message with which a worker is hired for three batches."""
    source = resolve(model)
    environment = {name: str(value) for name, value in flat("environment", deciding_environment()).items()}
    found = terms.Charge(
        request=to_plain(Request.of({"method": "wanda", "refit": "none", "device": "cpu", "forward_dtype": "float32"})),
        model=str(path or model),
        mark=must_agree({**environment, **source_fields(source), **(mark or {})}),
        files=files or {each.name: each.stat().st_size for each in source.path.iterdir()},
        threads=torch.get_num_threads(),
        batches=3,
        shards=list(shards),
        scratch=str(scratch),
        collect=True,
        fixed=[],
        together=[],
        neighbours=1,
    )
    batches = {f"{number}.input_ids": tokens(2, 8, seed=number) for number in range(3)}
    return pack(terms.plain(found), batches)


def told(message, kind=terms.Answer):
    answer, tensors = unpack(message, kind)
    terms.check(answer)
    return answer, tensors


@pytest.fixture
def worker(llama, tmp_path):
    found = Worker()
    told(found.hire(charge(llama, tmp_path / "scratch")))
    yield found
    found.close()


def sums_of(worker, shards):
    told(worker.open(shards))
    collected, _ = told(worker.collect(0), terms.Collected)
    return collected.parts, {
        (part.first, leader): worker.sums(part.first, leader) for part in collected.parts for leader in part.sums
    }


def test_leading_shards_are_summed_to_one_as_the_driver_would(llama, tmp_path, worker):
    parts, all_at_once = sums_of(worker, [0, 1])
    assert [part.first for part in parts] == [0]
    other = Worker()
    told(other.hire(charge(llama, tmp_path / "other")))
    first, one_by_one = sums_of(other, [0])
    told(other.open([1]))
    second, _ = told(other.collect(0), terms.Collected)
    assert [part.first for part in (*first, *second.parts)] == [0, 1]
    for leader in parts[0].sums:
        summed, tensors = told(all_at_once[0, leader], terms.Summed)
        total = None
        for message in (one_by_one[0, leader], other.sums(1, leader)):
            each, own = told(message, terms.Summed)
            accumulator = GramAccumulator.of(
                leader, each.d_in, each.counts, {name: t.clone() for name, t in own.items()}
            )
            total = accumulator if total is None else total
            if total is not accumulator:
                total.absorb(accumulator)
        assert list(total.counts) == summed.counts == [48]
        assert torch.equal(total.tensors["sum0"], tensors["sum0"])
    other.close()


def test_what_is_solved_has_the_pattern_and_says_how(worker):
    parts, messages = sums_of(worker, [0, 1])
    name = "model.layers.0.mlp.down_proj.weight"
    assert parts[0].leaders[name] == name
    task = pack({"block": 0, "matrices": [name], "options": {}, "orders": []})
    answer, tensors = told(worker.solve(task, [messages[0, name]]), terms.Solved)
    (outcome,) = answer.outcomes_with(tensors)
    assert outcome.method == "wanda"
    assert outcome.facts["tokens"] == 48
    assert ((outcome.weight.reshape(-1, 4) != 0).sum(-1) <= 2).all()


def test_another_version_is_refused_by_name(llama, tmp_path):
    answer = Worker().hire(charge(llama, tmp_path / "scratch", mark={"environment.torch": "1.0"}))
    with pytest.raises(ResumeMismatchError, match=r"is not like the driver.*environment\.torch was 1\.0 and is"):
        told(answer)


def test_other_weights_are_refused(llama, tmp_path):
    worker = Worker()
    told(worker.hire(charge(llama, tmp_path / "scratch", mark={"model.model.safetensors": "0" * 64})))
    with pytest.raises(ResumeMismatchError, match=r"model\.model\.safetensors was 000000000000… and is"):
        told(worker.open([0]))


def test_the_version_of_the_system_may_differ(llama, tmp_path):
    worker = Worker()
    told(worker.hire(charge(llama, tmp_path / "scratch", mark={"environment.platform": "another kernel"})))
    worker.close()


def test_a_model_that_is_not_on_this_disk_is_received(llama, tmp_path):
    worker = Worker()
    answer, _ = told(worker.hire(charge(llama, tmp_path / "scratch", path=tmp_path / "elsewhere")), terms.Hired)
    assert answer.needs_files
    for path in llama.iterdir():
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for half in np.array_split(content, 2):
            told(worker.receive(path.name, half))
    parts, _ = sums_of(worker, [1])
    assert [part.first for part in parts] == [1]
    with pytest.raises(HalveError, match="is no file of the model"):
        told(worker.receive("../../other", content))
    worker.close()
    assert not any((tmp_path / "scratch").iterdir())


def test_a_worker_that_was_never_hired_removes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").write_text("")
    Worker().close()
    assert (tmp_path / "kept").exists()


def test_what_killed_workers_left_is_removed_by_the_next_one(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"halve-worker-{2**22 + 1}-x" / "model").mkdir(parents=True)
    mine = tmp_path / f"halve-worker-{os.getppid()}-y"
    mine.mkdir()
    worker = Worker()
    told(worker.hire(charge(llama, "")))
    assert [path.name.split("-")[2] for path in sorted(tmp_path.glob("halve-worker-*"))] == sorted(
        [str(os.getpid()), str(os.getppid())]
    )
    worker.close()
    assert list(tmp_path.glob("halve-worker-*")) == [mine]


def test_a_full_disk_is_told_as_such(llama, tmp_path, monkeypatch):
    worker = Worker()
    told(worker.hire(charge(llama, tmp_path / "scratch", path=tmp_path / "elsewhere")), terms.Hired)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(HalveError, match=r"could not read or write a file .*No space left"):
        told(worker.receive("config.json", np.zeros(3, dtype=np.uint8)))


def test_another_kind_of_gpu_is_refused(llama, tmp_path):
    answer = Worker().hire(charge(llama, tmp_path / "scratch", mark={"device": "NVIDIA A100"}))
    with pytest.raises(ResumeMismatchError, match="device was NVIDIA A100 and is cpu"):
        told(answer)


def test_a_model_that_was_damaged_on_its_way_is_refused(llama, tmp_path):
    worker = Worker()
    told(worker.hire(charge(llama, tmp_path / "scratch", path=tmp_path / "elsewhere")), terms.Hired)
    for path in llama.iterdir():
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
        content[-1] ^= path.suffix == ".safetensors"
        told(worker.receive(path.name, content))
    with pytest.raises(ResumeMismatchError, match=r"model\.safetensors"):
        told(worker.open([0]))


def test_a_worker_that_was_told_nothing_says_so():
    with pytest.raises(HalveError, match="was not told what to work on"):
        told(Worker().open([0]))


def test_a_worker_leaves_the_weights_on_disk(worker):
    told(worker.open([0]))
    assert worker._sites[0].job.weights.mapped
