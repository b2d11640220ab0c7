import json
from pathlib import Path

import pytest
import torch

import halve
from halve import judging
from halve.checkpoint.load import load_model
from halve.errors import CorruptFileError, HalveError, InputError
from halve.evaluation.perplexity import evaluation_texts, perplexity
from halve.evaluation.request import Evaluation
from halve.report.before_after import measure
from models import decoder, edit_json, tokens
from reported import prune_and_measure, write_record
from tiny_tokenizers import byte_bpe

FAST = {"method": "wanda", "refit": "none"}


def scores(directory):
    return json.loads((directory / "halve-measured.json").read_text())["perplexity"]


def directly(directory, text, seq_len=16, max_windows=2):
    """Measure what is on the disk, alone."""
    loaded = load_model(directory)
    (texts,) = evaluation_texts(loaded, [text], seq_len=seq_len, max_windows=max_windows, text_field="text")
    return perplexity(loaded.model, texts).value


def test_a_run_measures_before_and_after(checkpoint, text, tmp_path):
    out = prune_and_measure(checkpoint, text, tmp_path / "out", **FAST)
    (entry,) = scores(out)
    assert entry["before"] == pytest.approx(directly(checkpoint, text), rel=1e-6)
    assert entry["after"] == pytest.approx(directly(out, text), rel=1e-6)
    assert entry["before"] != entry["after"]
    assert (entry["source"], entry["seq_len"], entry["windows"]) == (text, 16, 2)
    assert f"{entry['after']:.2f}" in (out / "report.html").read_text()


def test_a_model_in_memory_is_measured_too(checkpoint, text):
    loaded = load_model(checkpoint)
    before = directly(checkpoint, text)
    evaluation = Evaluation([text], seq_len=16, max_windows=2)
    pruned = halve.prune(loaded.model, tokenizer=loaded.tokenizer, calibration=tokens(8), evaluation=evaluation, **FAST)
    assert pruned.before[0].value == pytest.approx(before, rel=1e-6)
    assert pruned.after[0].value > 0.0
    assert pruned.after[0].tokens_sha256 == pruned.before[0].tokens_sha256
    assert pruned.notes == ()


def test_what_was_rounded_on_the_disk_is_measured_rounded(checkpoint, text, tmp_path):
    loaded = load_model(checkpoint)
    out, evaluation = tmp_path / "out", Evaluation([text], seq_len=16, max_windows=2, forward_dtype="float32")
    options = {"calibration": tokens(8), "dtype": torch.float16, "evaluation": evaluation}
    pruned = halve.prune(loaded.model, out, tokenizer=loaded.tokenizer, **options, **FAST)
    written = load_model(out)
    assert written.model.dtype == torch.float16
    texts = evaluation.texts(written, None)
    assert pruned.after[0].value == evaluation.measure(written.model, texts, torch.device("cpu"))[0].value


def test_a_resumed_run_measures_as_it_was_asked_to(checkpoint, text, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(step):
        if step.phase == "collect" and step.block == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        prune_and_measure(checkpoint, text, tmp_path / "out", listen=stop, **FAST)
    pruned = halve.resume(tmp_path / "out")
    whole = prune_and_measure(checkpoint, text, tmp_path / "whole", **FAST)
    assert scores(tmp_path / "out") == scores(whole)
    assert isinstance(hash(pruned.before[0]), int)  # as it was before it was put on record
    assert pruned.report.resumed_blocks == 1
    assert json.loads((tmp_path / "out" / "halve-measured.json").read_text())["resumed_blocks"] == 1


def test_the_dense_model_is_measured_once_however_often_a_run_is_stopped(checkpoint, text, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    def stop(step):
        if step.phase == "collect" and step.block == 1:
            raise StoppedError

    real, measured = Evaluation.measure, []

    def watched(self, model, texts, device, *weights):
        measured.append([text.source for text in texts])
        return real(self, model, texts, device, *weights)

    monkeypatch.setattr(Evaluation, "measure", watched)
    for _ in range(2):
        with pytest.raises(StoppedError):
            prune_and_measure(checkpoint, text, tmp_path / "out", listen=stop, **FAST)
    assert len(measured) == 1
    (tmp_path / "other.txt").write_text(" ".join(["other words of another text"] * 40))
    other = Evaluation([str(tmp_path / "other.txt")], 16, 2)
    options = {"calibration": text, "samples": 8, "seq_len": 16, "evaluation": other}
    with pytest.raises(StoppedError):
        halve.prune(checkpoint, tmp_path / "out", listen=stop, **options, **FAST)
    assert len(measured) == 2  # of another text nothing is known yet
    pruned = halve.resume(tmp_path / "out")
    assert len(pruned.before) == len(pruned.after) == 1


@pytest.mark.parametrize("error", [InputError("window 0 is not finite"), torch.OutOfMemoryError("full"), MemoryError()])
def test_a_measurement_that_fails_afterwards_is_a_note_beside_a_complete_checkpoint(
    checkpoint, text, tmp_path, monkeypatch, error
):
    real = Evaluation.measure

    def fails_on_sparse(self, model, texts, device, *weights):
        if any((parameter == 0).float().mean() > 0.4 for parameter in model.parameters()):
            raise error
        return real(self, model, texts, device, *weights)

    monkeypatch.setattr(Evaluation, "measure", fails_on_sparse)
    options = {"calibration": text, "samples": 8, "seq_len": 16, "evaluation": Evaluation([text], 16, 2)}
    pruned = halve.prune(checkpoint, tmp_path / "out", **options, **FAST)
    assert pruned.notes[-1] == f"the model is pruned, but its perplexity was not measured: {error}"
    assert pruned.after == ()
    assert halve.check(tmp_path / "out").ok
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ["missing.txt"]}, r"missing\.txt"),
        ({"data": []}, "give at least one"),
        ({"data": "wikitext2"}, "is not a list of texts"),
        ({"seq_len": 0}, "seq_len must be a whole number of at least 1, got 0"),
        ({"max_windows": 0}, "max_windows must be a whole number of at least 1, got 0"),
        ({"forward_dtype": "int8"}, "int8"),
        ({"seq_len": 4096}, "exceeds the model's max_position_embeddings"),
    ],
)
def test_bad_evaluations_are_refused_before_anything_is_done(checkpoint, text, tmp_path, changes, words):
    evaluation = Evaluation(**{"data": [text]} | changes)
    with pytest.raises(InputError, match=words):
        halve.prune(checkpoint, tmp_path / "out", calibration=text, samples=8, evaluation=evaluation, **FAST)
    assert not (tmp_path / "out").exists()


