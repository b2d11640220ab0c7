"""The time of everything but the prunable linear layers, against sleeps of known length."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from halve.maths.pattern import Pattern
from halve.model.stacks import find_stack
from halve.planner import rest
from halve.planner.outline import outline
from halve.planner.rest import Rest, _Watched, as_json, as_sequences, measure_rest
from halve.runtime import speed
from models import bert, decoder, vit

CPU = torch.device("cpu")
PATTERN = Pattern("2:4")


def measured(model, batches=(1,), **changes):
    given = {"pattern": PATTERN, "dtype": torch.float32, "device": CPU, "free": None, "seconds": 0.0, **changes}
    return measure_rest(model, batches, **given)


@pytest.mark.parametrize(
    ("batch", "limit", "expected"),
    [
        (1, None, (1, 1)),
        (64, 16, (64, 1)),
        (65, None, (1, 65)),
        (2048, None, (1, 2048)),
        (2049, None, (2, 1025)),
        (2048, 512, (4, 512)),
        (8192, 131072, (4, 2048)),
    ],
)
def test_small_batches_are_steps_and_large_ones_prompts(batch, limit, expected):
    assert as_sequences(batch, limit) == expected


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "opt", "gemma3", "bloom", "mixtral", "qwen3_moe"])
def test_every_family_is_measured(family):
    found = measured(decoder(family), (2, 100))
    for batch, row in found.items():
        assert isinstance(row, Rest), row
        assert (row.batch, row.measured_blocks, row.blocks) == (batch, 3, 3)
        assert row.block_seconds > 0
        assert row.linear_seconds > 0
        assert row.outside_seconds > 0
        assert row.seconds == row.outside_seconds + 3 * row.block_seconds
        assert row.forward_seconds == row.seconds + 3 * row.linear_seconds


def test_encoders_are_measured_too():
    assert isinstance(measured(bert())[1], Rest)


def taking(module, seconds, clock):
    """Let a module's forward advance a clock."""
    kind = type(module)

    def forward(self, *arguments, **keywords):
        clock[0] += seconds
        return kind.forward(self, *arguments, **keywords)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def test_time_is_told_apart(monkeypatch):
    clock, build = [0.0], rest.build_random

    def slow(*arguments):
        model = build(*arguments)
        for block in find_stack(model)[1]:
            taking(block, 1.0, clock)
            taking(block.mlp, 2.0, clock)
            taking(block.mlp.up_proj, 16.0, clock)
            taking(block.self_attn.q_proj, 32.0, clock)
        taking(model.lm_head, 4.0, clock)
        return model

    monkeypatch.setattr(rest, "build_random", slow)
    monkeypatch.setattr(rest, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert measured(decoder("llama"))[1] == Rest(
        batch=1,
        sequences=1,
        length=1,
        measured_blocks=3,
        blocks=3,
        outside_seconds=4.0,
        block_seconds=3.0,
        linear_seconds=48.0,
    )


def test_what_cannot_run_sparse_belongs_to_the_rest(monkeypatch):
    whole = _Watched.of(decoder("llama"), PATTERN, torch.float32, CPU).linears
    monkeypatch.setattr(speed, "unfit", lambda d_out, d_in, *_: "odd" if (d_out, d_in) == (32, 64) else "")
    fewer = _Watched.of(decoder("llama"), PATTERN, torch.float32, CPU).linears
    assert (len(whole), len(fewer)) == (21, 18)


def test_fewer_blocks_stand_for_all_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(rest, "last_level_cache", lambda: 1 << 10)
    model = decoder("llama", num_hidden_layers=12)
    everything = sum(parameter.numel() for parameter in model.parameters()) * 4
    row = measured(model, free=everything)[1]  # only half of it may be used
    assert (row.measured_blocks, row.blocks) == (2, 12)
    assert row.seconds == row.outside_seconds + 12 * row.block_seconds
    assert measured(model, free=2 * everything)[1].measured_blocks == 12


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "gpt2", "bloom"])
def test_fewer_blocks_of_every_family(family):
    built = rest.build_random(decoder(family), 2, torch.float32, CPU)
    assert len(find_stack(built)[1]) == 2


def test_a_cache_must_not_hold_the_blocks(monkeypatch):
    monkeypatch.setattr(rest, "last_level_cache", lambda: 1000)
    assert rest._affordable(80, 100, 100 * 60, CPU) == 40  # four caches
    assert rest._affordable(80, 100, 100 * 30, CPU) == 30
    assert rest._affordable(80, 100, 100 * 80, CPU) == 80
    assert rest._affordable(80, 100, None, CPU) == 80
    assert rest._affordable(80, 100, -5, CPU) == 0
    assert rest._affordable(80, 100000, 100000 * 10, CPU) == 2
    assert rest._affordable(80, 100, None, torch.device("cuda")) == 8


def test_the_weights_are_finite_and_tied_as_the_models_are():
    for family in ("llama_tied", "gemma3", "mixtral"):
        built = rest.build_random(outline(decoder(family)).skeletons[0], 3, torch.float16, CPU)
        assert all(bool(parameter.isfinite().all()) for parameter in built.parameters())
        assert all(bool((parameter == 1).all()) for parameter in built.parameters() if parameter.ndim < 2)
        assert bool(built(torch.arange(6).view(2, 3)).logits.isfinite().all())
    tied = rest.build_random(decoder("llama_tied"), 3, torch.float16, CPU)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_the_models_own_weights_and_settings_are_left_alone():
    model = decoder("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rest.build_random(model, 2, torch.bfloat16, CPU)
    assert model.config.num_hidden_layers == 3
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert model.dtype == torch.float32


def test_why_it_is_not_measured():
    assert "is no transformers model" in measured(nn.Sequential(nn.Sequential(nn.Linear(4, 4))))[1]
    assert "has no vocabulary" in measured(vit())[1]
    reasons = measured(decoder("llama"), (1, 8), free=1000)
    assert set(reasons) == {1, 8}
    assert "more than half of the 0.0 GB of memory that are free" in reasons[1]
    failed = measured(decoder("gpt2", n_positions=1), (1, 100))  # the table of positions is short, and is not asked
    assert isinstance(failed[1], Rest)


def test_a_model_that_cannot_run_says_so(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("not\nenough memory")

    monkeypatch.setattr(rest, "_time", broken)
    assert measured(decoder("llama"))[1] == "LlamaForCausalLM could not be run on 1 x 1 tokens: not enough memory"


def test_as_json_keeps_order_and_reasons():
    row = Rest(
        batch=8,
        sequences=8,
        length=1,
        measured_blocks=2,
        blocks=3,
        outside_seconds=0.5,
        block_seconds=0.25,
        linear_seconds=1.0,
    )
    assert as_json({8: row, 1: "no room"}) == [
        {
            "batch": 8,
            "sequences": 8,
            "length": 1,
            "measured_blocks": 2,
            "blocks": 3,
            "outside_seconds": 0.5,
            "block_seconds": 0.25,
            "linear_seconds": 1.0,
            "seconds": 1.25,
            "forward_seconds": 4.25,
        },
        {"batch": 1, "reason": "no room"},
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu():
    model = decoder("llama", num_hidden_layers=12, hidden_size=1024, intermediate_size=2048)
    row = measured(model, (8,), dtype=torch.bfloat16, device=torch.device("cuda"))[8]
    assert (row.measured_blocks, row.blocks) == (8, 12)
    assert 0 < row.linear_seconds < 0.01
    assert 0 < row.block_seconds < 0.01
