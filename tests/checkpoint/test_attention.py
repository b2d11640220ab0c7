import json

import pytest
from typer.testing import CliRunner

import halve
from halve.checkpoint.load import load_model
from halve.cli.app import app
from halve.errors import InputError
from models import decoder, edit_json, tokens

KEPT = "the config names flash_attention_2, which needs a GPU and a package of its own: it is kept, and Halve runs"


@pytest.fixture(params=["attn_implementation", "_attn_implementation"])
def flash(llama, request):
    """A checkpoint whose config asks for what is not installed here."""
    edit_json(llama / "config.json", **{request.param: "flash_attention_2"})
    return llama


def test_a_config_that_names_flash_attention_is_followed_in_what_is_written_alone(flash, tmp_path):
    loaded = load_model(flash)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.notes[0].startswith(KEPT)
    pruned = halve.prune(flash, tmp_path / "out", calibration=tokens(4), method="wanda", refit="none", device="cpu")
    assert any(note.startswith(KEPT) for note in pruned.notes)
    assert (tmp_path / "out" / "config.json").read_bytes() == (flash / "config.json").read_bytes()
    assert halve.check(tmp_path / "out", against=flash).ok


def test_attention_is_chosen_for_the_passes_of_a_run(llama, tmp_path):
    one, other = (
        halve.prune(llama, tmp_path / kind, calibration=tokens(4), method="wanda", refit="none", attention=kind)
        for kind in ("eager", "sdpa")
    )
    assert one.model.config._attn_implementation == "eager"
    assert other.model.config._attn_implementation == "sdpa"
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert float(((a == 0) != (b == 0)).double().mean()) < 0.01
    assert "attention" not in (tmp_path / "eager" / "config.json").read_text().replace("attention_", "")


def test_attention_that_cannot_run_everywhere_is_refused(llama, tmp_path):
    result = CliRunner().invoke(app, ["prune", str(llama), "--out", str(tmp_path / "out"), "--attention", "flash"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: attention 'flash' is not one that runs on every device: choose among eager")
    with pytest.raises(InputError, match="attention is for a model that Halve loads"):
        halve.prune(decoder("llama"), calibration=tokens(4), attention="eager")


def test_a_config_that_wants_tuples_is_measured_pruned_and_kept(checkpoint, text, tmp_path):
    edit_json(checkpoint / "config.json", return_dict=False, output_hidden_states=True, use_cache=True)
    options = {"calibration": text, "samples": 4, "seq_len": 16, "eval_data": [text], "eval_seq_len": 16}
    pruned = halve.prune(checkpoint, tmp_path / "out", method="wanda", refit="none", device="cpu", **options)
    assert pruned.before
    assert pruned.after
    assert json.loads((tmp_path / "out" / "config.json").read_text())["return_dict"] is False


def test_a_config_that_wants_attention_weights_is_run_without_them_and_kept(checkpoint, text, tmp_path):
    """Its setter refuses the value that the config was read with."""
    edit_json(checkpoint / "config.json", output_attentions=True)
    options = {"calibration": text, "samples": 4, "seq_len": 16, "eval_data": [text], "eval_seq_len": 16}
    pruned = halve.prune(checkpoint, tmp_path / "out", method="wanda", refit="none", device="cpu", **options)
    assert pruned.after
    assert pruned.model.config.output_attentions is True
    assert (tmp_path / "out" / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
