"""What a training of masks asks of its prior, its text and the processes that it runs in."""

import shutil

import pytest
import torch

import halve
from halve.errors import InputError
from halve.learning.mask_files import masked_names
from halve.learning.mask_learning import Learning, learn_as
from halve.learning.methods import LEARNING_METHODS
from halve.option_groups import fill
from halve.serial import from_plain, to_plain
from models import decoder, save
from packed_models import pruned
from taught import QUICK, write_text
from tiny_tokenizers import byte_bpe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    found = pruned(tmp_path_factory.mktemp("learning"), dtype=torch.float32)
    write_text(found.parent / "text.jsonl")
    return found


def asked(checkpoint, **options):
    text = checkpoint.parent / "text.jsonl"
    return fill(Learning, {"data": text, "method": "maskllm", **QUICK, **options})


def refused(checkpoint, out, match, **options):
    with pytest.raises(halve.HalveError, match=match):
        learn_as(checkpoint.parent / "dense", out, asked(checkpoint, **options))
    assert not out.exists()


def test_a_prior_has_to_be_a_checkpoint_of_the_model_in_the_pattern(checkpoint, tmp_path):
    out, dense = tmp_path / "out", checkpoint.parent / "dense"
    refused(checkpoint, out, r"the prior is not 2:4 in .*: give a checkpoint that was pruned to 2:4", prior=dense)
    refused(checkpoint, out, "the prior is not 1:4", prior=checkpoint, pattern="1:4")
    small = save(decoder("llama", vocab_size=320, intermediate_size=32), tmp_path / "small")
    refused(checkpoint, out, r"has no parameter .*\(64, 32\): give a checkpoint of the same model", prior=small)
    short = save(decoder("llama", vocab_size=320, num_hidden_layers=2), tmp_path / "short")
    refused(checkpoint, out, "has no parameter model.layers.2", prior=short)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "halve.json").write_text("{")
    refused(checkpoint, out, "halve.json", prior=broken)


def test_experts_without_second_moments_are_named(tmp_path):
    dense = save(decoder("mixtral", vocab_size=320), tmp_path / "dense")
    byte_bpe().save_pretrained(dense)
    text = write_text(tmp_path / "text.jsonl")
    done = halve.learn(dense, tmp_path / "out", data=text, method="ast", **QUICK)
    [note] = [each for each in done.notes if "are weighed by |w| alone" in each]
    assert "experts" in note
    assert note in done.record["warnings"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_writes_masks(rank, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    request = asked(checkpoint, save_masks=tmp_path / "masks")
    done = learn_as(checkpoint.parent / "dense", tmp_path / "out", request)
    assert (tmp_path / "masks").exists() == (rank == "0")
    if rank == "0":
        pattern, names = masked_names(tmp_path / "masks")
        assert str(pattern) == "2:4"
        assert names == {each["name"] for each in done.record["matrices"]}


def test_what_was_asked_comes_back_from_json():
    request = fill(
        Learning,
        {"data": ("a", "b=2"), "pattern": "1:4", "skip": "*.q_proj.*", "save_masks": "masks", "prior": "wanda"},
    )
    again = from_plain(Learning, to_plain(request))
    assert again == request
    assert to_plain(again) == to_plain(request)


@pytest.mark.parametrize("row", LEARNING_METHODS.values(), ids=lambda row: row.name)
def test_only_methods_that_take_a_prior_are_given_one(row):
    if row.takes_prior:
        assert Learning(method=row.name, prior="wanda").prior == "wanda"
        return
    with pytest.raises(InputError, match=f"method {row.name} takes no prior: leave it out, or begin from the pruned"):
        Learning(method=row.name, prior="wanda")
