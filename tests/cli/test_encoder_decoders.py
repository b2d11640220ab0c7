"""Encoder-decoders from the command line: pruned on text and on pairs, measured, resumed and compared."""

import json

import pytest
from typer.testing import CliRunner

import halve
from halve.cli.app import app
from halve.errors import HalveError
from halve.evaluation.figure import SECOND_HALF
from halve.run.directory import RunDirectory
from models import OF_ONE_RUN, decoder, encoder_decoder
from tiny_tokenizers import SENTENCES, sentinels, surrounding, word_level

FAST = ["--method", "wanda", "--refit", "none"]


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def t5(tmp_path):
    """A tiny T5 on disk, with a tokenizer that has sentinels."""
    place = tmp_path / "t5"
    model = encoder_decoder("t5")
    model.resize_token_embeddings(128)
    model.save_pretrained(place)
    surrounding(sentinels(60), "$A </s>").save_pretrained(place)
    return place


@pytest.fixture
def pairs(tmp_path):
    lines = [{"source": sentence, "target": SENTENCES[index - 1]} for index, sentence in enumerate(SENTENCES)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "pairs.jsonl"


def recorded(out):
    return json.loads((out / "halve.json").read_text())["calibration"]


def test_text_is_enough_to_prune_and_to_measure(t5, text, tmp_path):
    out = tmp_path / "out"
    asked = ["--samples", 4, "--seq-len", 130, "--eval-data", text, "--eval-max-windows", 3]
    result = run("prune", t5, "--out", out, "--calibration", text, *asked, *FAST)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert f"3 windows of 130 tokens, {SECOND_HALF}, no BOS" in words
    assert "is both calibrated on and evaluated on: perplexities on it flatter" in words
    record = recorded(out)
    assert (record["pairs"], record["encoder_tokens"], record["decoder_tokens"]) == ("halves", 260, 260)
    assert json.loads((out / "halve-measured.json").read_text())["perplexity"][0]["scored"] == SECOND_HALF
    assert SECOND_HALF.replace("'", "&#x27;") in (out / "report.html").read_text().replace("&#39;", "&#x27;")
    assert run("check", out, "--against", t5).exit_code == 0
    result = run("eval", t5, out, "--data", text, "--seq-len", 64, "--max-windows", 3)
    assert result.exit_code == 0, result.output
    assert "±" in result.output
    assert f"of encoder-decoders {SECOND_HALF}" in " ".join(result.output.split())
    result = run("report", out, "--data", text, "--max-windows", 3)
    assert result.exit_code == 0, result.output
    assert "3 windows of 130 tokens" in " ".join(result.output.split())


def test_spans_may_be_masked(t5, text, tmp_path):
    out = tmp_path / "out"
    asked = ["--samples", 2, "--seq-len", 400, "--span-corruption"]
    result = run("prune", t5, "--out", out, "--calibration", text, *asked, *FAST)
    assert result.exit_code == 0, result.output
    assert recorded(out)["pairs"] == "span corruption"


def test_pairs_are_read(t5, pairs, text, tmp_path):
    out = tmp_path / "out"
    asked = ["--samples", 4, "--pair-fields", "source,target"]
    result = run("prune", t5, "--out", out, "--calibration", pairs, *asked, *FAST)
    assert result.exit_code == 0, result.output
    assert recorded(out)["pairs"] == "fields source and target"
    compared = ["--methods", "wanda,magnitude", "--eval-seq-len", 64, "--json"]
    result = run("compare", t5, "--data", text, "--calibration", pairs, *asked, *compared)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["calibration"]["sha256"] == recorded(out)["sha256"]
    assert [row["perplexities"][0]["scored"] for row in found["rows"]] == [SECOND_HALF] * 3


@pytest.mark.parametrize("fields", [None, "source,target"])
def test_a_stopped_run_goes_on_to_the_same_bytes(t5, text, pairs, fields, tmp_path, monkeypatch):
    asked = ["--calibration", pairs if fields else text, "--samples", 4, *(["--pair-fields", fields] if fields else [])]
    asked += FAST if fields else [*FAST, "--seq-len", "128"]
    assert run("prune", t5, "--out", tmp_path / "whole", *asked).exit_code == 0
    commit = RunDirectory.commit

    def stopping(self, *arguments):
        if self.committed == 3:  # two blocks of the encoder and one of the decoder
            raise HalveError("stopped")
        commit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "commit", stopping)
        assert run("prune", t5, "--out", tmp_path / "out", *asked).exit_code == 4
    result = run("resume", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "whole").iterdir():
        if path.name not in OF_ONE_RUN:
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_cut_text_from_afar_is_kept_for_a_run_that_goes_on(t5, text, tmp_path, monkeypatch):
    from halve.text import calibration, documents

    monkeypatch.setattr(calibration, "is_on_hub", lambda source: source == "c4")
    local = documents.open_corpus
    for module in ("halve.text.calibration", "halve.text.halves"):
        monkeypatch.setattr(f"{module}.open_corpus", lambda _source, **options: local(text, **options))
    commit = RunDirectory.commit

    def stopping(self, *arguments):
        if self.committed == 1:
            raise HalveError("stopped")
        commit(self, *arguments)

    asked = {"calibration": "c4", "samples": 2, "seq_len": 128, "method": "wanda", "refit": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "commit", stopping)
        with pytest.raises(HalveError, match="stopped"):
            halve.prune(t5, tmp_path / "out", **asked)
    monkeypatch.setattr("halve.text.halves.open_corpus", None)  # nothing is asked for again
    assert halve.resume(tmp_path / "out").record["calibration"]["pairs"] == "halves"


def test_nothing_is_loaded_of_a_model_that_cannot_write_its_own_text(t5, tmp_path, monkeypatch):
    monkeypatch.setattr("halve.whole_model.load_model", None)
    result = run("prune", t5, "--out", tmp_path / "out")
    assert result.exit_code == 2
    words = " ".join(result.output.split())
    assert "is an encoder-decoder, which cannot write its own calibration text: give calibration, a text" in words
    assert not (tmp_path / "out").exists()


def test_a_method_that_needs_no_data_needs_none_here_either(t5, tmp_path):
    result = run("prune", t5, "--out", tmp_path / "out", "--method", "magnitude", "--refit", "none")
    assert result.exit_code == 0, result.output


def test_flags_are_named_as_flags(tmp_path, pairs):
    decoder("llama").save_pretrained(tmp_path / "llama")
    word_level().save_pretrained(tmp_path / "llama")
    asked = ["--calibration", pairs, "--samples", 4, "--pair-fields", "source,target"]
    result = run("prune", tmp_path / "llama", "--out", tmp_path / "out", *asked)
    assert result.exit_code == 2
    assert "--pair-fields is for encoder-decoders, and LlamaForCausalLM is none" in " ".join(result.output.split())
    result = run("prune", tmp_path / "llama", "--out", tmp_path / "out", *asked, "--span-corruption")
    assert result.exit_code == 2
    assert "--pair-fields is for pairs, --span-corruption for plain text" in " ".join(result.output.split())


def test_text_is_generated(t5):
    result = run("generate", t5, "--prompt", "the quick brown", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
