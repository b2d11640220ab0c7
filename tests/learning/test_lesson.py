"""A training carried out: in two processes as in one, and what a caller is told."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from halve.checkpoint.load import resolve
from halve.errors import InputError
from halve.learning.learner import Learner
from halve.learning.lesson import Lesson, carry_out, check_directory, check_launcher
from halve.learning.options import Finetuning
from halve.learning.training.watching import Watch
from halve.option_groups import fill
from taught import QUICK, make_pruned, teach

TWO = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from halve.learning.learner import Learner
from taught import teach
if {breaks}:
    import os
    from halve.learning.training.course import Course
    Course.run = lambda *_given: sys.exit(7) if os.environ["RANK"] == "1" else Course.stay()
    Course.stay = staticmethod(lambda: __import__("torch").distributed.barrier())
teach(Path({model!r}), Path({out!r}), **{options!r})
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_pruned(tmp_path_factory.mktemp("lesson"))


def in_two(checkpoint, out, *, breaks=False, **options):
    """Train in two processes with gloo, as torchrun launches them; return its exit code and what was said."""
    script = out.with_suffix(".py")
    tests = os.path.dirname(os.path.dirname(__file__))  # noqa: PTH120
    script.write_text(
        TWO.format(
            tests=tests, model=str(checkpoint), out=str(out), options={"device": "cpu", **options}, breaks=breaks
        )
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run(
        [*launch, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("data", ["text", "self"])
def test_two_processes_are_one(checkpoint, tmp_path, data):
    options = {"data": "self"} if data == "self" else {}
    code, said = in_two(checkpoint, tmp_path / "two", learning_rate=1e-3, **options)
    assert code == 0, said
    assert said.count("Traceback") == 0
    teach(checkpoint, tmp_path / "one", learning_rate=1e-3, **options)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(two[name] == 0, value == 0)
    first, second = (
        json.loads((tmp_path / name / "halve.json").read_text())["trainings"][0] for name in ("one", "two")
    )
    assert first["text"]["sha256"] == second["text"]["sha256"]
    assert first["steps"] == second["steps"]
    assert not (tmp_path / "two" / ".halve").exists()


def test_a_process_that_dies_does_not_leave_the_other_waiting(checkpoint, tmp_path):
    code, _ = in_two(checkpoint, tmp_path / "out", breaks=True)
    assert code != 0
    assert not (tmp_path / "out" / "config.json").exists()


def test_who_watches_is_told_everything_in_order(checkpoint, tmp_path):
    heard = []

    class Heard(Watch):
        def phase(self, name):
            heard.append(name)

        def needs(self, needs):
            heard.append(needs)

        def point(self, point):
            heard.append(point)

        def writing(self, done, wanted, seconds):
            heard.append((done, wanted))

    done = teach(checkpoint, tmp_path / "out", watch=Heard(), data="self")
    assert [each for each in heard if isinstance(each, str)] == ["load", "text", "train", "write"]
    assert any(isinstance(each, tuple) for each in heard)
    points = [each for each in heard if hasattr(each, "perplexity")]
    assert points == list(done.trained.curve)
    assert heard.index("train") < heard.index(points[0])


def test_sharding_is_refused(monkeypatch):
    check_launcher()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"told to use FSDP \(ACCELERATE_USE_FSDP\)"):
        check_launcher()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check_launcher()


def test_a_call_with_relative_paths_is_of_its_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_directory({"directory": None})
    check_directory({"directory": str(tmp_path)})
    with pytest.raises(InputError, match="was begun in /elsewhere"):
        check_directory({"directory": "/elsewhere"})


def test_a_learner_that_breaks_the_pattern_publishes_nothing(checkpoint, tmp_path):
    """The check at the end is on the bytes, whoever trained."""
    request = fill(Finetuning, {"data": str(checkpoint.parent / "text.jsonl"), **QUICK, "teacher": "none"})

    class Careless(Learner):
        def attach(self, model):
            return [each for each in model.parameters() if each.ndim > 1]

        def optimiser(self, parameters, rate, decay):
            return torch.optim.SGD([{"params": list(parameters), "weight_decay": 0.0}], lr=rate)

        def after_update(self, step, optimiser):
            for group in optimiser.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(1e-3)

        def finish(self):
            pass

    record = json.loads((checkpoint / "halve.json").read_text())
    lesson = Lesson(
        command="finetune",
        kind="finetune",
        method="careless",
        what="all",
        began=resolve(checkpoint),
        teacher=None,
        dense=None,
        request=request,
        prepare=lambda _student, _rows: Careless,
        record=lambda _student, entry: record | {"trainings": [entry]},
    )
    with pytest.raises(Exception, match="is wrong, do not use it"):
        carry_out(lesson, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
