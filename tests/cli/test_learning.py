"""halve finetune and halve resume on the command line."""

import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from halve.cli.app import app
from halve.cli.errors import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_STOPPED
from models import OF_ONE_RUN
from packed_models import sums
from taught import QUICK, make_pruned

run = CliRunner().invoke
FLAGS = [part for name, value in QUICK.items() for part in (f"--{name.replace('_', '-')}", str(value))]
# Python in the background of a shell would not hear SIGINT.
HALVE = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from halve.cli.app import main; main()",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_pruned(tmp_path_factory.mktemp("cli"))


def call(checkpoint, out, *more):
    data = checkpoint.parent / "text.jsonl"
    return ["finetune", str(checkpoint), "--out", str(out), "--data", str(data), *FLAGS, *more]


def kept(out):
    return {name: value for name, value in sums(out).items() if name not in OF_ONE_RUN}


@pytest.fixture(scope="module")
def taught(checkpoint):
    out = checkpoint.parent / "taught"
    result = run(app, call(checkpoint, out))
    assert result.exit_code == 0, result.output
    return out, result.output


def test_it_says_what_it_takes_and_what_came_of_it(taught, checkpoint):
    out, said = taught
    for part in ("loading the models", "what the training takes", "moments", "MB", "memory on cpu", "training …"):
        assert part in said
    assert "GB" not in said
    assert "0 tokens: held-out perplexity" in said
    assert "nats a token after" in said
    assert f"verified and written: {out}" in " ".join(said.split())
    result = run(app, ["check", str(out), "--against", str(checkpoint.parent / "dense")])
    assert result.exit_code == 0, result.output


def test_notes_are_said_once(checkpoint, tmp_path):
    result = run(app, call(checkpoint, tmp_path / "out", "--tokens", "8k", "--batch-tokens", "2k"))
    assert result.exit_code == 0, result.output
    assert " ".join(result.output.split()).count("and is read") == 1


def test_perplexity_is_printed_before_and_after(checkpoint, tmp_path):
    text = str(checkpoint.parent / "text.jsonl")
    more = ["--train", "norms", "--eval-data", text, "--eval-max-windows", "2"]
    result = run(app, call(checkpoint, tmp_path / "out", *more))
    assert result.exit_code == 0, result.output
    assert "pruned, before and after the training:" in result.output
    assert "dense, and trained:" in result.output


def test_help_is_readable_and_has_every_group():
    result = run(app, ["finetune", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    for flag in (
        "--train",
        "--teacher",
        "--tokens",
        "--learning-rate",
        "--forward-dtype",
        "--eval-data",
        "--save-every",
    ):
        assert flag in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_a_refusal_is_one_sentence_and_exit_code_2(checkpoint, tmp_path):
    for more in (["--teacher", str(tmp_path / "no")], ["--tokens", "many"], ["--batch-tokens", "16"], ["--clip", "-1"]):
        result = run(app, call(checkpoint, tmp_path / "out", *more))
        assert result.exit_code == EXIT_REFUSED, result.output
        assert "Traceback" not in result.output
        assert not (tmp_path / "out").exists()


def test_sharding_by_accelerate_is_refused(checkpoint, tmp_path):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        result = run(app, call(checkpoint, tmp_path / "out"), env={name: "true"})
        assert result.exit_code == EXIT_REFUSED
        assert "does not shard a model" in " ".join(result.output.split())


def interrupted(arguments, out, sign, when):
    """Run halve until a file is there, and send it a signal."""
    process = subprocess.Popen([*HALVE, *arguments], stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while not when(out) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(sign)
    said = process.communicate(timeout=120)[1]
    return process.returncode, " ".join(said.split())


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on_to_the_same_bytes(checkpoint, tmp_path, sign, taught):
    out = tmp_path / "out"
    long = ["--tokens", "16k", "--evaluations", "4", "--save-every", "1"]
    code, said = interrupted(
        call(checkpoint, out, *long), out, sign, lambda out: list(out.glob(".halve/checkpoint-*/whole.json"))
    )
    assert code == EXIT_STOPPED, said
    assert f"interrupted what is done of the training is kept in {out}: continue with `halve resume {out}`" in said
    assert "Traceback" not in said
    assert "blocks" not in said
    result = run(app, ["eval", str(out), "--data", str(checkpoint.parent / "text.jsonl"), "--seq-len", "32"])
    assert result.exit_code == EXIT_REFUSED  # what is unfinished cannot be used
    if sign == signal.SIGTERM:
        return
    manifest = out / ".halve" / "training.json"
    assert json.loads(manifest.read_text())["call"]["command"] == "finetune"
    result = run(app, ["resume", str(out), "--workers", "2"])
    assert result.exit_code == EXIT_REFUSED
    assert "--workers is for a run that prunes, and this directory holds a training" in " ".join(result.output.split())
    result = run(app, ["resume", str(out)])
    assert result.exit_code == 0, result.output
    assert run(app, call(checkpoint, tmp_path / "whole", *long)).exit_code == 0
    assert kept(out) == kept(tmp_path / "whole")


def test_learning_rates_that_were_tried_are_kept(checkpoint, tmp_path, monkeypatch):
    from halve.learning.training.course import Course

    out, real, tried = tmp_path / "out", Course._try, []

    def stopping(self, make, rate):
        tried.append(rate)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return real(self, make, rate)

    monkeypatch.setattr(Course, "_try", stopping)
    result = run(app, call(checkpoint, out, "--learning-rate", "auto"))
    assert result.exit_code == EXIT_STOPPED, result.output
    result = run(app, ["resume", str(out)])
    assert result.exit_code == 0, result.output
    assert f"learning rate {tried[1]:g} tried: loss " in " ".join(result.output.split())
    assert tried.count(tried[0]) == 1
    assert tried[1] == tried[2]


def test_stopped_before_it_began_nothing_is_kept(checkpoint, tmp_path, monkeypatch):
    def stopped(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr("halve.learning.lesson.load_student", stopped)
    result = run(app, call(checkpoint, tmp_path / "out"))
    assert result.exit_code == EXIT_INTERRUPTED
    assert "nothing is kept" in result.output
    assert not (tmp_path / "out").exists()


def test_what_is_finished_or_not_there_is_said(taught, checkpoint, tmp_path):
    out, _ = taught
    result = run(app, ["resume", str(out)])
    assert result.exit_code == 0
    assert "nothing is left to do" in result.output
    assert run(app, ["resume", str(tmp_path)]).exit_code == EXIT_REFUSED
    assert run(app, call(checkpoint, out)).exit_code == EXIT_REFUSED


def test_relative_paths_are_resumed_from_where_they_began(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    arguments = ["finetune", "plain", "--out", str(tmp_path / "out"), "--data", "text.jsonl", *FLAGS]

    def interrupted(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr("halve.learning.training.trainer.MaskTrainer.go_on", interrupted)
    assert run(app, arguments).exit_code == EXIT_STOPPED
    monkeypatch.undo()
    result = run(app, ["resume", str(tmp_path / "out")])
    assert result.exit_code == EXIT_REFUSED
    assert "resume it from there" in " ".join(result.output.split())
    monkeypatch.chdir(checkpoint.parent)
    assert run(app, ["resume", str(tmp_path / "out")]).exit_code == 0
