import json
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halve.cli.app import app
from halve.cli.errors import EXIT_FALLBACKS, EXIT_REFUSED, EXIT_STOPPED
from halve.runtime import speed
from halve.runtime.speed import Speed
from models import OF_ONE_RUN, decoder, encoder_decoder
from tiny_tokenizers import byte_bpe

run = CliRunner().invoke
FAST = ["--samples", "4", "--seq-len", "16", "--method", "wanda", "--refit", "none"]
# Python in the background of a shell would not hear SIGINT.
HALVE = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from halve.cli.app import main; main()",
]


def test_reconstruction_is_reported_recorded_and_verified(model, text, tmp_path):
    out = tmp_path / "out"
    asked = ["--reconstruct", "block", "--reconstruct-epochs", "2", "--reconstruct-learning-rate", "0.001"]
    result = run(app, ["prune", model, "--out", str(out), "--calibration", text, *FAST, *asked])
    assert result.exit_code == 0, result.output
    assert "3 of 3 blocks gained by reconstruction: training error times" in result.output
    record = json.loads((out / "halve.json").read_text())
    assert record["reconstruction"] == {"epochs": 2, "learning_rate": 0.001, "held_out": 0.125}
    assert [block["name"] for block in record["blocks"]] == [f"model.layers.{i}" for i in range(3)]
    result = run(app, ["check", str(out), "--against", model])
    assert result.exit_code == 0, result.output
    record["blocks"] = []
    (out / "halve.json").write_text(json.dumps(record))
    result = run(app, ["check", str(out), "--against", model])
    assert "was neither pruned nor tuned and differs" in result.output


def last_line(result):
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()[-1]


def test_the_last_line_names_the_command_that_goes_on(model, text, tmp_path):
    out = str(tmp_path / "my out")
    line = last_line(run(app, ["prune", model, "--out", f"{out}/", "--calibration", text, *FAST]))
    label, command = line.split(": ", 1)
    assert label == "train what is left"
    assert shlex.split(command) == ["halve", "finetune", out, "--out", f"{out}-finetuned", "--data", text]
    rows = tmp_path / "text.jsonl"
    rows.write_text(json.dumps({"body": Path(text).read_text(encoding="utf-8")}), encoding="utf-8")
    asked = ["--calibration", str(rows), "--text-field", "body"]
    line = last_line(run(app, ["prune", model, "--out", str(tmp_path / "rows"), *asked, *FAST]))
    assert line.endswith(f"--data {rows} --text-field body")
    without = ["--method", "magnitude", "--refit", "none"]
    line = last_line(run(app, ["prune", model, "--out", str(tmp_path / "none"), *without]))
    assert line.endswith("-finetuned --data self")


def test_what_cannot_be_trained_on_text_gets_no_such_command(text, tmp_path):
    encoder_decoder("t5").save_pretrained(tmp_path / "t5")
    arguments = ["--method", "magnitude", "--refit", "none"]
    line = last_line(run(app, ["prune", str(tmp_path / "t5"), "--out", str(tmp_path / "out"), *arguments]))
    assert line.startswith("report: ")


def record_of(model, text, out, *arguments):
    fixed = ["--calibration", text, "--samples", "4", "--seq-len", "16"]
    result = run(app, ["prune", model, "--out", str(out), *fixed, *arguments])
    assert result.exit_code == 0, result.output
    return json.loads((out / "halve.json").read_text())


