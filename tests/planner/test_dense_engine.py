"""Packed weights beside a dense engine: times that are known beforehand, put together to those of a whole model."""

import pytest
from torch import nn

from dense_engines import Steady
from halve.errors import HalveError, InputError
from halve.planner import dense_engine
from halve.planner.dense_engine import Decoding, block_counts, check_engine, measure_beside, said, speedup
from models import decoder

BLOCKS = 12


def decoding(*seconds, run=(1, 3), **changes):
    given = {"contender": "one", "blocks": 30, "blocks_run": run, "token_seconds": seconds, **changes}
    return Decoding(**given)


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setattr(dense_engine, "last_level_cache", lambda: 0)


def test_the_time_of_a_token_is_linear_in_the_blocks():
    found = decoding(0.5 + 0.125, 0.5 + 3 * 0.125)
    assert found.seconds == 0.5 + 30 * 0.125
    assert found.tokens_per_second == 1 / (0.5 + 30 * 0.125)
    assert found.why_unknown == ""
    assert decoding(0.75, run=(30,)).seconds == 0.75


@pytest.mark.parametrize("last", [0.5, 0.4])
def test_more_blocks_that_take_no_longer_give_no_time(last):
    found = decoding(0.5, last)
    assert found.seconds is None
    assert found.tokens_per_second is None
    assert "3 blocks took no longer than 1" in found.why_unknown
    assert speedup(found, decoding(0.5, 1.0)) is None


def test_a_large_model_is_timed_with_one_and_three_blocks(monkeypatch, no_cache):
    model = decoder("llama", num_hidden_layers=BLOCKS)
    assert block_counts(model) == (1, 3)
    in_block = sum(p.numel() for name, p in model.named_parameters() if "layers.0." in name and p.ndim == 2)
    head = model.lm_head.weight.numel()
    enough = head + 2.5 * in_block * 3.25 / 8  # the head at 8 bits, and more than two blocks
    monkeypatch.setattr(dense_engine, "last_level_cache", lambda: int(enough / 2))
    assert block_counts(model) == (3, 9)
    monkeypatch.setattr(dense_engine, "last_level_cache", lambda: 1 << 20)
    assert block_counts(model) == (BLOCKS,)


def test_the_packed_one_comes_first_and_then_every_kind(no_cache):
    heard, engine = [], Steady()
    model = decoder("llama", num_hidden_layers=BLOCKS)
    found = measure_beside(engine, model, "ours", lambda blocks: 0.5 + blocks, threads=3, listen=heard.append)
    assert [row.contender for row in found] == ["ours", "steady x1", "steady x2"]
    assert [row.seconds for row in found] == [0.5 + BLOCKS, 4.0, 2.0]
    assert heard == ["decoding by ours", "decoding by steady x1", "decoding by steady x2"]
    assert engine.asked == [
        ("LlamaForCausalLM", kind, blocks, 3) for kind in engine.kinds for blocks in block_counts(model)
    ]
    assert [row.as_json(found[0])["packed_speedup"] for row in found] == [1.0, 4 / 12.5, 2 / 12.5]


def test_one_that_fails_is_named_and_the_others_are_measured(no_cache):
    model = decoder("llama", num_hidden_layers=BLOCKS)
    found = measure_beside(Steady("x1"), model, "ours", lambda _: 4.0, threads=1, listen=lambda _: None)
    assert [row.reason for row in found] == ["", "it fell over", ""]
    assert found[2].seconds == 2.0
    assert "Ours was not measured (3 blocks took no longer than 1" in said(found, "2:4")
    assert "steady x1 was not measured (it fell over)" in said(found, "2:4")


def test_the_sentence_says_what_is_beside_what():
    rows = [
        decoding(0.02, run=(30,), contender="Halve 2:4 in int4"),
        decoding(0.04, run=(30,), contender="llama.cpp Q8_0"),
        decoding(0.015, run=(30,), contender="llama.cpp Q4_0"),
    ]
    assert said(rows, "2:4") == (
        "Decoding one sequence with a short context, Halve 2:4 in int4 makes 50.0 tokens a second: 2.00 times what "
        "llama.cpp Q8_0 makes dense (25.0), 0.75 times what llama.cpp Q4_0 makes dense (66.7). Quality differs, and is "
        "not measured here: a dense model in 8 or 4 bits usually keeps more of what it knows than one at 2:4."
    )


@pytest.mark.parametrize(
    ("engine", "skeletons", "device", "rows", "message"),
    [
        ("llama.cpp", [decoder("llama")], "cpu", 1, r"against is 'llama\.cpp': give the engine itself"),
        (Steady(), [decoder("llama")], "cuda", 1, "steady is measured on the CPU, and this plan is for cuda"),
        (Steady(), [decoder("llama")], "cpu", 8, "let the batches have 1 among them"),
        (Steady(), [decoder("llama")] * 2, "cpu", 1, "m is not one model of transformers"),
        (Steady(), [nn.Linear(4, 4)], "cpu", 1, "m is not one model of transformers"),
    ],
)
def test_what_cannot_be_compared_is_refused(engine, skeletons, device, rows, message):
    with pytest.raises(InputError, match=message):
        check_engine(engine, "m", skeletons, device, rows)
    assert isinstance(engine, str) or engine.checked == []


def test_the_engine_is_asked_whether_it_takes_the_model():
    engine = Steady()
    check_engine(engine, "m", [decoder("llama")], "cpu", 1)
    assert engine.checked == [("m", "LlamaForCausalLM")]
    engine.check = lambda *_: (_ for _ in ()).throw(HalveError("not this one"))
    with pytest.raises(HalveError, match="not this one"):
        check_engine(engine, "m", [decoder("llama")], "cpu", 1)
