import json

import pytest
from typer.testing import CliRunner

from halve.cli.app import app
from halve.cli.errors import EXIT_FAILED, EXIT_REFUSED
from models import decoder, save
from packed_models import edit_tensor, packed, prune_layers, pruned, record_again, sums
from tiny_tokenizers import byte_bpe

run = CliRunner().invoke


@pytest.fixture
def plain(tmp_path):
    return pruned(tmp_path)


def test_pack_check_unpack_check(plain, tmp_path):
    (plain / "pytorch_model.bin").write_bytes(b"")
    result = run(app, ["pack", str(plain), "--out", str(tmp_path / "packed")])
    assert result.exit_code == 0, result.output
    assert "as they were" in result.stdout
    assert "note: not taken along, no files of a model: pytorch_model.bin\n" in result.stdout
    assert "packed: 21 matrices, 0.1 MB of weights are now 0.1 MB (0." in result.stdout
    (plain / "pytorch_model.bin").unlink()
    result = run(app, ["check", str(tmp_path / "packed")])
    assert result.exit_code == 0
    assert result.stdout.startswith("ok: 21 matrices at 2:4, ")
    result = run(app, ["unpack", str(tmp_path / "packed"), "--out", str(tmp_path / "back")])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"restored: {len(sums(plain))} files, each with the sha256 that the packed")
    assert sums(tmp_path / "back") == sums(plain)
    assert run(app, ["check", str(tmp_path / "back")]).exit_code == 0


def test_what_is_left_dense_is_said(plain, tmp_path):
    for number in range(4):
        name = f"model.layers.{min(number, 2)}.{'mlp.up_proj' if number < 3 else 'mlp.gate_proj'}.weight"
        edit_tensor(plain / "model.safetensors", name, lambda tensor: tensor.double())
    record_again(plain)
    result = run(app, ["pack", str(plain), "--out", str(tmp_path / "packed")])
    assert result.exit_code == 0, result.output
    assert "note: left dense, float64 is not packed: " in result.stdout
    assert "and 1 more" in result.stdout


def test_refusals_are_one_sentence_and_leave_nothing(plain, tmp_path):
    (plain / "halve.json").unlink()
    result = run(app, ["pack", str(plain), "--out", str(tmp_path / "packed")])
    assert result.exit_code == EXIT_REFUSED
    assert "has no halve.json: give the pattern of its matrices (--pattern 2:4)" in result.stderr
    result = run(app, ["unpack", str(plain), "--out", str(tmp_path / "back")])
    assert result.exit_code == EXIT_REFUSED
    assert "is no packed checkpoint" in result.stderr
    assert not (tmp_path / "packed").exists()
    assert not (tmp_path / "back").exists()


def test_a_damaged_one_fails_the_check(tmp_path):
    directory = packed(tmp_path)
    data = bytearray((directory / "packed.safetensors").read_bytes())
    data[-200] ^= 1
    (directory / "packed.safetensors").write_bytes(data)
    result = run(app, ["check", str(directory)])
    assert result.exit_code == EXIT_FAILED
    assert "problem: packed.safetensors does not have the sha256" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"{directory} failed: packed.safetensors does not have the sha256")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pattern", "2:4"], "checked for the pattern that halve-packed.json names: leave that out (--pattern)"),
        (["--against", "dense"], "is not compared with an original: leave that out (--against), or restore"),
    ],
)
def test_what_a_packed_one_is_not_checked_for_is_said_in_one_sentence(options, words, tmp_path):
    result = run(app, ["check", str(packed(tmp_path)), *options])
    assert result.exit_code == EXIT_REFUSED
    assert words in " ".join(result.stderr.split())


def test_integers_are_solved_for_and_progress_is_told(checkpoint, text, tmp_path):
    asked = ["--calibration", text, "--samples", "4", "--seq-len", "16"]
    result = run(app, ["prune", str(checkpoint), "--out", str(tmp_path / "plain"), "--method", "wanda", *asked])
    assert result.exit_code == 0, result.output
    result = run(app, ["pack", str(tmp_path / "plain"), "--out", str(tmp_path / "rounded"), "--values", "int4"])
    assert result.exit_code == 0, result.output
    assert "packing: 21 of 21 matrices\n" in result.stderr
    assert result.stderr.count("packing: ") == 10
    assert "rounding to int4 has moved the kept weights of 21 of 21 matrices by " in result.stdout
    result = run(app, ["pack", str(tmp_path / "plain"), "--out", str(tmp_path / "solved"), "--values", "int4", *asked])
    assert result.exit_code == 0, result.output
    assert "block 3/3 model.layers.2.mlp.down_proj.weight relative loss" in result.stderr
    assert "integers times scales already: int4 moves none" in result.stdout
    run(
        app,
        ["prune", str(checkpoint), "--out", str(tmp_path / "grid"), "--values", "int4", "--method", "wanda", *asked],
    )
    assert json.loads((tmp_path / "grid" / "halve.json").read_text())["refit"] == "int4"
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensor(tmp_path / "grid" / "model.safetensors", name, lambda weight: weight * 1.01)
    record_again(tmp_path / "grid")
    result = run(app, ["pack", str(tmp_path / "grid"), "--out", str(tmp_path / "some"), "--values", "int4"])
    assert "has moved the kept weights of 1 of 21 matrices by 0." in result.stdout
    assert f"(no integers before; the first is {name})" in result.stdout
    result = run(app, ["pack", str(tmp_path / "plain"), "--out", str(tmp_path / "no"), "--samples", "4"])
    assert result.exit_code == EXIT_REFUSED
    result = run(app, ["prune", str(checkpoint), "--out", str(tmp_path / "no"), "--values", "int8", *asked])
    assert "only int4 is solved for" in result.stderr


@pytest.mark.parametrize("command", ["prune", "compare", "report"])
def test_other_commands_refuse_a_packed_one_and_say_how_to_go_on(command, tmp_path):
    directory, text = packed(tmp_path), tmp_path / "text.txt"
    text.write_text("some words " * 400)
    data = ["--data", str(text), "--seq-len", "16"]
    options = {
        "prune": ["--out", str(tmp_path / "out"), "--method", "magnitude", "--refit", "none"],
        "compare": [*data, "--calibration", str(text)],
        "report": [],
    }[command]
    result = run(app, [command, str(directory), *options])
    assert result.exit_code == EXIT_REFUSED, result.output
    assert f"restore the plain one with `halve unpack {directory} --out DIR`" in result.stderr


@pytest.mark.parametrize("more", [[], ["--pattern", "2:4"], ["--calibration", "missing.txt"]])
def test_an_unknown_kind_of_values_is_refused_before_anything_is_read(more, tmp_path):
    result = run(app, ["pack", str(tmp_path / "nowhere"), "--out", str(tmp_path / "packed"), "--values", "int3", *more])
    assert result.exit_code == EXIT_REFUSED
    assert "values is 'int3': give own, bf16, int8 or int4" in result.stderr


def test_a_pattern_that_is_not_quantised_is_refused_with_what_to_do(tmp_path):
    save(prune_layers(decoder("llama", vocab_size=320), "1:4"), tmp_path / "plain")
    byte_bpe().save_pretrained(tmp_path / "plain")
    plain = tmp_path / "plain"
    result = run(app, ["pack", str(plain), "--out", str(tmp_path / "packed"), "--values", "int8", "--pattern", "1:4"])
    assert result.exit_code == EXIT_REFUSED
    assert "quantised at 2:4 alone, not at 1:4: prune to 2:4, or leave values out, which keeps the numbers" in " ".join(
        result.stderr.split()
    )
    assert not (tmp_path / "packed").exists()