def test_shrinkage_and_targets_are_recorded_and_reach_the_matrices(model, text, tmp_path):
    asked = ["--shrinkage", "0.1", "--match-dense", "0.5", "--match-ridge", "0.2"]
    record = record_of(model, text, tmp_path / "out", "--method", "wanda", *asked)
    assert record["objective"] == {"shrinkage": 0.1, "match_dense": 0.5, "match_ridge": 0.2}
    assert {matrix["facts"]["shrinkage"] for matrix in record["matrices"]} == {0.1}
    plain = record_of(model, text, tmp_path / "plain", "--method", "wanda")
    assert plain["objective"] == {"shrinkage": 0.0, "match_dense": 0.0, "match_ridge": 0.1}
    assert not any("shrinkage" in matrix["facts"] for matrix in plain["matrices"])
    named = record_of(model, text, tmp_path / "named", "--method", "wanda", "--shrinkage", "auto")
    assert named["objective"]["shrinkage"] == "auto"
    assert any(matrix["facts"].get("shrinkage", 0.0) > 0.0 for matrix in named["matrices"])
    default = record_of(model, text, tmp_path / "default")
    assert default["objective"] == {"shrinkage": "auto", "match_dense": 0.25, "match_ridge": 0.1}
    fast = record_of(model, text, tmp_path / "fast", "--effort", "fast")
    assert fast["objective"] == {"shrinkage": "auto", "match_dense": 0.0, "match_ridge": 0.1}
    assert fast["options"]["refit_tolerance"] == 0.01
    given = record_of(
        model, text, tmp_path / "given", "--effort", "fast", "--match-dense", "0.5", "-o", "refit_tolerance=0.1"
    )
    assert (given["objective"]["match_dense"], given["options"]["refit_tolerance"]) == (0.5, 0.1)


def test_a_time_limit_is_an_option_of_auto(model, text, tmp_path):
    record = record_of(model, text, tmp_path / "out", "--effort", "fast", "--time-limit", "0.001")
    assert (record["options"]["effort"], record["options"]["time_limit"]) == ("fast", 0.001)
    assert record["reconstruction"] is None
    assert record_of(model, text, tmp_path / "no", "--effort", "fast")["options"]["time_limit"] is None


def test_the_best_effort_tunes_the_blocks_unless_told_not_to(model, text, tmp_path):
    best = ["--effort", "best"]
    tuned = record_of(model, text, tmp_path / "tuned", *best)
    assert tuned["reconstruction"] == {"epochs": 6, "learning_rate": None, "held_out": 0.125}
    assert len(tuned["blocks"]) == 3
    shorter = record_of(model, text, tmp_path / "shorter", *best, "--reconstruct-epochs", "1")
    assert shorter["reconstruction"]["epochs"] == 1
    plain = record_of(model, text, tmp_path / "plain", *best, "--reconstruct", "none")
    assert plain["reconstruction"] is None
    assert plain["blocks"] == []


def test_matrices_that_are_not_faster_stay_dense_and_are_named(model, text, tmp_path, monkeypatch):
    def measure(d_out, d_in, batches, **_):
        return [
            Speed(
                d_out=d_out,
                d_in=d_in,
                batch=batches[0],
                dense_seconds=1.0 if d_out == 16 else 1.3,
                sparse_seconds=1.0,
                dense_call_seconds=0.0,
                sparse_call_seconds=0.0,
            )
        ]

    monkeypatch.setattr(speed, "measure", measure)
    arguments = ["prune", model, "--out", str(tmp_path / "out"), "--calibration", text, *FAST]
    result = run(app, [*arguments, "--only-where-faster", "1.1", "--faster-at-batch", "8"])
    assert result.exit_code == 0, result.output
    reason = "2:4 is 1.00 times as fast as dense at batch 8 on this machine, less than the 1.1 asked for"
    assert f"left dense: 3 x self_attn.k_proj: {reason}\n" in result.stdout
    assert f"left dense: 3 x self_attn.v_proj: {reason}\n" in result.stdout
    assert "15 matrices at 2:4 by wanda" in result.stdout
    assert "measuring which matrices are faster sparse" in result.stderr
    record = json.loads((tmp_path / "out" / "halve.json").read_text())
    assert [entry["reason"] for entry in record["excluded"]].count(reason) == 6
    result = run(app, ["check", str(tmp_path / "out"), "--against", model])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "only_where_faster.factor" in page
    result = run(app, ["prune", model, "--out", str(tmp_path / "no"), *arguments[4:], "--only-where-faster", "1.4"])
    assert result.exit_code == EXIT_REFUSED, result.output
    assert "error: no matrix is 1.4 times as fast at 2:4 as dense at batch 1 on this machine" in result.stderr
    assert not (tmp_path / "no").exists()


