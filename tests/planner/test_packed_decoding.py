"""The packed contender: which model is run, how often, and what of the clock counts."""

import pytest
import torch

from halve import memory
from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.planner import packed_decoding
from halve.planner.dense_engine import NEW, PROMPT, ROUNDS
from halve.planner.packed_decoding import packed_name, packed_seconds
from halve.runtime.heads import IntegerHead
from halve.runtime.linear import SparseLinear
from models import decoder

PATTERN = Pattern("2:4")


@pytest.mark.parametrize(("values", "bits"), [("own", None), ("int8", 8), ("int4", 4)])
def test_a_packed_model_of_so_many_blocks_is_run_and_medians_count(monkeypatch, values, bits):
    clock, turns, models = [0.0], iter([9.0, 3.0, 1.0, 2.0]), []
    monkeypatch.setattr(packed_decoding.time, "perf_counter", lambda: clock[0])

    def continue_text(model, ids, settings, streamer):
        models.append(model)
        assert (ids.shape, settings.max_new_tokens) == ((1, PROMPT), NEW)
        streamer.put(ids)
        clock[0] += 100.0  # the prompt does not count
        seconds = next(turns)
        for _ in range(NEW):
            streamer.put(ids)
            clock[0] += seconds
        streamer.end()

    monkeypatch.setattr(packed_decoding, "continue_text", continue_text)
    assert packed_seconds(decoder("llama"), 2, PATTERN, values, torch.bfloat16) == 2.0
    assert len(models) == 1 + ROUNDS
    blocks = models[0].model.layers
    assert len(blocks) == 2
    layers = [layer for layer in blocks.modules() if isinstance(layer, SparseLinear)]
    assert len(layers) == 2 * 7
    assert {layer.bits or None for layer in layers} == {bits}
    assert isinstance(models[0].lm_head, IntegerHead) == (bits is not None)


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gpt2"])
def test_every_family_decodes(family):
    assert packed_seconds(decoder(family), 1, PATTERN, "own", torch.float32) > 0


def test_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _device: 1)
    with pytest.raises(InputError, match=r"the weights of 1 blocks to decode with need .* leave --against out"):
        packed_seconds(decoder("llama"), 1, PATTERN, "own", torch.float32)


def test_the_name_says_what_is_held_where():
    assert packed_name(PATTERN, "own", torch.float32) == "Halve 2:4 in float32"
    assert packed_name(PATTERN, "bf16", torch.bfloat16) == "Halve 2:4 in bf16"
    assert packed_name(PATTERN, "int4", torch.bfloat16) == "Halve 2:4 in int4, head in int8"
