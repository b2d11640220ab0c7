"""The examples run, on a tiny model, and use nothing of Halve but its public names."""

import ast
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

import halve
from halve.runtime import speed
from tiny_tokenizers import byte_bpe

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SMALL = ["--samples", "4", "--seq-len", "16"]


def run(monkeypatch, capsys, name, *arguments):
    """Run an example as ``python examples/NAME.py`` would, and return what it prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_a_model_is_pruned_and_evaluated(monkeypatch, capsys, model, text, tmp_path):
    out = tmp_path / "pruned"
    printed = run(
        monkeypatch, capsys, "prune_and_evaluate", model, text, out, "--evaluate-on", text, *SMALL, "--windows", 2
    )
    assert "ok = True" in printed
    assert printed.count("perplexity") == 2
    assert halve.check(out).ok


def test_one_matrix_is_pruned(monkeypatch, capsys, model):
    printed = run(monkeypatch, capsys, "one_matrix", model)
    assert printed.count("(OK)") == 5
    assert "2:4 holds = True" in printed


def test_methods_are_compared(monkeypatch, capsys, model, text):
    printed = run(
        monkeypatch, capsys, "compare_methods", model, text, text, *SMALL, "--methods", "magnitude", "auto+cg"
    )
    assert [line.split()[0] for line in printed.splitlines()] == ["dense", "magnitude", "auto+cg"]
    assert printed.count("perplexity") == 3


def test_a_pruned_model_is_accelerated_and_generates(monkeypatch, capsys, model, text, tmp_path):
    halve.prune(model, tmp_path / "pruned", calibration=text, samples=4, seq_len=16, method="wanda", refit="none")
    name = "accelerate_and_generate"
    printed = run(monkeypatch, capsys, name, tmp_path / "pruned", "one", "--new-tokens", 4, "--everything")
    assert "layers run sparse" in printed
    assert printed.count("tokens/s") == 2


def test_the_demo_runs(monkeypatch, capsys, checkpoint, tmp_path):
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(checkpoint)
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "unpack_model", lambda _folder: checkpoint)
    monkeypatch.setattr(speed, "copies_beyond_cache", lambda _nbytes: 2)  # of tiny matrices there would be millions
    for name, small in {"SAMPLES": 4, "SEQ_LEN": 16, "WINDOWS": 4, "WINDOW": 16, "NEW_TOKENS": 4, "ROUNDS": 1}.items():
        monkeypatch.setattr(demo, name, small)
    demo.main(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("perplexity") == 4
    assert len(re.findall(r"\d ± \d", printed)) == 3
    assert "ok = True" in printed
    assert "packed" in printed.lower()  # faster or not, which is a matter of the machine
    calibrated, evaluated = (
        set((tmp_path / f"{name}.txt").read_text(encoding="utf-8").split("\n\n"))
        for name in ("calibration", "evaluation")
    )
    assert len(calibrated) > 100
    assert len(evaluated) > 100
    assert not calibrated & evaluated


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_examples_use_public_names_only(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    allowed = sys.stdlib_module_names | {"halve", "torch", "transformers"}
    assert {module.split(".")[0] for module in modules} <= allowed
    assert [module for module in modules if module.split(".")[0] == "halve"] == ["halve"]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "halve"
    }
    assert used
    assert used <= set(halve.__all__)
