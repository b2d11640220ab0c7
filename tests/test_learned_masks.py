"""Learning masks from a call to a checkpoint, priors that a local method makes, and masks alone put onto a model."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

import halve
from halve.checkpoint.directory import is_sealed
from halve.errors import InputError, ResumeMismatchError
from halve.learned_masks import apply_masks, resume_learning
from halve.learning.methods import LEARNING_METHODS
from halve.learning.training.state import recorded_training
from halve.learning.training.trainer import MaskTrainer
from halve.maths.pattern import Pattern
from halve.option_groups import known_names
from halve.pruning import prune
from halve.report.page import write_report
from harness import crash_at, forked, tree
from models import MIXTURES, decoder, save
from packed_models import edit_tensor, pruned, sums
from taught import QUICK, write_text
from tiny_tokenizers import byte_bpe

assert MaskTrainer  # imported here, so that no forked process has to
STRONG = {"method": "maskllm", "learning_rate": 3e-2}
"""Masks move within four steps."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make_dense(tmp_path_factory.mktemp("dense"))


def make_dense(folder, family="llama", dtype=torch.float32):
    """Write a tiny model, and text beside it."""
    found = save(decoder(family, vocab_size=320).to(dtype), folder / "dense")
    byte_bpe().save_pretrained(found)
    write_text(folder / "text.jsonl")
    return found


def learn(model, out, **options):
    """Learn masks for a few steps on the text beside the model."""
    return halve.learn(model, out, **{"data": model.parent / "text.jsonl", **QUICK, **options})


def weights(directory):
    return {name: value for path in directory.glob("model*.safetensors") for name, value in load_file(path).items()}


def recorded(directory):
    return json.loads((directory / "halve.json").read_text())


def is_pruned(record, held, pattern):
    """Whether every matrix on record has the pattern, groups along d_in."""
    laid = {name: each["layout"] for each in record["matrices"] for name in each["tensors"]}
    return all(
        Pattern(pattern).satisfied_by(held[name] if layout == "out_in" else held[name].mT)
        for name, layout in laid.items()
    )


@pytest.mark.parametrize("method", LEARNING_METHODS)
def test_every_method_leaves_a_checkpoint_that_everybody_reads(method, dense, tmp_path):
    out, text = tmp_path / "out", dense.parent / "text.jsonl"
    done = learn(dense, out, method=method, eval_data=[text], eval_max_windows=2)
    assert halve.check(out, against=dense).ok
    before, after, record = weights(dense), weights(out), recorded(out)
    assert len(record["matrices"]) == 21
    assert is_pruned(record, after, "2:4")
    matrices = {name for each in record["matrices"] for name in each["tensors"]}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert matrices <= changed <= set(record["trainings"][0]["tensors"])
    frozen = method in {"maskllm", "proxsparse"}
    assert frozen == all(
        torch.equal(after[name][after[name] != 0], before[name][after[name] != 0]) for name in matrices
    )
    assert frozen == (matrices == changed)
    for name, parameter in done.model.named_parameters():
        assert torch.equal(parameter.detach(), after[name]), name
    [entry] = record["trainings"]
    assert (entry["kind"], entry["method"], entry["teacher"]["name"]) == ("learn", method, str(dense))
    assert entry["options"]["weight_decay"] == (0.1 if method == "maskllm" else 0.0)
    assert method in write_report(out).read_text()
    assert halve.evaluate(out, text, seq_len=32, max_windows=2, forward_dtype="float32").value == pytest.approx(
        done.after[0].value, rel=1e-5
    )
    assert len(done.dense) == len(done.before) == 1
    halve.pack(out, tmp_path / "packed")
    halve.unpack(tmp_path / "packed", tmp_path / "plain")
    assert weights(tmp_path / "plain").keys() == after.keys()
    if method == "prox-admm":  # the record is the same for all
        further = halve.finetune(out, tmp_path / "more", data=text, **QUICK)
        assert [each["kind"] for each in further.record["trainings"]] == ["learn", "finetune"]
        assert halve.check(tmp_path / "more", against=dense).ok


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["maskllm", "prox-admm"])
def test_other_layouts(family, method, tmp_path):
    dense = make_dense(tmp_path, family, torch.bfloat16)
    masks = tmp_path / "masks"
    done = learn(dense, tmp_path / "out", method=method, pattern="1:4", save_masks=masks)
    assert halve.check(tmp_path / "out", against=dense).ok
    assert recorded(tmp_path / "out")["pattern"] == "1:4"
    record, held = recorded(tmp_path / "out"), weights(tmp_path / "out")
    assert is_pruned(record, held, "1:4")
    assert all(value.dtype == torch.bfloat16 for value in held.values())
    assert ("[3]" in str([each["name"] for each in record["matrices"]])) == (family in MIXTURES)
    assert not any(
        part in name for each in record["matrices"] for name in each["tensors"] for part in ("wte", "gate.w")
    )
    apply_masks(dense, masks, tmp_path / "applied")
    other = weights(tmp_path / "applied")
    for each in record["matrices"]:
        for name in each["tensors"]:
            assert not bool(other[name][held[name] == 0].any()), name
    assert done.record["matrices"] == record["matrices"]
    assert halve.check(tmp_path / "applied", against=dense).ok


