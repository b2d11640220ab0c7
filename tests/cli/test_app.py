import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from halve import comparison
from halve.cli.app import COMMANDS, app
from halve.cli.errors import EXIT_FAILED, EXIT_REFUSED
from halve.errors import FactorisationError, InputError
from halve.option_groups import options_of
from halve.run.request import Request
from halve.solve.objective import Objective

run = CliRunner().invoke
FAST = ["--samples", "4", "--seq-len", "16", "--method", "wanda", "--refit", "none"]


def test_prune_then_check(model, text, tmp_path):
    out = str(tmp_path / "out")
    result = run(app, ["prune", model, "--out", out, "--calibration", text, *FAST])
    assert result.exit_code == 0, result.output
    assert "plan: 57% of the model's weights are pruned, 21 matrices in 3 blocks; left dense: " in result.output
    assert "left dense: 1 × embedding, outside the blocks (model.embed_tokens.weight); " in result.output  # noqa: RUF001
    assert "1 × outside the blocks (lm_head.weight)" in result.output  # noqa: RUF001
    assert "21 matrices at 2:4 by wanda" in result.output
    assert "model.layers.2.mlp.down_proj.weight" in result.output  # plain lines where there is no terminal
    result = run(app, ["check", out, "--against", model])
    assert result.exit_code == 0
    assert result.output.startswith("ok: 21 matrices at 2:4, 50.0% zeros in them; ")
    assert result.output.endswith(f"tensors in all, 9 of them the same as in {model}\n")
    result = run(app, ["check", out, "--json"])
    assert json.loads(result.stdout)["ok"] is True


def test_check_fails_on_a_dense_model(model, tmp_path, text):
    run(app, ["prune", model, "--out", str(tmp_path / "out"), "--calibration", text, *FAST])
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes((tmp_path / "dense" / "model.safetensors").read_bytes())
    result = run(app, ["check", str(tmp_path / "out")])
    assert result.exit_code == EXIT_FAILED
    assert "problem:" in result.output
    *others, last = result.output.splitlines()
    assert others[-1].startswith("read: 0 matrices at 2:4; ")
    assert last.startswith(f"{tmp_path / 'out'} failed: model.safetensors does not have the sha256")
    assert last.endswith("(and 21 more problems)")


def test_a_check_that_read_no_matrix_says_nothing_of_zeros(model, tmp_path, text):
    run(app, ["prune", model, "--out", str(tmp_path / "out"), "--calibration", text, *FAST])
    run(app, ["pack", str(tmp_path / "out"), "--out", str(tmp_path / "packed")])
    values = next((tmp_path / "packed").glob("packed*.safetensors"))
    values.write_bytes(values.read_bytes()[:-1])
    result = run(app, ["check", str(tmp_path / "packed")])
    assert result.exit_code == EXIT_FAILED
    assert "21 matrices at 2:4; " in result.output
    assert "zeros in them" not in result.output


def test_compare_prints_a_row_each(model, text):
    arguments = ["compare", model, "--data", text, "--calibration", text, "--samples", "4", "--seq-len", "16"]
    arguments += ["--methods", "magnitude,prox-gradient+gd", "-o", "prox-gradient.beta=1.5", "-o", "gd.steps=5"]
    result = run(app, [*arguments, "--eval-max-windows", "2"])
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    for name in ("dense", "magnitude", "prox-gradient+gd", "perplexity text.txt", "2 windows of 16 tokens"):
        assert name in printed


def compare_arguments(model, text, *more):
    fixed = ["--calibration", text, "--samples", "4", "--seq-len", "16", "--eval-max-windows", "2"]
    return ["compare", model, "--data", text, *fixed, *more]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_is_finished_is_printed_and_a_failure_is_exit_code_1(model, text, monkeypatch, flags):
    real = comparison.prune_loaded

    def fail_wanda(candidate, data, request, out, **arguments):
        if request.settings.method == "wanda":
            raise FactorisationError("no [luck]")
        return real(candidate, data, request, out, **arguments)

    monkeypatch.setattr(comparison, "prune_loaded", fail_wanda)
    result = run(app, compare_arguments(model, text, "--methods", "wanda,magnitude", *flags))
    assert result.exit_code == EXIT_FAILED
    assert "error (wanda): no [luck]" in result.stderr
    assert "magnitude: block 1/3 model.layers.0." in result.stderr
    if flags:
        record = json.loads(result.stdout)
        assert [row["error"] for row in record["rows"]] == ["", "no [luck]", ""]
        assert (record["model"], record["calibration"]["source"]) == (model, text)
    else:
        assert "failed" in result.stdout


def test_ctrl_c_prints_the_rows_that_are_finished(model, text, monkeypatch):
    real = comparison.prune_loaded

    def interrupt_wanda(candidate, data, request, out, **arguments):
        if request.settings.method == "wanda":
            raise KeyboardInterrupt
        return real(candidate, data, request, out, **arguments)

    monkeypatch.setattr(comparison, "prune_loaded", interrupt_wanda)
    result = run(app, compare_arguments(model, text, "--methods", "magnitude,wanda", "--json"))
    assert result.exit_code == 130
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["dense", "magnitude"]
    assert result.stderr.endswith("\ninterrupted\n")


