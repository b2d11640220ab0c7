"""Workers on Ray give the bytes of a run without them, whatever happens to them."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import halve
from halve.errors import HalveError, InputError, ResumeMismatchError
from halve.run.bundles import bundles
from halve.run.phases import Phase
from halve.workers import crew, roster
from halve.workers.worker import Worker
from models import decoder, encoder_decoder, pairs, resnet, save, tokens
from ray_workers import workers_below
from test_convolutions import pictures

ray = pytest.importorskip("ray", reason="workers need Ray: pip install 'halve[ray]'")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TEXT = [{"input_ids": tokens(2, 16, seed=seed)} for seed in range(6)]
ASKED = {"calibration": TEXT, "shards": 4, "device": "cpu", "forward_dtype": "float32"}
WANDA = {"method": "wanda", "refit": "cg", **ASKED}
REORDERED = {"method": "sparsegpt", "permute": "fold", **ASKED}


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """One cluster for all tests of this file, as a user may have one already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()
    torch.set_num_threads(before)


def written(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


def facts(pruned):
    """What is on record of a run but for its times."""
    return [
        pruned.record.get(name)
        for name in ("matrices", "blocks", "excluded", "warnings", "environment", "calibration", "orders")
    ]


def workers_at_work():
    """Return the processes of this test's workers."""
    return workers_below(psutil.Process())


FAMILIES = {
    "wanda": (lambda: decoder("llama"), WANDA),
    "auto": (lambda: decoder("llama_tied"), {"method": "auto", "effort": "fast", **ASKED}),
    "experts": (lambda: decoder("mixtral"), {**WANDA, "min_expert_tokens": 1, "fallback": "magnitude"}),
    "two stacks": (
        lambda: encoder_decoder("t5"),
        {**WANDA, "calibration": [pairs("t5", seed=seed) for seed in range(3)], "match_dense": 0.3},
    ),
    "reconstructed": (
        lambda: decoder("llama"),
        {**WANDA, "reconstruct": halve.Reconstruction(epochs=1, learning_rate=1e-3)},
    ),
    "where faster": (lambda: decoder("llama"), {**WANDA, "only_where_faster": 0.01}),
    "reordered": (lambda: decoder("llama"), REORDERED),
    "reordered and reconstructed": (
        lambda: decoder("llama"),
        {**REORDERED, "reconstruct": halve.Reconstruction(epochs=1, learning_rate=1e-3)},
    ),
    "convolutions reordered": (
        resnet,
        {**REORDERED, "refit": "none", "calibration": pictures(4), "batch_norm": "keep", "shards": 2},
    ),
    "keep dense": (lambda: decoder("llama"), {**WANDA, "keep_dense": "20%"}),
    "without data": (lambda: decoder("llama"), {"method": "magnitude", "refit": "none", "device": "cpu"}),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, kind):
    make, asked = FAMILIES[kind]
    source = save(make(), tmp_path / "model", max_shard_size="60KB")
    alone = halve.prune(source, tmp_path / "alone", **asked)
    for count in (1, 3) if kind == "wanda" else (2,):
        shared = halve.prune(source, tmp_path / f"{count}", workers=count, worker_threads=1, **asked)
        assert written(tmp_path / f"{count}") == written(tmp_path / "alone")
        page = (tmp_path / f"{count}" / "report.html").read_text()
        assert facts(shared) == facts(alone)
        assert len(shared.report.workers) == count
        assert page.count('<th scope="row">') > count
        assert 'id="workers"' in page
        assert not (tmp_path / f"{count}" / ".halve").exists()


def test_matrices_that_share_inputs_may_be_pruned_apart(tmp_path, llama, monkeypatch):
    """As those of large models are: who prunes one finds the sums under the name of another."""
    monkeypatch.setattr("halve.run.loop.bundles", partial(bundles, most=1))
    asked = {**WANDA, "method": "sparsegpt"}
    halve.prune(llama, tmp_path / "alone", **asked)
    halve.prune(llama, tmp_path / "out", workers=2, **asked)
    assert written(tmp_path / "out") == written(tmp_path / "alone")


def test_workers_that_die_while_channels_are_reordered_cost_nothing_but_time(tmp_path, llama):
    alone = halve.prune(llama, tmp_path / "alone", **REORDERED)
    assert {order["block"] for order in alone.record["orders"]} == {f"model.layers.{block}" for block in range(3)}
    listen = killing(Phase.REORDER, 1, how_many=2)
    shared = halve.prune(llama, tmp_path / "out", workers=2, worker_threads=1, listen=listen, **REORDERED)
    assert listen.done
    assert facts(shared) == facts(alone)
    assert written(tmp_path / "out") == written(tmp_path / "alone")


@pytest.mark.parametrize("phase", [Phase.RECONSTRUCT, Phase.COLLECT])
def test_the_one_that_reconstructs_may_die(tmp_path, llama, phase):
    asked = {**WANDA, "reconstruct": halve.Reconstruction(epochs=1, learning_rate=1e-3)}
    halve.prune(llama, tmp_path / "alone", **asked)
    listen = killing(phase, 1, how_many=2)
    halve.prune(llama, tmp_path / "out", workers=2, listen=listen, **asked)
    assert listen.done
    assert written(tmp_path / "out") == written(tmp_path / "alone")


def test_shards_decide_the_last_bits_and_are_on_record(tmp_path, llama):
    one = halve.prune(llama, tmp_path / "1", **{**WANDA, "shards": 1})
    four = halve.prune(llama, tmp_path / "4", **WANDA)
    assert (one.record["calibration"]["shards"], four.record["calibration"]["shards"]) == (1, 4)
    assert four.report.mean_relative_loss == pytest.approx(one.report.mean_relative_loss, rel=1e-3)
    assert written(tmp_path / "1") != written(tmp_path / "4")


def killing(phase, block, number=0, how_many=1):
    """Return a listener that kills workers when a phase of a block begins, once."""
    done = []

    def listen(step):
        if not done and step.phase == phase and step.block == block and step.matrix is None:
            done.append(step)
            found = workers_at_work()
            if phase is not Phase.CAPTURE:
                assert found
            for each in found[number : number + how_many]:
                os.kill(each.pid, signal.SIGKILL)

    listen.done = done
    return listen


@pytest.mark.parametrize(
    ("phase", "block"), [(Phase.COLLECT, 0), (Phase.COLLECT, 2), (Phase.REPLAY, 1), (Phase.RESTORE, 0)]
)
def test_a_worker_that_is_killed_costs_nothing_but_time(tmp_path, llama, phase, block):
    halve.prune(llama, tmp_path / "alone", **WANDA)
    out, options = tmp_path / "out", {**WANDA, "workers": 2, "worker_threads": 1}
    if phase is Phase.RESTORE:  # a run that goes on, with workers that are at the beginning
        with pytest.raises(KeyboardInterrupt):
            halve.prune(llama, out, listen=stopping_at(2), **options)
        phase, block = Phase.COLLECT, 2
    listen = killing(phase, block)
    done = halve.prune(llama, out, listen=listen, **options)
    assert listen.done
    assert written(out) == written(tmp_path / "alone")
    assert max(each.number for each in done.report.workers) == 2  # the third one took the place of the first


def stopping_at(block):
    def stop(step):
        if step.block == block:
            raise KeyboardInterrupt

    return stop


def test_a_run_goes_on_with_workers_or_without(tmp_path, llama):
    halve.prune(llama, tmp_path / "alone", **WANDA)
    for name, first, then in (
        ("a", {"workers": 2}, {}),
        ("b", {}, {"workers": 1}),
        ("c", {"workers": 1}, {"workers": 2}),
    ):
        out = tmp_path / name
        with pytest.raises(KeyboardInterrupt):
            halve.prune(llama, out, listen=stopping_at(2), **WANDA, **first)
        assert halve.prune(llama, out, **WANDA, **then).report.resumed_blocks == 2
        assert written(out) == written(tmp_path / "alone")


def test_a_run_is_resumed_with_other_workers_than_it_began_with(tmp_path, checkpoint, text):
    asked = {"method": "wanda", "calibration": text, "samples": 6, "seq_len": 32}
    halve.prune(checkpoint, tmp_path / "alone", **asked)
    for name, first, then in (
        ("a", {"workers": 2}, {"workers": "none"}),
        ("b", {}, {"workers": 2, "worker_threads": 1}),
        ("c", {"workers": 1, "worker_threads": 1}, {"workers": 2}),
        ("d", {"workers": 2}, {}),
    ):
        out = tmp_path / name
        with pytest.raises(KeyboardInterrupt):
            halve.prune(checkpoint, out, listen=stopping_at(2), **asked, **first)
        done = halve.resume(out, **then)
        assert done.report.resumed_blocks == 2
        assert len(done.report.workers) == (0 if name == "a" else 2)
        assert written(out) == written(tmp_path / "alone")
    with pytest.raises(InputError, match="worker_threads is of other workers, and workers names none: give both"):
        halve.resume(tmp_path / "d", worker_threads=1)


def test_shards_of_a_worker_that_nothing_can_replace_go_to_the_others(tmp_path, llama, monkeypatch):
    halve.prune(llama, tmp_path / "alone", **WANDA)
    real = roster.Roster.hire

    def unplaced(self):
        member = real(self)
        if member.number >= 2:
            member.hand.kill()
        return member

    monkeypatch.setattr(roster.Roster, "hire", unplaced)
    out, listen = tmp_path / "out", killing(Phase.COLLECT, 1, number=1)
    done = halve.prune(llama, out, listen=listen, workers=2, **WANDA)
    assert listen.done
    assert [sorted(each.shards) for each in done.report.workers] == [[0, 1, 2, 3]]
    assert written(out) == written(tmp_path / "alone")


def test_a_worker_that_hangs_does_not_stop_the_block(tmp_path, llama, monkeypatch):
    halve.prune(llama, tmp_path / "alone", **WANDA)
    monkeypatch.setattr(roster, "_PATIENCE", 2.0)
    stopped = []

    def listen(step):
        if not stopped and step.phase is Phase.COLLECT and step.block == 1:
            stopped.extend(workers_at_work()[:1])
            os.kill(stopped[0].pid, signal.SIGSTOP)

    halve.prune(llama, tmp_path / "out", listen=listen, workers=2, **WANDA)
    assert stopped
    assert written(tmp_path / "out") == written(tmp_path / "alone")


def test_sums_that_are_lost_are_summed_again(tmp_path, llama, monkeypatch):
    halve.prune(llama, tmp_path / "alone", **WANDA)
    real, lost = crew.unpack, []

    def losing(message, kind):
        answer, tensors = real(message, kind)
        if kind is crew.terms.Solved and not lost:
            lost.append(answer)
            answer = kind(failed=(crew.terms.LOST, "0"))
        return answer, tensors

    monkeypatch.setattr(crew, "unpack", losing)
    halve.prune(llama, tmp_path / "out", workers=2, **WANDA)
    assert lost
    assert written(tmp_path / "out") == written(tmp_path / "alone")


def test_a_full_store_stops_the_run_in_a_sentence_and_it_goes_on(tmp_path, llama, monkeypatch):
    halve.prune(llama, tmp_path / "alone", **WANDA)
    real, put = ray.put, []

    def full(message):
        put.append(message)
        if len(put) == 3:
            raise ray.exceptions.ObjectStoreFullError("no room")
        return real(message)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ray, "put", full)
        with pytest.raises(HalveError, match="Ray's object store is full") as caught:
            halve.prune(llama, out, workers=2, **WANDA)
    assert caught.value.unfinished == out
    halve.prune(llama, out, workers=2, **WANDA)
    assert written(out) == written(tmp_path / "alone")