def test_matrices_that_are_skipped_stay_dense(dense, tmp_path):
    learn(dense, tmp_path / "out", method="ast", skip="*.q_proj.*")
    record, before, after = recorded(tmp_path / "out"), weights(dense), weights(tmp_path / "out")
    assert record["skip"] == ["*.q_proj.*"]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(before[name], after[name])
    assert any(each["name"] == name and "skip" in each["reason"] for each in record["excluded"])
    assert len(record["matrices"]) == 18


def test_a_prior_that_a_local_method_makes_is_used_and_kept(dense, tmp_path):
    out, prior = tmp_path / "out", tmp_path / "out-prior"
    still = {"method": "maskllm", "learning_rate": 1e-6, "prior_strength": 100.0}
    learn(dense, out, prior="magnitude", **still)
    assert recorded(prior)["method"] == "magnitude"
    learned, given = weights(out), weights(prior)
    for each in recorded(out)["matrices"]:  # nothing has moved, and the prior is the likeliest mask
        assert all(torch.equal(learned[name] != 0, given[name] != 0) for name in each["tensors"])
    times = {path: path.stat().st_mtime_ns for path in prior.iterdir()}
    shutil.rmtree(out)
    learn(dense, out, prior="magnitude", **still)
    assert times == {path: path.stat().st_mtime_ns for path in prior.iterdir()}


def test_a_prior_is_calibrated_on_the_training_text(dense, tmp_path):
    learn(dense, tmp_path / "out", method="prox-admm", prior="wanda")
    calibration = recorded(tmp_path / "out-prior")["calibration"]
    assert calibration["source"] == str(dense.parent / "text.jsonl")
    assert (calibration["samples"], calibration["seq_len"]) == (32, 32)
    assert recorded(tmp_path / "out-prior")["pattern"] == "2:4"
    entry = recorded(tmp_path / "out")["trainings"][0]
    assert entry["options"]["prior"] == str(tmp_path / "out-prior")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prior": "ria"}, "another method"),
        ({"pattern": "1:4"}, "another pattern"),
        ({"skip": "*.q_proj.*"}, "another skip"),
        ({"seq_len": 16}, "another seq_len"),
        ({"data": "other"}, "another text"),
    ],
)
def test_a_prior_of_something_else_is_never_used(change, named, dense, tmp_path):
    text, out = dense.parent / "text.jsonl", tmp_path / "out"
    calibrated = {"calibration": str(text), "samples": 32, "seq_len": 32}
    prune(dense, tmp_path / "out-prior", method="wanda", refit="none", **calibrated)
    held = sums(tmp_path / "out-prior")
    if "data" in change:
        change = {"data": write_text(tmp_path / "other.jsonl", seed=3)}
    with pytest.raises(InputError, match=rf"out-prior holds another prior .*{named}.*: remove it"):
        learn(dense, out, **{"method": "maskllm", "prior": "wanda", **change})
    assert not out.exists()
    assert sums(tmp_path / "out-prior") == held


