"""kill -9 while a model is fine-tuned, at every named point and in the middle of a state: the same bytes come out."""

import json
import os
import random
import resource
import shutil
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from halve.checkpoint import durable
from halve.checkpoint.directory import HOME
from halve.errors import AlreadyCompleteError, HalveError
from halve.learning.finetuning import resume_finetuning
from halve.learning.training import course
from halve.learning.training.state import recorded_training
from halve.learning.training.trainer import MaskTrainer
from harness import REFUSED, crash_at, crash_points, failures, forked, loadable, tell, tree
from taught import make_pruned, teach
from test_kills import SAMPLED_OR_ALL

assert MaskTrainer  # imported here, so that no forked process has to


@dataclass(frozen=True)
class Training:
    """What is fine-tuned, and where to; ``call``, ``carry_on`` and ``elsewhere`` are what `harness.failures` needs."""

    model: Path
    out: Path
    options: dict = field(default_factory=dict)

    def elsewhere(self, name):
        return replace(self, out=self.out.with_name(name))

    def call(self):
        teach(self.model, self.out, **{"save_every": 1, **self.options})

    def carry_on(self):
        """Do what a user does after a crash: ``halve resume``, or call again where nothing was begun."""
        try:
            call = recorded_training(self.out)
            if call is None:
                self.call()
            else:
                resume_finetuning(call, self.out)
        except AlreadyCompleteError:
            pass
        except HalveError as error:
            if "holds a finished checkpoint" not in str(error):
                raise


@pytest.fixture(scope="module", autouse=True)
def rare_logs():
    """Log the loss at the last step, and where a state is kept, as a longer training does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "_LOGGED", 1)
        yield


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A training, the crash points that it passes, and what it writes when nothing happens."""
    folder = tmp_path_factory.mktemp("training-kills")
    job = Training(make_pruned(folder), folder / "out")
    points = crash_points(job, folder / "points.txt")
    return job, points, tree(job.out)


def test_the_points_cover_every_kind_of_write(golden):
    _, points, expected = golden
    for point in (
        "manifest.renamed@1",
        "state.written@4",
        "mark.renamed@4",
        "state.unmarked@3",
        "trained.done@4",
        "best.renamed@2",
    ):
        assert point in points
    for point in ("halve.json.start@1", "config.json.renamed@2", "file.renamed@1", "remove.file@1", "remove.done@1"):
        assert point in points
    assert "model.safetensors" in expected


def chosen(points, every):
    """Return all points, or one that chance picks of each kind of file."""
    if every:
        return points
    kinds = {}
    for point in points:
        kinds.setdefault(point.rpartition(".")[0], []).append(point)
    chance = random.Random(0)
    return [chance.choice(same) for same in kinds.values()]


@pytest.mark.parametrize("every", SAMPLED_OR_ALL)
def test_a_kill_at_every_point_costs_nothing_but_time(golden, every):
    job, points, expected = golden
    points = chosen(points, every)
    assert len(points) > 6
    assert failures(job, points, expected) == []
    tell(f"{len(points)} crash points of a training killed at, all survived")