def test_an_error_of_a_worker_is_told_as_the_driver_would(tmp_path):
    model = decoder("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(1e30)
    source = save(model, tmp_path / "model")
    messages = []
    for more in ({}, {"workers": 2}):
        with pytest.raises(HalveError) as caught:
            halve.prune(source, tmp_path / f"out{len(messages)}", **WANDA, **more)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


def test_workers_of_another_kind_are_refused(tmp_path, llama, monkeypatch):
    real = Worker.hire

    def different(charge):
        return {**charge, "environment.torch": "1.0"}

    monkeypatch.setattr("halve.workers.hiring.must_agree", different)
    with pytest.raises(ResumeMismatchError, match="is not like the driver"):
        halve.prune(llama, tmp_path / "out", workers=1, **WANDA)
    assert Worker.hire is real


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": 0}, "workers must be"),
        ({"workers": 2, "worker_threads": 0}, "worker_threads must be"),
        ({"worker_threads": 2}, "worker_threads is of workers, and workers is not given"),
        ({"workers": 99, "worker_threads": 1}, "asks for 99 with 1 CPU thread each, and the cluster has room for 4"),
        ({"workers": 1, "offload": "."}, "offload is a place of one process"),
        ({"workers": 1, "method": "gblm"}, "gblm takes backward passes, which are for one process: leave workers out"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, llama, options, sentence):
    with pytest.raises(InputError, match=sentence):
        halve.prune(llama, tmp_path / "out", **{**WANDA, "refit": "none", **options})
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_is_refused(tmp_path):
    with pytest.raises(InputError, match="workers read the model from a disk"):
        halve.prune(decoder("llama"), tmp_path / "out", workers=1, **WANDA)


def test_batch_norms_that_are_estimated_anew_are_refused_before_workers_are_hired(tmp_path):
    source = save(resnet(), tmp_path / "dense")
    with pytest.raises(InputError, match=r"estimated anew in one process: leave workers out, or keep the statistics"):
        halve.prune(source, tmp_path / "out", calibration=pictures(), method="wanda", workers=2)


def test_the_cluster_of_a_command_has_the_token_of_its_user(tmp_path, llama):
    """The default of Ray, which the other tests switch off."""
    shared = {**os.environ, "HOME": str(tmp_path)}
    del shared["RAY_AUTH_MODE"]
    command = [sys.executable, "-m", "halve", "prune", llama, "--out", tmp_path / "out", "--device", "cpu"]
    command += ["--method", "magnitude", "--refit", "none", "--workers", "1", "--worker-threads", "1"]
    done = subprocess.run(command, env=shared, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    halve.prune(llama, tmp_path / "alone", method="magnitude", refit="none", device="cpu")
    assert written(tmp_path / "out") == written(tmp_path / "alone")
