"""halve learn, halve apply-masks and adapters of halve finetune on the command line."""

import json
import shutil
import sys

import pytest
from typer.testing import CliRunner

import halve
from halve.cli.app import app
from halve.cli.errors import EXIT_REFUSED
from harness import crash_at
from packed_models import edit_tensor, pruned, sums
from taught import QUICK, write_text

run = CliRunner().invoke
FLAGS = [part for name, value in QUICK.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    found = pruned(tmp_path_factory.mktemp("cli"))
    write_text(found.parent / "text.jsonl")
    return found


@pytest.fixture(scope="module")
def dense(checkpoint):
    return checkpoint.parent / "dense"


def call(command, model, out, *more):
    return [command, str(model), "--out", str(out), "--data", str(model.parent / "text.jsonl"), *FLAGS, *more]


def said(result, code=0):
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def options_on_record(out):
    return json.loads((out / "halve.json").read_text())["trainings"][0]["options"]


def test_learn_and_apply_masks(dense, tmp_path):
    masks, text = tmp_path / "masks", str(dense.parent / "text.jsonl")
    more = ["--method", "maskllm", "-o", "init-std=0.02", "--prior", "wanda", "--save-masks", str(masks)]
    result = run(app, call("learn", dense, tmp_path / "out", *more, "--eval-data", text, "--eval-max-windows", "2"))
    told = said(result)
    assert "what the training takes" in told
    assert "0 tokens: held-out perplexity" in told
    assert "note: method maskllm can move two logits" in told
    assert "before and after the training:" in told
    assert "pruned, before" not in told  # it was dense before
    assert f"verified and written: {tmp_path / 'out'}" in told
    assert options_on_record(tmp_path / "out")["options"] == {"init_std": 0.02}
    applied = ["apply-masks", str(dense), "--masks", str(masks), "--out", str(tmp_path / "applied")]
    told = said(run(app, applied))
    assert f"21 matrices at 2:4 by the masks of {masks}" in told
    assert "warning" not in told
    name = "model.safetensors"
    assert (tmp_path / "applied" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    said(run(app, ["check", str(tmp_path / "applied"), "--against", str(dense)]))
    said(run(app, ["report", str(tmp_path / "applied")]))
    moved = tmp_path / "moved"
    shutil.copytree(dense, moved)
    edit_tensor(moved / name, "model.norm.weight", lambda value: value + 1)
    told = said(run(app, ["apply-masks", str(moved), "--masks", str(masks), "--out", str(tmp_path / "other")]))
    assert f"warning: {masks} was learned for {dense}" in told
    assert "is no file" in said(run(app, [*applied[:3], str(tmp_path / "no"), *applied[4:]]), EXIT_REFUSED)


def test_refusals_are_one_sentence(dense, tmp_path):
    for more, match in (
        (["--method", "cast", "--prior", "wanda"], "takes no prior"),
        (["--method", "astt"], "did you mean 'ast'"),
        (["-o", "evrey=3", "--method", "ast"], "did you mean 'every'"),
        (["-o", "tokens=300", "--method", "ast"], "tokens is given twice: give it once, by -o or by --tokens"),
        (["--pattern", "50%"], "N:M"),
        (["--method", "ast", "--save-masks", str(dense)], "is there already"),
    ):
        assert match in said(run(app, call("learn", dense, tmp_path / "out", *more)), EXIT_REFUSED)
        assert list(tmp_path.iterdir()) == []


def test_help_is_readable_and_has_every_option():
    result = run(app, ["learn", "--help"], env={"COLUMNS": "100"})
    for flag in ("--method", "--pattern", "--prior", "--skip", "--save-masks", "--option", "--tokens", "--eval-data"):
        assert flag in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_a_stopped_learning_is_resumed_with_its_options(dense, tmp_path):
    more = ["--method", "proxsparse", "--pattern", "1:4", "--skip", "*.q_proj.*", "-o", "keep=trained"]
    more += ["--save-every", "1"]
    arguments = call("learn", dense, tmp_path / "out", *more)
    crash_at("mark.renamed@2", lambda: run(app, arguments))
    told = said(run(app, ["resume", str(tmp_path / "out")]))
    assert "verified and written" in told
    said(run(app, call("learn", dense, tmp_path / "whole", *more)))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert options_on_record(tmp_path / "out") == options_on_record(tmp_path / "whole")


def test_relative_paths_of_files_beside_are_resumed_from_where_they_began(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--method", "ast", "--save-every", "1", "--save-masks", "masks"]
    crash_at("mark.renamed@1", lambda: run(app, call("learn", dense, tmp_path / "out", *more)))
    monkeypatch.chdir(dense)
    assert "resume it from there" in said(run(app, ["resume", str(tmp_path / "out")]), EXIT_REFUSED)
    monkeypatch.chdir(tmp_path)
    said(run(app, ["resume", str(tmp_path / "out")]))
    assert (tmp_path / "masks").is_file()


@pytest.mark.parametrize("kind", ["lora", "hira"])
def test_adapters_are_trained_saved_and_merged_to_the_same_bytes(kind, checkpoint, dense, tmp_path):
    more = ["--train", kind, "--rank", "4", "--save-adapter", str(tmp_path / "adapter"), "--learning-rate", "1e-2"]
    text = ["--eval-data", str(checkpoint.parent / "text.jsonl"), "--eval-max-windows", "2"]
    told = said(run(app, call("finetune", checkpoint, tmp_path / "out", *more, *text)))
    assert "pruned, before and after the training:" in told
    assert halve.check(tmp_path / "out", against=dense).ok
    merge = ["merge", str(tmp_path / "adapter"), "--into", str(checkpoint), "--out", str(tmp_path / "merged")]
    assert "merged, 2:4 kept: exactly" in said(run(app, merge))
    weights = "model.safetensors"
    trained = (tmp_path / "out" / weights).read_bytes()
    assert trained == (tmp_path / "merged" / weights).read_bytes()
    assert trained != (checkpoint / weights).read_bytes()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert ("nats a token, and" in card) == (kind == "lora")
    assert f"base_model: {checkpoint}" in card
    assert options_on_record(tmp_path / "out")["rank"] == 4


def test_what_adapters_do_not_take(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for more, match in (
        (["--train", "hira", "--alpha", "8"], "--alpha goes with --train lora: leave it out"),
        (["--alpha", "8"], "--alpha goes with --train lora: leave it out"),
        (["--save-adapter", str(tmp_path / "new")], "--save-adapter goes with --train lora or hira"),
        (["--train", "lora", "--save-adapter", str(tmp_path / "there")], "is there already: give save_adapter"),
        (["--train", "lora", "--rank", "0"], "rank"),
    ):
        assert match in said(run(app, call("finetune", checkpoint, tmp_path / "out", *more)), EXIT_REFUSED)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr("halve.learning.lesson.load_student", None)  # what follows is said before anything is loaded
    monkeypatch.setattr("halve.learning.lora.version", lambda _name: "0.22.0")
    told = said(run(app, call("finetune", checkpoint, tmp_path / "out", "--train", "hira")), EXIT_REFUSED)
    assert "peft 0.22.0 is installed" in told
    monkeypatch.delitem(sys.modules, "halve.learning.lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    told = said(run(app, call("finetune", checkpoint, tmp_path / "out", "--train", "lora")), EXIT_REFUSED)
    assert "adapters need peft>=0.21,<0.22: pip install 'halve[adapters]'" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("point", ["adapter.renamed@2", "mark.renamed@2"])
def test_a_killed_adapter_training_goes_on(point, checkpoint, tmp_path):
    def train(name):
        more = ["--train", "lora", "--rank", "2", "--save-every", "1", "--save-adapter", str(tmp_path / f"{name}-a")]
        return call("finetune", checkpoint, tmp_path / name, *more)

    crash_at(point, lambda: run(app, train("out")))
    said(run(app, ["resume", str(tmp_path / "out")]))
    said(run(app, train("whole")))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sums(tmp_path / "out-a") == sums(tmp_path / "whole-a")