def test_matrices_that_cost_most_stay_dense_and_are_counted(model, text, tmp_path):
    arguments = ["prune", model, "--out", str(tmp_path / "out"), "--calibration", text, *FAST, "--keep-dense", "20%"]
    result = run(app, [*arguments, "--keep-dense-tokens", "64"])
    assert result.exit_code == 0, result.output
    assert "measuring which matrices cost most" in result.stderr
    record = json.loads((tmp_path / "out" / "halve.json").read_text())
    assert record["keep_dense"]["tokens"] == 64
    counts = Counter(".".join(name.split(".")[3:5]) for name in record["keep_dense"]["kept"])
    for kind, count in counts.items():
        assert f"left dense: {count} x {kind}: costs most per weight (keep_dense 20%)\n" in result.stdout
    assert result.stdout.count("left dense: ") == len(counts) > 1


def test_too_little_text_is_refused(model, tmp_path):
    (tmp_path / "short.txt").write_text("two words")
    arguments = ["--calibration", str(tmp_path / "short.txt"), "--samples", "2", "--seq-len", "8"]
    result = run(app, ["prune", model, "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == EXIT_REFUSED
    assert "give more text, or fewer samples" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "5:4"], "pattern '5:4' is not understood"),
        (["--method", "wandda"], "did you mean 'wanda'"),
        (["-o", "betta=1"], "betta"),
        (["-o", "beta"], "write NAME=VALUE"),
        (["-o", "model=3"], "has no option 'model': its options are effort, time_limit, refit_tolerance"),
        (["--effort", "hurry"], "effort must be one of fast, balanced, best, got 'hurry'"),
        (["--effort", "best", "--method", "wanda"], "wanda+cg has no option 'effort'"),
        (["--time-limit", "0"], "time_limit of auto must be a finite number above 0, got 0.0"),
        (["--time-limit", "nan"], "time_limit of auto must be a finite number above 0, got nan"),
        (["--time-limit", "5", "--method", "wanda"], "wanda+cg has no option 'time_limit'"),
        (["--shrinkage", "much"], "shrinkage must be auto or a number from 0 to 1, got 'much'"),
        (["--shrinkage", "1.5"], "shrinkage must be auto or a number from 0 to 1, got 1.5"),
        (["--shrinkage", "nan"], "shrinkage must be auto or a number from 0 to 1, got nan"),
        (["--match-dense", "2"], "match_dense must be a number from 0 to 1, got 2.0"),
        (["--match-dense", "nan"], "match_dense must be a number from 0 to 1, got nan"),
        (["--match-ridge", "0"], "match_ridge must be a finite number above 0, got 0.0"),
        (["--reconstruct-epochs", "2"], "'epochs' is an option of the reconstruction"),
        (
            ["--effort", "best", "--reconstruct", "none", "--reconstruct-learning-rate", "1"],
            "'learning_rate' is an option of the",
        ),
        (["--only-where-faster", "0"], "only_where_faster must be a finite number above 0, got 0.0"),
        (["--only-where-faster", "nan"], "only_where_faster must be a finite number above 0, got nan"),
        (["--only-where-faster", "1.1", "--faster-at-batch", "0"], "faster_at_batch must be a whole number of at"),
        (["--faster-at-batch", "8"], "--faster-at-batch goes with --only-where-faster, which is not given"),
        (["--keep-dense", "10"], "keep_dense = '10' is neither a share of the weights between 0% and 100%"),
        (["--keep-dense-tokens", "8"], "--keep-dense-tokens goes with --keep-dense, which is not given"),
        (["--reconstruct", "blocks"], "reconstruct 'blocks' is not understood"),
        (["-o", "seed=3"], "has no option 'seed'"),
        (["-o", "shrinkage=0.1"], "shrinkage is not an option of auto+cg: write --shrinkage"),
        (["-o", "effort=fast", "--effort", "best"], "effort is given twice: give it once, by -o or by --effort"),
        (["--fallback", "None"], "fallback 'None' is unknown: choose one of magnitude, wanda, or leave it out"),
        (["--reconstruct", "block", "--reconstruct-epochs", "0"], "(--reconstruct-epochs) must be a whole number"),
        (
            ["--method", "prox-gradient", "-o", "beta=abc"],
            "beta of prox-gradient must be a finite number above 1, got 'abc'",
        ),
        (["-o", "refit_tolerance=x"], "refit_tolerance must be"),
        (["--pattern", "[/red][bold]"], "pattern '[/red][bold]' is not understood"),
        (["--device", "mps"], "device 'mps'"),
        (["--calibration", "no/such.txt"], "does not exist"),
        (["--dtype", "int8"], "dtype 'int8' is not known"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--refit", "sgd"], "unknown refit 'sgd'"),
    ],
)
def test_one_sentence_and_exit_code_2_for_bad_input(model, tmp_path, arguments, message):
    result = run(app, ["prune", model, "--out", str(tmp_path / "out"), "--samples", "2", "--seq-len", "8", *arguments])
    assert result.exit_code == EXIT_REFUSED
    assert message in result.output
    assert len(result.stderr.splitlines()) == 1
    assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "out").exists()