def test_a_prior_of_another_model_is_never_used(dense, tmp_path):
    copied = tmp_path / "dense"
    shutil.copytree(dense, copied)
    shutil.copy(dense.parent / "text.jsonl", tmp_path)
    learn(copied, tmp_path / "out", method="maskllm", prior="magnitude")
    shutil.rmtree(tmp_path / "out")
    edit_tensor(copied / "model.safetensors", "model.layers.0.mlp.up_proj.weight", lambda value: value + 1)
    with pytest.raises(InputError, match="another model"):
        learn(copied, tmp_path / "out", method="maskllm", prior="magnitude")


def test_a_prior_that_was_trained_since_is_never_used(dense, tmp_path):
    learn(dense, tmp_path / "first", method="maskllm", prior="magnitude")
    halve.finetune(tmp_path / "first-prior", tmp_path / "out-prior", data=dense.parent / "text.jsonl", **QUICK)
    with pytest.raises(InputError, match="another training"):
        learn(dense, tmp_path / "out", method="maskllm", prior="magnitude")


def test_priors_that_cannot_be_are_refused_before_anything_is_loaded(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("halve.learning.lesson.load_model", None)
    monkeypatch.setattr("halve.learned_masks.prune", None)

    def refused(match, **options):
        with pytest.raises(InputError, match=match):
            learn(dense, tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []

    for method in ("proxsparse", "ast", "cast"):
        refused(f"method {method} takes no prior: leave it out", method=method, prior="wanda")
    refused("'wnada': did you mean 'wanda'", method="maskllm", prior="wnada")
    refused("neither a local method .* nor a checkpoint", method="maskllm", prior=tmp_path / "no")
    refused("less than one step of batch_tokens", method="maskllm", prior="wanda", tokens=100)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("several processes cannot make one prior: make it first", method="maskllm", prior="wanda")


def test_a_prior_that_was_stopped_is_gone_on_with(dense, tmp_path):
    out = tmp_path / "out"
    crash_at("block.renamed@2", lambda: learn(dense, out, method="maskllm", prior="wanda"))
    assert not out.exists()
    assert (tmp_path / "out-prior" / ".halve").is_dir()
    learn(dense, out, method="maskllm", prior="wanda")
    assert recorded(tmp_path / "out-prior")["method"] == "wanda"
    assert halve.check(tmp_path / "out-prior", against=dense).ok


def test_masks_alone_give_the_learned_checkpoint(dense, tmp_path):
    done = learn(dense, tmp_path / "out", save_masks=tmp_path / "masks", prior="magnitude", **STRONG)
    record = apply_masks(dense, tmp_path / "masks", tmp_path / "applied")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "applied" / name).read_bytes(), name
    prior, learned = weights(tmp_path / "out-prior"), weights(tmp_path / "out")
    assert any(not torch.equal(prior[name] != 0, learned[name] != 0) for name in learned)  # it learned something
    assert record["warnings"] == []
    facts = ("name", "tensors", "shape", "layout", "mask_sha256", "kept_per_group")
    for given, learnt in zip(record["matrices"], done.record["matrices"], strict=True):
        assert all(given[fact] == learnt[fact] for fact in facts)
    assert recorded(tmp_path / "applied") == {**record, "files": recorded(tmp_path / "applied")["files"]}
    assert halve.check(tmp_path / "applied", against=dense).ok
    assert "masks" in write_report(tmp_path / "applied").read_text()
    for place in ("out", "applied"):
        assert is_sealed(tmp_path / place / "README.md")
    halve.finetune(tmp_path / "applied", tmp_path / "more", data=dense.parent / "text.jsonl", **QUICK)
    assert halve.check(tmp_path / "more", against=dense).ok


def test_masks_of_part_of_a_model(dense, tmp_path):
    learn(dense, tmp_path / "out", method="maskllm", skip="*.q_proj.*", save_masks=tmp_path / "masks")
    record = apply_masks(dense, tmp_path / "masks", tmp_path / "applied")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "applied" / "model.safetensors"
    ).read_bytes()
    assert any("the file of masks has none" in each["reason"] for each in record["excluded"])