def killed_while_saving(job, name, save):
    """Train until the save of that number, in which a file is half written and the process killed."""
    real, passed = torch.save, [0]

    def half(value, path, *rest, **options):
        real(value, path, *rest, **options)
        if Path(path).name == name:
            passed[0] += 1
            if passed[0] == save:
                os.truncate(path, Path(path).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    job.call()


@pytest.mark.parametrize(("name", "save"), [("optimizer.pt", 1), ("rng_state.pth", 3)])
def test_a_kill_in_the_middle_of_a_state(golden, name, save):
    job, _, expected = golden
    one = job.elsewhere(f"half-{name}")
    assert forked(lambda: killed_while_saving(one, name, save)) == -signal.SIGKILL
    assert (one.out / HOME / f"checkpoint-{save}").is_dir()
    assert not (one.out / HOME / f"checkpoint-{save}" / "whole.json").exists()
    assert forked(one.call) == 0  # the same call goes on as well
    assert tree(one.out) == expected


OTHERWISE = {
    "patience": {"patience": 1, "evaluations": 4, "learning_rate": 0.5, "save_every": 4},
    "trials": {"learning_rate": "auto"},
    "self": {"data": "self", "tokens": 512},
    "masks at rest": {"train": "norms", "save_every": 3, "evaluations": 4},
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_other_trainings_go_on_to_the_same_bytes(golden, kind):
    folder = golden[0].out.with_name(kind)
    folder.mkdir()
    job = replace(golden[0], out=folder / "out", options=OTHERWISE[kind])
    points = crash_points(job, folder / "points.txt")
    expected = tree(job.out)
    record = json.loads((job.out / "halve.json").read_text())["trainings"][0]
    if kind == "patience":
        assert record["steps"] < 4
    last = max(point for point in points if point.startswith("state.done"))
    tried = ["manifest.done@3" if kind == "trials" else "manifest.done@1", last]
    if kind == "masks at rest":  # in the middle between two logs
        tried.append("state.done@1")
    assert failures(job, tried, expected) == []


def test_nothing_is_trained_again_after_a_kill_at_the_end(golden):
    job, _, expected = golden
    one = job.elsewhere("end")
    crash_at("remove.start@1", one.call)

    def resume():
        MaskTrainer.train = None  # calling it would fail
        one.carry_on()

    assert forked(resume) == 0
    assert tree(one.out) == expected


@pytest.mark.parametrize("name", ["checkpoint-2/trained.safetensors", "checkpoint-2/optimizer.pt", "training.json"])
def test_a_damaged_file_is_named(golden, name, capfd):
    job = golden[0].elsewhere(f"damaged-{name.replace('/', '-')}")
    crash_at("mark.done@2", job.call)
    path = job.out / HOME / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    capfd.readouterr()
    assert forked(job.call) == REFUSED
    assert path.name in capfd.readouterr().err
    assert not loadable(job.out)


def test_states_are_read_as_plain_weights_alone(golden):
    """A pickle that would run code, with a hash that fits, is refused by PyTorch's loader."""
    job = golden[0].elsewhere("pickle")
    crash_at("mark.done@2", job.call)
    state = job.out / HOME / "checkpoint-2"
    assert not list(state.glob("training_args*"))
    ran = job.out.with_name("ran")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save(Evil(), state / "optimizer.pt")
    mark = json.loads((state / "whole.json").read_text())
    mark["files"]["optimizer.pt"] = durable.sha256_of(state / "optimizer.pt")
    (state / "whole.json").write_text(json.dumps(mark))
    assert forked(job.call) not in {0, -signal.SIGKILL}
    assert not ran.exists()


CHANGES = {
    "learning_rate": {"learning_rate": 2e-3},
    "seed": {"seed": 5},
    "tokens": {"tokens": 2048},
    "train": {"train": "norms"},
    "teacher": {"teacher": "none"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_training_that_goes_on_otherwise_is_refused_by_name(golden, change, capfd):
    job = golden[0].elsewhere(f"otherwise-{change}")
    crash_at("mark.done@1", job.call)
    capfd.readouterr()
    assert forked(replace(job, options=CHANGES[change]).call) == REFUSED
    said = capfd.readouterr().err
    assert "began otherwise: " in said
    assert (change if change in {"learning_rate", "train", "teacher"} else "text") in said


def test_text_and_models_that_changed_are_refused_by_name(golden, capfd, tmp_path):
    folder = golden[0].model.parent
    shutil.copytree(folder / "plain", tmp_path / "plain")
    shutil.copy(folder / "text.jsonl", tmp_path / "text.jsonl")
    job = Training(tmp_path / "plain", tmp_path / "out")
    crash_at("mark.done@1", job.call)
    before = (tmp_path / "text.jsonl").read_bytes()
    (tmp_path / "text.jsonl").write_bytes(before.replace(b"fox", b"dog"))
    capfd.readouterr()
    assert forked(job.call) == REFUSED
    assert "text was " in capfd.readouterr().err
    (tmp_path / "text.jsonl").write_bytes(before)
    assert forked(job.call) == 0


@pytest.mark.parametrize("step", [pytest.param(90, id="sampled"), pytest.param(3, id="all", marks=pytest.mark.slow)])
def test_no_room_at_any_write(golden, step):
    job, _, expected = golden
    for write in range(1, 1000, step):
        one = job.elsewhere(f"full-{step}-{write}")
        if forked(lambda write=write, one=one: full_from(write, one)) == 0:
            break
        assert not loadable(one.out)
        assert not list(one.out.rglob("*.tmp"))
        assert forked(one.carry_on) == 0
        assert tree(one.out) == expected
    assert write > 60


def full_from(write, job):
    real, passed = durable._append, [0]

    def append(file, chunk):
        passed[0] += 1
        if passed[0] > write:
            raise OSError(28, "No space left on device")
        real(file, chunk)

    durable._append = append
    job.call()


def test_no_room_for_an_optimisers_state_is_one_sentence(golden, capfd):
    job, _, expected = golden
    one = job.elsewhere("full-optimiser")

    crash_at("mark.done@1", one.call)

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = (one.out / HOME / "checkpoint-1" / "trained.safetensors").stat().st_size * 3 // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # moments are twice as large
        one.call()

    capfd.readouterr()
    assert forked(full) == REFUSED
    assert "free some space and call again" in capfd.readouterr().err
    assert forked(one.carry_on) == 0
    assert tree(one.out) == expected
