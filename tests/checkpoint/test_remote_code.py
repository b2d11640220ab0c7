"""Models that come with Python code of their own: refused, unless the user says that they trust it."""

import json

import pytest
import torch
import transformers as tf
from transformers import dynamic_module_utils
from typer.testing import CliRunner

from halve import check, evaluate, plan, prune
from halve.checkpoint.directory import companions
from halve.checkpoint.load import load_model, resolve, source_files
from halve.cli.app import app
from halve.cli.errors import EXIT_REFUSED
from halve.errors import CorruptFileError, ResumeMismatchError, UnsupportedModelError
from halve.pruning import resume
from halve.runtime import speed
from models import decoder, tokens
from own_code import CONFIGURATION, MODELLING, some_tokens
from tiny_tokenizers import byte_bpe


@pytest.fixture
def own(tmp_path, modules, monkeypatch):
    """A checkpoint whose class is defined beside it, and a file that appears once that code has run."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    path, marker = tmp_path / "own", tmp_path / "the code was run"
    decoder("llama", vocab_size=320).save_pretrained(path)
    byte_bpe().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (path / "config.json").write_text(json.dumps(config))
    (path / "configuration_own.py").write_text(CONFIGURATION.format(marker=str(marker)))
    (path / "modeling_own.py").write_text(MODELLING)
    return path, marker


def test_code_is_not_run_unless_it_is_trusted(own):
    path, marker = own
    for call in (resolve, load_model, lambda where: evaluate(where, some_tokens())):
        with pytest.raises(UnsupportedModelError, match=r"auto_map.* give trust_remote_code \(--trust-remote-code\)"):
            call(path)
    assert any("auto_map" in problem for problem in check(path, pattern="2:4").problems)
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        prune(path, path.parent / "out", calibration=tokens(4))
    assert not (path.parent / "out").exists()
    assert not marker.exists()


def test_trusted_code_is_run_and_goes_with_the_pruned_model(own):
    path, marker = own
    out = path.parent / "out"
    dense = evaluate(path, some_tokens(), trust_remote_code=True, forward_dtype="float32")
    assert marker.exists()
    pruned = prune(path, out, calibration=tokens(4), method="wanda", trust_remote_code=True)
    assert type(pruned.model).__name__ == "OwnForCausalLM"
    assert len(pruned.report.matrices) == 21
    assert check(out, against=path, trust_remote_code=True).ok
    assert not check(out).ok
    for name in ("configuration_own.py", "modeling_own.py", "config.json"):
        assert (out / name).read_bytes() == (path / name).read_bytes()
    assert json.loads((out / "halve.json").read_text())["files"].keys() >= {"configuration_own.py", "modeling_own.py"}
    again = tf.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    ids = tokens(1)
    assert torch.equal(again(ids).logits, pruned.model(ids).logits)
    assert evaluate(out, some_tokens(), trust_remote_code=True, forward_dtype="float32").value != dense.value


def test_a_stopped_run_goes_on_with_the_code_it_was_begun_with(own):
    path, _ = own

    def stop(step):
        if step.phase == "collect" and step.block == 2:
            raise KeyboardInterrupt

    text = path.parent / "text.txt"
    whole, out = path.parent / "whole", path.parent / "out"
    text.write_text("some words " * 100)
    arguments = {"calibration": str(text), "method": "magnitude", "samples": 2, "seq_len": 16}
    prune(path, whole, trust_remote_code=True, **arguments)
    with pytest.raises(KeyboardInterrupt):
        prune(path, out, trust_remote_code=True, listen=stop, **arguments)
    code = (path / "modeling_own.py").read_text()
    evil = path.parent / "the changed code was run"
    (path / "modeling_own.py").write_text(f"{code}\nopen({str(evil)!r}, 'w')\n")
    with pytest.raises(ResumeMismatchError, match=r"model\.modeling_own\.py was "):
        resume(out)
    assert not evil.exists()
    (path / "modeling_own.py").write_text(code)
    resume(out)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_code_counts_among_the_files_and_must_lie_in_the_directory(own, tmp_path):
    path, _ = own
    names = {file.name for file in source_files(resolve(path, trust_remote_code=True))}
    assert {"modeling_own.py", "configuration_own.py"} <= names
    assert not any(file.suffix == ".py" for file in companions(path))
    (tmp_path / "outside.py").write_text("")
    (path / "more.py").symlink_to(tmp_path / "outside.py")
    with pytest.raises(CorruptFileError, match="is a link that leaves the checkpoint"):
        resolve(path, trust_remote_code=True)


def test_code_from_another_repository_is_never_run(own):
    path, marker = own
    config = json.loads((path / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "org/other--configuration_own.OwnConfig"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="its code lies in another repository: copy it here first"):
        load_model(path, trust_remote_code=True)
    assert not marker.exists()


def test_the_command_line_asks_for_the_flag(own, tmp_path):
    path, _ = own
    arguments = ["prune", str(path), "--out", str(tmp_path / "out"), "--method", "magnitude", "--refit", "none"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == EXIT_REFUSED
    assert "--trust-remote-code" in refused.stderr
    done = CliRunner().invoke(app, [*arguments, "--trust-remote-code"])
    assert done.exit_code == 0, done.output
    against = ["check", str(tmp_path / "out"), "--against", str(path), "--trust-remote-code"]
    assert CliRunner().invoke(app, against).exit_code == 0


def test_a_plan_runs_the_code_only_when_it_is_trusted(own, monkeypatch):
    monkeypatch.setattr(speed, "copies_beyond_cache", lambda _nbytes: 2)  # tiny weights would fill caches with copies
    path, marker = own
    (path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        plan(path, batches=[1])
    assert not marker.exists()
    found = plan(path, batches=[1], trust_remote_code=True)
    assert marker.exists()
    assert found.gain(1).everywhere > 0
