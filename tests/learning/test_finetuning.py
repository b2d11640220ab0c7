"""halve.finetune from a checkpoint to a checkpoint, on models of many kinds."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import halve
from halve.errors import InputError
from halve.pruning import prune
from models import decoder, edit_json, encoder_decoder, save
from taught import QUICK, make_pruned, teach
from tiny_tokenizers import byte_bpe, word_level


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_pruned(tmp_path_factory.mktemp("llama"))


def weights(directory):
    return {name: value for path in directory.glob("model*.safetensors") for name, value in load_file(path).items()}


def assert_taught(done, checkpoint, out):
    """The mask is kept to the bit, something was trained, embeddings and the head were not, and all is on record."""
    before, after = weights(checkpoint), weights(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    pruned = {tensor for entry in done.record["matrices"] for tensor in entry["tensors"]}
    assert pruned <= changed
    for name in pruned:
        zero = before[name] == 0
        assert before[name].dtype == after[name].dtype
        assert not bool(after[name][zero].ne(0).any()), name
    assert not any(part in name for name in changed for part in ("embed_tokens", "wte", "lm_head"))
    assert halve.check(out, against=checkpoint.parent / "dense").ok
    looks = [point for point in done.trained.curve if point.perplexity is not None]
    best = next(point for point in looks if point.step == done.trained.best)
    if best.kl is not None:
        assert best.kl < looks[0].kl
    assert json.loads((out / "halve.json").read_text())["trainings"][-1]["best_step"] == done.trained.best
    for name, parameter in done.model.named_parameters():
        if name in after:
            assert torch.equal(parameter.detach(), after[name].float()), name


FAMILIES = {
    "tied": ("llama_tied", {}),
    "gpt2": ("gpt2", {}),
    "mixture": ("mixtral", {}),
    "capped logits": ("gemma2", {}),
    "shards": ("llama", {"max_shard_size": "60KB"}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "no positions": ("bloom", {}),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_models_of_many_kinds(kind, tmp_path):
    family, options = FAMILIES[kind]
    checkpoint = make_pruned(tmp_path, family, **options)
    done = teach(checkpoint, tmp_path / "out", learning_rate=3e-3)
    assert_taught(done, checkpoint, tmp_path / "out")
    said = " ".join(done.notes)
    assert ("stand whole" in said) == (kind == "capped logits")
    if kind == "shards":
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_norms_alone_and_measured_before_and_after(checkpoint, tmp_path):
    text = checkpoint.parent / "text.jsonl"
    shutil.copytree(checkpoint, tmp_path / "pruned")
    (tmp_path / "pruned" / "BASE_MODEL_README.md").write_text("---\nlicense: mit\n---\n")
    done = teach(tmp_path / "pruned", tmp_path / "out", data=text, train="norms", eval_data=[text], eval_max_windows=2)
    before, after = weights(checkpoint), weights(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {
        name for name in before if before[name].ndim == 1
    }
    assert len(done.dense) == len(done.before) == len(done.after) == 1
    again = halve.evaluate(tmp_path / "out", text, seq_len=32, max_windows=2, forward_dtype="float32")
    assert done.after[0].value == pytest.approx(again.value, rel=1e-5)
    assert any("trained on" in note for note in done.notes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| `text.jsonl` | {done.dense[0].value:.3f} | {done.after[0].value:.3f} |" in card
    assert f"from {done.before[0].value:.3f} to {done.after[0].value:.3f}" in card
    assert str(tmp_path) not in card
    assert (tmp_path / "out" / "BASE_MODEL_README.md").read_text() == "---\nlicense: mit\n---\n"
    assert "license: mit" in card


def test_without_a_teacher(checkpoint, tmp_path):
    done = teach(checkpoint, tmp_path / "out", teacher="none")
    entry = done.record["trainings"][-1]
    assert entry["teacher"] is None
    assert all(point.kl is None for point in done.trained.curve)
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    edit_json(moved / "halve.json", source={"kind": "memory", "name": "LlamaForCausalLM"})
    with pytest.raises(InputError, match=r"model in memory: say where the dense model is"):
        teach(moved, tmp_path / "no", data=checkpoint.parent / "text.jsonl")


def test_a_training_can_follow_another(checkpoint, tmp_path):
    teach(checkpoint, tmp_path / "first")
    second = teach(tmp_path / "first", tmp_path / "second", data=checkpoint.parent / "text.jsonl", seed=1)
    assert len(second.record["trainings"]) == 2
    assert halve.check(tmp_path / "second", against=checkpoint.parent / "dense").ok


def test_precision_of_one_training_does_not_reach_the_next(checkpoint, tmp_path):
    first = teach(checkpoint, tmp_path / "a")
    teach(checkpoint, tmp_path / "b", forward_dtype="bfloat16")
    teach(checkpoint, tmp_path / "c")
    assert weights(tmp_path / "a").keys() == weights(tmp_path / "c").keys()
    for name, value in weights(tmp_path / "a").items():
        assert torch.equal(value, weights(tmp_path / "c")[name])
    assert first.record["trainings"][0]["forward_dtype"] == "float32"


def test_the_callers_text_file_is_left_alone_and_nothing_else_is_written(checkpoint, tmp_path):
    teach(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out" / ".halve").exists()
    assert not list(tmp_path.rglob("training_args*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def refused(checkpoint, out, match, **options):
    with pytest.raises(halve.HalveError, match=match):
        teach(checkpoint, out, **{"data": checkpoint.parent / "text.jsonl", **options})
    assert not out.exists()


def test_teachers_that_do_not_fit_are_refused(checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint.parent / "dense", other)
    word_level().save_pretrained(other)
    refused(checkpoint, tmp_path / "out", "another vocabulary than the student", teacher=str(other))
    moved = tmp_path / "changed"
    shutil.copytree(checkpoint.parent, moved)
    edit_json(
        moved / "plain" / "halve.json",
        source={**json.loads((checkpoint / "halve.json").read_text())["source"], "name": str(moved / "dense")},
    )
    held = load_file(moved / "dense" / "model.safetensors")
    name = next(iter(held))
    with safe_open(moved / "dense" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file({**held, name: held[name] + 1}, moved / "dense" / "model.safetensors", metadata)
    refused(
        moved / "plain", tmp_path / "out", "is not the model that was pruned, or was changed since: put that one back"
    )


def test_another_teacher_with_the_same_vocabulary_is_taken(checkpoint, tmp_path):
    other = save(decoder("llama", seed=7, vocab_size=320, num_hidden_layers=2), tmp_path / "other")
    byte_bpe().save_pretrained(other)
    done = teach(checkpoint, tmp_path / "out", teacher=str(other))
    assert done.record["trainings"][0]["teacher"]["name"] == str(other)
    assert halve.check(tmp_path / "out", against=checkpoint.parent / "dense").ok


def test_a_checkpoint_that_is_only_read_need_not_be_writable(checkpoint, tmp_path, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and str(path) != str(checkpoint))
    teach(checkpoint, tmp_path / "out")


def test_what_cannot_be_trained_is_refused_in_one_sentence(checkpoint, tmp_path):
    out = tmp_path / "out"
    refused(
        checkpoint.parent / "dense",
        out,
        "has no halve.json: give a checkpoint that halve prune has written",
        data=checkpoint.parent / "text.jsonl",
    )
    refused(checkpoint, out, "there is no option 'trian'", trian="norms")
    refused(checkpoint, out, "is less than one step", tokens=100)
    refused(checkpoint, out, "does not exist|not found|no such", data=tmp_path / "missing.jsonl")
    refused(checkpoint, out, "tracker", log_to=("nothing",))
    refused(checkpoint, out, "seq_len = 512 exceeds", seq_len=512, batch_tokens=512)
    code = tmp_path / "code"
    shutil.copytree(checkpoint, code)
    edit_json(code / "config.json", auto_map={"AutoModelForCausalLM": "own.Model"})
    refused(code, out, "trust_remote_code", data=checkpoint.parent / "text.jsonl")


def test_encoder_decoders_are_refused(tmp_path, checkpoint):
    dense = save(encoder_decoder("t5"), tmp_path / "t5")
    byte_bpe().save_pretrained(dense)
    prune(dense, tmp_path / "pruned", method="magnitude", refit="none")
    with pytest.raises(halve.HalveError, match="T5ForConditionalGeneration is an encoder-decoder"):
        teach(tmp_path / "pruned", tmp_path / "out", data=checkpoint.parent / "text.jsonl")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_loaded_are_refused_before_they_are(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("halve.learning.training.needs.free_memory", lambda _device: 0)
    monkeypatch.setattr("halve.learning.lesson.load_model", lambda *_args, **_more: pytest.fail("loaded"))
    refused(checkpoint, tmp_path / "out", "the training needs .*the student .*the teacher .* gradients .* moments")


def test_needs_that_cannot_be_met_leave_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("halve.learning.training.needs.free_memory", lambda _device: 0)
    refused(checkpoint, tmp_path / "out", "the training needs .* give a smaller forward_tokens")


def test_the_quick_options_are_what_they_say():
    assert QUICK["tokens"] // QUICK["batch_tokens"] == 4
