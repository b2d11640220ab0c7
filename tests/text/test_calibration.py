import pytest
import torch

import halve
from halve.errors import (
    CalibrationError,
    InputError,
)
from halve.text.calibration import batch_tokens, token_batches
from halve.text.tokens import TokenSet, hash_ids
from models import decoder, tokens, vit

FAST = {"method": "wanda", "refit": "none", "samples": 4, "seq_len": 16}


def test_images_are_given_as_batches():
    model = vit()
    pruned = halve.prune(model, calibration=[{"pixel_values": torch.randn(6, 3, 16, 16)}], method="wanda")
    assert len(pruned.report.matrices) == 18
    assert pruned.record["calibration"]["source"] == "batches"


def test_without_data_the_model_writes_its_own(checkpoint):
    pruned = halve.prune(checkpoint, **FAST)
    assert pruned.record["calibration"]["source"] == "self"
    again = halve.prune(checkpoint, **FAST)
    assert again.record["calibration"]["sha256"] == pruned.record["calibration"]["sha256"]
    other = halve.prune(checkpoint, seed=1, **FAST)
    assert other.record["calibration"]["sha256"] != pruned.record["calibration"]["sha256"]


def test_the_default_length_is_the_models_if_that_is_less(checkpoint, text):
    pruned = halve.prune(checkpoint, calibration=text, method="wanda", refit="none", samples=2)
    assert pruned.record["calibration"]["seq_len"] == 128


def test_too_little_text_says_how_many_samples_would_fit(checkpoint, text):
    with pytest.raises((CalibrationError, InputError), match="samples"):
        halve.prune(checkpoint, calibration=text, method="wanda", samples=10_000, seq_len=128)


def test_token_batches_hold_no_more_tokens_than_asked_and_lose_none():
    ids = tokens(30, 512)
    batches = token_batches(ids, 4096)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 8, 6]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids)
    assert len(token_batches(tokens(2, 5000), 4096)) == 2


def test_batches_are_small_where_a_cache_has_to_hold_them_and_smallest_where_each_is_a_step():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert batch_tokens(cpu, stepping=True) == batch_tokens(gpu, stepping=True) < batch_tokens(cpu) < batch_tokens(gpu)


def test_a_token_set_is_taken_as_it_is():
    ids = tokens()
    given = TokenSet(ids, "mine", hash_ids(ids), 1)
    pruned = halve.prune(decoder("llama"), calibration=given, method="wanda")
    assert pruned.record["calibration"]["source"] == "mine"


def test_one_skip_pattern_and_a_generator_of_batches_are_fine():
    batches = ({"input_ids": tokens(2, seed=seed)} for seed in range(2))
    pruned = halve.prune(decoder("llama"), calibration=batches, method="wanda", skip="*down_proj*")
    assert len(pruned.report.matrices) == 18
    assert pruned.record["calibration"]["batches"] == 2
    with pytest.raises(InputError, match="empty list"):
        halve.prune(decoder("llama"), calibration=[], method="wanda")