def test_a_finished_checkpoint_is_measured_later(checkpoint, text, tmp_path):
    out = tmp_path / "out"
    halve.prune(checkpoint, out, calibration=text, samples=8, seq_len=16, **FAST)
    assert scores(out) == []
    before, after = measure(out, Evaluation([text], max_windows=2))
    assert before[0].value == pytest.approx(directly(checkpoint, text), rel=1e-6)
    assert after[0].seq_len == 16  # as in calibration
    (entry,) = scores(out)
    assert (entry["before"], entry["after"]) == (before[0].value, after[0].value)
    assert measure(out, Evaluation([text], max_windows=2), dense="none")[0] == ()
    assert scores(out)[0]["before"] == before[0].value  # what is known of the dense model stays


def test_a_dense_model_that_is_gone_is_asked_for(checkpoint, text, tmp_path):
    out = tmp_path / "out"
    halve.prune(checkpoint, out, calibration=text, samples=8, seq_len=16, **FAST)
    checkpoint.rename(tmp_path / "moved")
    evaluation = Evaluation([text], max_windows=2)
    with pytest.raises(InputError, match=r"which is not here: say where that model is"):
        measure(out, evaluation)
    before, _ = measure(out, evaluation, dense=tmp_path / "moved")
    assert before[0].value > 0.0


def test_a_model_that_was_in_memory_has_no_before(text, checkpoint, tmp_path):
    loaded = load_model(checkpoint)
    halve.prune(loaded.model, tmp_path / "out", tokenizer=loaded.tokenizer, calibration=tokens(8), **FAST)
    before, after = measure(tmp_path / "out", Evaluation([text], max_windows=2))
    assert before == ()
    assert after[0].seq_len == 24


def test_only_what_halve_has_written_is_measured(checkpoint, text, tmp_path):
    with pytest.raises(InputError, match=r"has no halve\.json"):
        measure(checkpoint, Evaluation([text]))
    with pytest.raises(CorruptFileError, match=r"is not as Halve writes it: `source`: expected `object`, got `str`"):
        measure(write_record(tmp_path / "record", source="?"), Evaluation([text]))


def test_a_damaged_measurement_is_told_before_the_model_is_loaded(text, tmp_path):
    record = write_record(tmp_path, measured={})
    edit_json(record / "halve-measured.json", perplexity=3)
    with pytest.raises(CorruptFileError, match="is not as Halve writes it"):
        measure(record, Evaluation([text]))


