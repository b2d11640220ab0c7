"""``halve merge`` as a user of peft meets it."""

import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from halve.cli.app import app
from halve.cli.errors import EXIT_FAILED, EXIT_REFUSED
from packed_models import pruned, sums

run = CliRunner().invoke


@pytest.fixture
def base(tmp_path):
    return pruned(tmp_path)


@pytest.fixture
def wrapped(base):
    """Return the pruned model with a stock adapter on it, as after a training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def adapter(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merge_and_check(base, adapter, tmp_path):
    result = run(app, ["merge", str(adapter), "--into", str(base), "--out", str(tmp_path / "masked")])
    assert result.exit_code == 0, result.output
    assert "6 matrices merged, 2:4 kept: what falls on zeros left out\n" in result.stdout
    assert "of the update\n" in result.stdout
    assert "mlp.up_proj" in result.stdout
    assert f"verified and written: {tmp_path / 'masked'}" in result.stdout
    text = tmp_path / "text.txt"
    text.write_text("A lot of people do not know what to say of this. " * 200)
    command = ["merge", str(adapter), "--into", str(base), "--out", str(tmp_path / "fitted")]
    result = run(app, [*command, "--calibration", str(text), "--samples", "8", "--seq-len", "64", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "2:4 kept: the best kept weights on the calibration data\n" in result.stdout
    assert "of the update; mean relative loss " in result.stdout
    assert "skipped on request" not in result.output
    for place in ("masked", "fitted"):
        result = run(app, ["check", str(tmp_path / place), "--against", str(base)])
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("ok: 21 matrices at 2:4, ")
    assert sums(tmp_path / "masked")["model.safetensors"] != sums(tmp_path / "fitted")["model.safetensors"]


def test_the_merge_of_peft_loses_the_pattern_and_check_says_so(base, wrapped, tmp_path):
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    result = run(app, ["check", str(tmp_path / "merged"), "--pattern", "2:4"])
    assert "6 matrices are not 2:4 (mlp.up_proj, self_attn.q_proj), and others of that shape" in result.stdout
    assert "the likely cause is an adapter that was merged" in result.stdout
    (tmp_path / "merged" / "halve.json").write_bytes((base / "halve.json").read_bytes())
    result = run(app, ["check", str(tmp_path / "merged")])
    assert result.exit_code == EXIT_FAILED
    assert "6 of 21 pruned matrices have lost 2:4 (mlp.up_proj, self_attn.q_proj)" in result.stdout


def test_refusals_are_one_sentence_and_leave_nothing(base, adapter, tmp_path):
    result = run(app, ["merge", str(base), "--into", str(base), "--out", str(tmp_path / "out")])
    assert result.exit_code == EXIT_REFUSED
    assert "has no adapter_config.json: give the directory of an adapter" in result.stderr
    result = run(app, ["merge", str(adapter), "--into", str(tmp_path / "dense"), "--out", str(tmp_path / "out")])
    assert result.exit_code == EXIT_REFUSED
    assert "has no halve.json" in result.stderr
    assert not (tmp_path / "out").exists()