def test_masks_for_another_model(dense, tmp_path):
    learn(dense, tmp_path / "out", method="maskllm", save_masks=tmp_path / "masks")
    with pytest.raises(InputError, match="is there already: give save_masks a new name"):
        learn(dense, tmp_path / "again", method="maskllm", save_masks=tmp_path / "masks")
    shutil.copytree(dense, tmp_path / "moved")
    edit_tensor(tmp_path / "moved" / "model.safetensors", "model.norm.weight", lambda value: value + 1)
    record = apply_masks(tmp_path / "moved", tmp_path / "masks", tmp_path / "applied")
    [warning] = record["warnings"]
    assert f"was learned for {dense}" in warning
    assert f"{tmp_path / 'moved'} has other weights" in warning
    assert halve.check(tmp_path / "applied", against=tmp_path / "moved").ok
    for changes, match in (({"num_hidden_layers": 2}, "masks of another model"), ({"intermediate_size": 32}, "shape")):
        other = save(decoder("llama", vocab_size=320, **changes), tmp_path / str(changes))
        with pytest.raises(InputError, match=match):
            apply_masks(other, tmp_path / "masks", tmp_path / "no")
        assert not (tmp_path / "no").exists()
    with pytest.raises(InputError, match="is no file: give the file of masks"):
        apply_masks(dense, tmp_path / "nothing", tmp_path / "no")
    save_file({"a": torch.zeros(4)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="has no masks that Halve wrote"):
        apply_masks(dense, tmp_path / "plain.safetensors", tmp_path / "no")


def test_from_a_pruned_checkpoint_with_the_dense_teacher_of_its_record(tmp_path):
    checkpoint = pruned(tmp_path, dtype=torch.float32)
    text = write_text(tmp_path / "text.jsonl")
    halve.finetune(checkpoint, tmp_path / "tuned", data=text, **QUICK)
    done = learn(tmp_path / "tuned", tmp_path / "out", method="maskllm", pattern="1:4", skip="*.q_proj.*")
    record, before, after = recorded(tmp_path / "out"), weights(tmp_path / "tuned"), weights(tmp_path / "out")
    for name, value in after.items():  # it began with the tuned weights
        assert torch.equal(value[value != 0], before[name][value != 0]), name
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before[name], after[name])
    assert record["source"] == recorded(checkpoint)["source"]
    assert [each["kind"] for each in record["trainings"]] == ["finetune", "learn"]
    assert record["trainings"][1]["teacher"]["name"] == str(tmp_path / "dense")
    assert record["trainings"][1]["started_from"]["name"] == str(tmp_path / "tuned")
    assert halve.check(tmp_path / "out", against=tmp_path / "dense").ok
    assert done.record["pattern"] == "1:4"
    assert write_report(tmp_path / "out")


def test_teachers(tmp_path):
    checkpoint = pruned(tmp_path, dtype=torch.float32)
    write_text(tmp_path / "text.jsonl")
    other = save(decoder("llama", seed=7, vocab_size=320, num_hidden_layers=2), tmp_path / "other")
    byte_bpe().save_pretrained(other)
    done = learn(checkpoint, tmp_path / "named", method="ast", teacher=str(other), skip="*.q_proj.*")
    assert done.record["trainings"][0]["teacher"]["name"] == str(other)
    assert halve.check(tmp_path / "named", against=tmp_path / "dense").ok
    for model in (checkpoint, tmp_path / "dense"):
        done = learn(model, tmp_path / f"none-{model.name}", method="ast", teacher="none")
        assert done.record["trainings"][0]["teacher"] is None
        assert all(point.kl is None for point in done.trained.curve)