@pytest.mark.parametrize(
    "bad", [["--eval-seq-len", "0"], ["--data", "no/such.txt"], ["--eval-seq-len", "100000"], "out"]
)
def test_compare_checks_before_the_model_writes_text(model, text, tmp_path, bad):
    if bad == "out":
        (tmp_path / "out" / "wanda").mkdir(parents=True)
        (tmp_path / "out" / "wanda" / "file").touch()
        bad = ["--out", str(tmp_path / "out")]
    arguments = compare_arguments(model, text, "--calibration", "self", "--methods", "wanda")
    result = run(app, [*arguments, *bad])
    assert result.exit_code == EXIT_REFUSED
    assert "the model writes" not in result.output
    assert result.stderr.startswith("error: ")


def test_compare_gives_every_contender_the_same_objective(model, text, monkeypatch):
    seen = []
    real = comparison.prune_loaded

    def note(candidate, data, request, out, **arguments):
        seen.append(request.settings.objective)
        return real(candidate, data, request, out, **arguments)

    monkeypatch.setattr(comparison, "prune_loaded", note)
    asked = ["--shrinkage", "auto", "--match-dense", "0.5", "--match-ridge", "0.2"]
    result = run(app, compare_arguments(model, text, "--methods", "magnitude,wanda+cg", *asked))
    assert result.exit_code == 0, result.output
    assert seen == [Objective("auto", 0.5, 0.2)] * 2
    result = run(app, compare_arguments(model, text, "--methods", "wanda", "--match-dense", "-1"))
    assert result.exit_code == EXIT_REFUSED
    assert result.stderr == "error: match_dense must be a number from 0 to 1, got -1.0\n"


def test_generation_is_announced(model, text, tmp_path):
    arguments = ["prune", model, "--out", str(tmp_path / "out"), "--samples", "2", "--seq-len", "8", "--effort", "fast"]
    assert "the model writes its calibration text" in run(app, arguments).stderr
    assert "the model writes" not in run(app, ["prune", "no/such/model", *arguments[2:]]).stderr
    arguments = compare_arguments(model, text, "--calibration", "self", "--methods", "magnitude")
    assert "the model writes its calibration text" in run(app, arguments).stderr
    arguments = compare_arguments(model, text, "--calibration", "self", "--methods", "magnitude")
    assert "the model writes its calibration text" in run(app, arguments).stderr


def test_a_checkpoint_without_record_needs_a_pattern(model):
    result = run(app, ["check", model])
    assert result.exit_code == EXIT_REFUSED
    assert "no halve.json: give the pattern of its matrices (--pattern 2:4)" in result.stderr
    assert run(app, ["check", model, "--pattern", "2:4"]).exit_code != EXIT_REFUSED


def test_sentences_on_a_pipe_are_not_wrapped(tmp_path):
    path = tmp_path / ("[bold]" + "x" * 120)
    result = run(app, ["check", str(path)])
    assert result.stderr == f"error: {path} is not a directory: give the directory of a checkpoint\n"


def test_version_and_a_cheap_start():
    assert run(app, ["--version"]).output.startswith("halve ")
    code = "import sys, halve.cli.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_methods_are_listed():
    result = run(app, ["methods"])
    assert result.exit_code == 0
    for name in ("magnitude", "wanda", "sparsegpt", "prox-gradient"):
        assert name in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_the_list_of_commands_sums_up(name):
    listed = run(app, ["--help"], env={"COLUMNS": "300"}).output
    assert COMMANDS[name][1] in " ".join(listed.split())
    shown = run(app, [name, "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert "…" not in shown.output.replace("cuda:1, …", "")
    assert "--verbose" in shown.output


def test_no_option_is_cut_where_a_terminal_is_narrow():
    shown = run(app, ["prune", "--help"], env={"COLUMNS": "80"}).output
    for each in options_of(Request):
        assert f"--{each.name.replace('_', '-')}" in shown


def test_a_mistyped_option_or_command_is_told_what_it_may_have_been():
    assert "--samples" in run(app, ["prune", "m", "--out", "o", "--sampels", "3"]).output
    result = run(app, ["prun"])
    assert result.exit_code == EXIT_REFUSED
    assert "unknown command 'prun': did you mean 'prune'?" in " ".join(result.output.split())


def test_what_led_to_an_error_is_told_on_request(monkeypatch):
    def unreachable(*_arguments, **_options):
        raise InputError("the hub cannot be reached") from ConnectionError("no route to host")

    monkeypatch.setattr("halve.whole_model.resolve", unreachable)
    arguments = ["prune", "org/model", "--out", "o"]
    plain = run(app, arguments)
    assert plain.exit_code == EXIT_REFUSED
    assert plain.stderr == "error: the hub cannot be reached\n"
    assert "no route to host" in run(app, [*arguments, "--verbose"]).stderr


def test_whoever_stops_reading_ends_the_command_quietly():
    code = (
        "import typer; from halve.cli.errors import reporting\n"
        "def talk():\n    with reporting():\n        print('x' * 10**6, flush=True)\ntyper.run(talk)"
    )
    shell = f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    pipe = subprocess.run(["/bin/bash", "-c", shell], capture_output=True, check=False)
    assert (pipe.returncode, pipe.stdout, pipe.stderr) == (0, b"x", b"")