def test_what_was_measured_is_told_though_it_cannot_be_put_on_record(checkpoint, text, tmp_path, monkeypatch):
    def full(*_):
        raise HalveError("volume full")

    monkeypatch.setattr(judging, "add_perplexity", full)
    options = {"calibration": tokens(8), "evaluation": Evaluation([text], 16, 2)}
    pruned = halve.prune(checkpoint, tmp_path / "out", **options, **FAST)
    assert pruned.notes == ("perplexity was measured, but not put on record: volume full",)
    assert pruned.after[0].value > 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": "short.txt"},
        {"skip": ["*"]},
        {"pattern": "3:7"},
        {"calibration": tokens(8) + 10_000},
    ],
)
def test_the_dense_model_is_measured_once_everything_else_is_accepted(checkpoint, text, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(Evaluation, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "short.txt").write_text("short")
    monkeypatch.chdir(tmp_path)
    settings = {"calibration": text, "samples": 8, "seq_len": 16, "evaluation": Evaluation([text], 16, 2)}
    with pytest.raises(HalveError):
        halve.prune(checkpoint, tmp_path / "out", **settings | changes, **FAST)


def test_windows_are_as_long_as_the_calibration_sequences_by_default(checkpoint, text, tmp_path):
    evaluation = Evaluation([text], max_windows=2)
    options = {"calibration": tokens(8, 24), "evaluation": evaluation}
    pruned = halve.prune(checkpoint, tmp_path / "out", **options, **FAST)
    assert pruned.after[0].seq_len == 24
    assert measure(tmp_path / "out", evaluation)[1][0].seq_len == 24
    assert len(scores(tmp_path / "out")) == 1


def test_another_model_in_the_place_of_the_dense_one_is_refused(checkpoint, text, tmp_path):
    out = tmp_path / "out"
    halve.prune(checkpoint, out, calibration=text, samples=8, seq_len=16, **FAST)
    decoder("llama", seed=1, vocab_size=320).save_pretrained(checkpoint)
    with pytest.raises(InputError, match=r"is not the model that was pruned, or was changed since"):
        measure(out, Evaluation([text], max_windows=2))
    assert measure(out, Evaluation([text], max_windows=2), dense="none")[0] == ()


def test_two_dtypes_are_told(checkpoint, text, tmp_path):
    out = tmp_path / "out"
    loaded = load_model(checkpoint)
    options = {"calibration": tokens(8), "dtype": torch.bfloat16, "evaluation": Evaluation([text], 16, 2)}
    halve.prune(loaded.model, out, tokenizer=loaded.tokenizer, **options, **FAST)
    (entry,) = scores(out)
    assert entry["dtype"] == "bfloat16"
    assert ("float32 before, bfloat16 after" in (out / "report.html").read_text()) == (
        entry["dtype_before"] == "float32"
    )


def test_text_that_is_calibrated_and_evaluated_on_is_told(checkpoint, text, tmp_path):
    options = {"calibration": text, "samples": 8, "seq_len": 16, "evaluation": Evaluation([text], 16, 2)}
    pruned = halve.prune(checkpoint, tmp_path / "out", **options, **FAST)
    assert pruned.notes == (f"{text} is both calibrated on and evaluated on: perplexities on it flatter",)
    assert "both calibrated on and evaluated on" in (tmp_path / "out" / "report.html").read_text()


def test_calibration_and_evaluation_begin_with_bos_where_the_tokenizer_says_so(checkpoint, text, tmp_path):
    byte_bpe(adds_bos=True).save_pretrained(checkpoint)
    out = prune_and_measure(checkpoint, text, tmp_path / "out", **FAST)
    tokenizer, ids = byte_bpe(), byte_bpe()(Path(text).read_text(), verbose=False)["input_ids"]
    windows = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 15]] for start in (0, 15)])
    (entry,) = scores(out)
    assert entry["bos"] == "each"
    for name, place in (("before", checkpoint), ("after", out)):
        with torch.no_grad():
            logits = load_model(place).model.double()(input_ids=windows).logits[:, :-1].log_softmax(-1)
        losses = -logits.gather(-1, windows[:, 1:, None])[..., 0]
        assert entry[f"{name}_windows"] == pytest.approx(losses.mean(1).tolist(), abs=0.02)  # bfloat16, it may be
    record = json.loads((out / "halve.json").read_text())["calibration"]
    assert (record["bos"], record["bos_ids"], record["tokens"]) == ("each", [tokenizer.bos_token_id], 8 * 16)
    page = (out / "report.html").read_text()
    assert "2 windows of 16 tokens, BOS in each" in page
    plain = tmp_path / "plain"
    options = {"calibration": text, "samples": 8, "seq_len": 16, "eval_data": [text], "bos": "never"}
    halve.prune(checkpoint, plain, **options, **FAST)
    assert scores(plain)[0]["bos"] == "none"
    assert json.loads((plain / "halve.json").read_text())["calibration"]["bos"] == "none"


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_a_solver_sees_bos_only_where_it_is_asked_for(checkpoint, text, bos):
    byte_bpe(adds_bos=True).save_pretrained(checkpoint)
    loaded, seen = load_model(checkpoint), []
    loaded.model.get_input_embeddings().register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    options = {"calibration": text, "samples": 8, "seq_len": 16, "bos": bos}
    halve.prune(loaded.model, tokenizer=loaded.tokenizer, **options, **FAST)
    ids = torch.cat(seen).unique(dim=0)  # the first sequence is seen again where the model is looked at
    assert ids.shape == (8, 16)
    assert (ids[:, 0] == 0).sum().item() == (8 if bos == "auto" else 0)
    assert (ids[:, 1:] != 0).all()