def test_a_run_that_stops_is_resumed_with_a_fallback_and_then_has_its_own_exit_code(tmp_path, text):
    dead = decoder("llama", vocab_size=320)
    dead.model.layers[1].self_attn.v_proj.weight.data.zero_()
    dead.save_pretrained(tmp_path / "dense")
    byte_bpe().save_pretrained(tmp_path / "dense")
    arguments = ["prune", str(tmp_path / "dense"), "--calibration", text, *FAST]
    stopped = str(tmp_path / "one")
    result = run(app, [*arguments, "--out", stopped])
    assert result.exit_code == EXIT_STOPPED
    assert "model.layers.1.self_attn.o_proj.weight could not be pruned by wanda" in result.output
    assert f"finished blocks are kept in {stopped}: continue with `halve resume {stopped}`" in result.output
    assert run(app, ["resume", stopped]).exit_code == EXIT_STOPPED
    result = run(app, ["resume", stopped, "--fallback", "magnitude"])
    assert result.exit_code == EXIT_FALLBACKS, result.output
    assert "1 of 21 matrices fell back" in result.output
    result = run(app, [*arguments, "--out", str(tmp_path / "two"), "--no-strict"])
    assert result.exit_code == EXIT_FALLBACKS
    assert "1 of 21 matrices fell back" in result.output
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in set(names) - OF_ONE_RUN:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    result = run(app, ["resume", stopped])
    assert result.exit_code == EXIT_FALLBACKS  # that of its record
    assert "holds a finished checkpoint: nothing is left to do" in result.output


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(model, text, tmp_path, sent):
    out = tmp_path / "out"
    arguments = ["--calibration", text, "--samples", "64", "--seq-len", "64", "--method", "prox-gradient"]
    arguments += ["-o", "beta=1.02", "--work", str(tmp_path / "work")]
    command = [*HALVE, "prune", model, "--out", str(out), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("block 2"):
                break
        process.send_signal(sent)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert f"continue with `halve resume {out}`" in rest
    assert "Traceback" not in rest
    assert (tmp_path / "work" / "block-00000.safetensors").exists()
    result = run(app, ["prune", model, "--out", str(out), *arguments, "--pattern", "1:4"])
    assert result.exit_code == EXIT_REFUSED
    assert "pattern was 2:4 and is 1:4" in result.output
    assert subprocess.run([sys.executable, "-m", "halve", "resume", str(out)], check=False).returncode == 0
    assert run(app, ["check", str(out), "--against", model]).exit_code == 0
    assert not (tmp_path / "work").exists()


def test_ctrl_c_leaves_no_checkpoint(model, text, tmp_path):
    out = tmp_path / "out"
    command = [*HALVE, "prune", model, "--out", str(out), "--calibration", text]
    options = ["--samples", "64", "--seq-len", "64", "--method", "prox-gradient", "-o", "beta=1.0001"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("block"):
                break
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert not out.exists()