def test_options_of_a_method_are_options(dense, tmp_path):
    done = learn(dense, tmp_path / "out", method="proxsparse", keep="trained", seed=3)
    assert done.record["trainings"][0]["options"]["options"] == {"keep": "trained"}
    before, after = weights(dense), weights(tmp_path / "out")
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    done = learn(dense, tmp_path / "seed", seed=3, **STRONG)
    assert done.record["trainings"][0]["options"]["options"] == {"seed": 3}
    assert done.record["trainings"][0]["options"]["seed"] == 3
    done = learn(dense, tmp_path / "decay", weight_decay=0.0, **STRONG)
    assert done.record["trainings"][0]["options"]["weight_decay"] == 0.0


def test_no_option_of_a_method_is_hidden_by_one_of_learning():
    known = known_names(halve.learned_masks.Learning)
    for row in LEARNING_METHODS.values():
        assert {each.name for each in fields(row.options)} & set(known) <= {"seed"}


def test_what_is_not_known_is_refused_with_what_may_have_been_meant(dense, tmp_path):
    def refused(match, **options):
        with pytest.raises(halve.HalveError, match=match):
            learn(dense, tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []

    refused("no option 'tokns': did you mean 'tokens'", tokns=3)
    refused("no option 'kep': did you mean 'keep'", method="proxsparse", kep="original")
    refused("no option 'keep': .*method maskllm has init_std", method="maskllm", keep="original")
    refused("unknown learning method 'masklm': did you mean 'maskllm'", method="masklm")
    refused("keep", method="proxsparse", keep="nothing")
    refused("has 12870 masks a group, and maskllm", method="maskllm", pattern="8:16")
    refused("masks are learned for N:M patterns", method="ast", pattern="50%")


@pytest.fixture(scope="module")
def stopped(dense):
    """A call, and what it leaves when nothing happens."""
    folder = dense.parent / "stopped"
    folder.mkdir()
    learn(dense, folder / "prior", method="ast")

    def call(name):
        options = {"prior": folder / "prior", "save_masks": folder / f"{name}.masks", "save_every": 1, **STRONG}
        learn(dense, folder / name, **options)

    call("whole")
    return folder, call, tree(folder / "whole"), (folder / "whole.masks").read_bytes()


def without_names(found, directory):
    """Return the files' sums, the record without where masks went and the sums that say so of it."""
    record = recorded(directory)
    record["trainings"][0]["options"].pop("save_masks")
    return {**found, "halve.json": record}


@pytest.mark.parametrize("point", ["mark.renamed@3", "masks.renamed@1", "file.renamed@1"])
def test_a_training_that_was_killed_comes_to_the_same_bytes(point, stopped):
    folder, call, golden, masks = stopped
    out = folder / point
    crash_at(point, lambda: call(point))
    assert forked(lambda: resume_learning(recorded_training(out), out)) == 0
    assert without_names(tree(out), out) == without_names(golden, folder / "whole")
    assert (folder / f"{point}.masks").read_bytes() == masks


def test_a_training_goes_on_only_as_it_began(stopped, dense):
    folder, call, golden, _ = stopped
    crash_at("state.written@2", lambda: call("changed"))
    kept = folder / "prior" / "model.safetensors"
    held = kept.read_bytes()
    record = (folder / "prior" / "halve.json").read_bytes()
    options = {"save_masks": folder / "changed.masks", "save_every": 1, **STRONG}
    with pytest.raises(ResumeMismatchError, match="prior"):
        learn(dense, folder / "changed", **options)
    with pytest.raises(ResumeMismatchError, match="seed"):
        learn(dense, folder / "changed", prior=folder / "prior", **{**options, "seed": 5})
    edit_tensor(kept, "model.norm.weight", lambda value: value + 1)
    with pytest.raises(ResumeMismatchError, match="prior was"):
        call("changed")
    kept.write_bytes(held)
    (folder / "prior" / "halve.json").write_bytes(record)
    call("changed")
    assert without_names(tree(folder / "changed"), folder / "changed") == without_names(golden, folder / "whole")
