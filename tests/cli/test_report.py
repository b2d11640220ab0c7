import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

import halve
from halve.cli.app import app
from halve.cli.errors import EXIT_REFUSED
from models import FORWARD_DTYPE
from reported import write_record

FAST = ["--method", "wanda", "--refit", "none", "--samples", "8", "--seq-len", "16"]


@pytest.fixture
def run():
    return CliRunner().invoke


def test_a_run_leaves_its_report_and_says_where(run, model, text, tmp_path):
    out = tmp_path / "out"
    arguments = ["prune", model, "--out", str(out), "--calibration", text, *FAST]
    result = run(app, [*arguments, "--eval-data", text, "--eval-max-windows", "2"])
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((out / "halve-measured.json").read_text())["perplexity"]
    (first, second), (dense_first, dense_second) = entry["after_windows"], entry["before_windows"]
    apart = [first - dense_first, second - dense_second]
    line = (
        f"perplexity text.txt: {entry['before']:.3f} → {entry['after']:.3f}, logarithm {sum(apart) / 2:+.4f} ± "
        f"{abs(apart[0] - apart[1]) / 2:.4f} (2 windows of 16 tokens, no BOS, {FORWARD_DTYPE}; halve "
    )
    assert line in result.output
    assert f"torch {torch.__version__}, transformers {transformers.__version__})" in result.output
    page = (out / "report.html").read_text()
    assert f"(logarithm {sum(apart) / 2:+.4f} ± {abs(apart[0] - apart[1]) / 2:.4f}; 2 windows of 16 tokens" in page
    assert f"torch {torch.__version__}, transformers {transformers.__version__}</td>" in page
    assert f"report: {out / 'report.html'}" in result.output
    assert "self_attn.q_proj" in result.output  # the table by kind
    assert (out / "report.html").stat().st_size > 1_000_000


def test_the_report_is_made_again(run, tmp_path):
    record = write_record(tmp_path / "a")
    result = run(app, ["report", str(record)])
    assert result.exit_code == 0, result.output
    assert result.output == f"written: {record / 'report.html'}\n"
    assert (record / "report.html").exists()
    card = record / "README.md"
    assert card.read_text().startswith("---\n")
    card.write_text("mine")
    result = run(app, ["report", str(record)])
    assert "README.md was left as it is: it is not as Halve wrote it" in " ".join(result.output.split())
    assert card.read_text() == "mine"
    assert run(app, ["report", str(record), "--out", str(tmp_path / "other.html")]).output.count("\n") == 1


def test_several_are_compared(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = [str(write_record(tmp_path / name)) for name in "ab"]
    result = run(app, ["report", *records])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "comparison.html").exists()
    assert run(app, ["report", *records, "--out", "other.html"]).exit_code == 0
    assert (tmp_path / "other.html").exists()


def test_perplexity_is_measured_on_request(run, checkpoint, text, tmp_path):
    out = tmp_path / "out"
    halve.prune(checkpoint, out, calibration=text, samples=8, seq_len=16, method="magnitude", refit="none")
    result = run(app, ["report", str(out), "--data", text, "--seq-len", "32", "--max-windows", "1"])
    assert result.exit_code == 0, result.output
    assert f"(1 window of 32 tokens, no BOS, {FORWARD_DTYPE}; halve " in result.output
    assert "perplexity text.txt" in result.output
    assert "32 tokens" in (out / "report.html").read_text()
    assert "1 window of 32 tokens" in (out / "README.md").read_text()
    result = run(app, ["report", str(out), "--data", text, "--max-windows", "1", "--dense", "none"])
    assert "→" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere"], "has no halve.json"),
        (["report", "nowhere", "--data", "text.txt"], "has no halve.json"),
        (["report", "nowhere", "--max-windows", "2"], "goes with a text to measure on: give --data"),
        (["report", "nowhere", "--dense", "none"], "goes with a text to measure on: give --data"),
        (["report", "a", "a"], "is given twice"),
        (["prune", "m", "--out", "o", "--eval-max-windows", "2"], "--eval-max-windows goes with --eval-data, which is"),
        (["prune", "m", "--out", "o", "--eval-seq-len", "2"], "--eval-seq-len goes with --eval-data, which is not"),
    ],
)
def test_what_cannot_be_is_refused(run, arguments, words):
    result = run(app, arguments)
    assert result.exit_code == EXIT_REFUSED
    assert words in result.output.replace("\n", " ")


def test_what_cannot_be_written_is_told_before_anything_is_measured(run, checkpoint, text, tmp_path, monkeypatch):
    from halve.evaluation.request import Evaluation

    monkeypatch.setattr(Evaluation, "measure", lambda *_: pytest.fail("measured"))
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        halve.prune(checkpoint, out, calibration=text, samples=8, seq_len=16, method="magnitude", refit="none")
    asked = ["--data", text, "--max-windows", "1"]
    for arguments, words in (
        ([str(outs[0]), "--out", str(tmp_path)], "is a directory"),
        ([str(outs[0]), str(outs[0])], "is given twice"),
        ([str(outs[0]), str(outs[1]), "--dense", "no/such/model"], "does not exist"),
    ):
        result = run(app, ["report", *arguments, *asked])
        assert result.exit_code == EXIT_REFUSED
        assert words in result.output.replace("\n", " ")
