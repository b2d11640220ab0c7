import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

import models
from halve.errors import HalveError
from halve.runtime import decoding
from halve.runtime.accelerate import accelerate, restore
from halve.runtime.compiled import instruction_sets, quantised_instruction_sets
from halve.runtime.decoding import computes_in_one_call, decode_by_modules, decode_in_one_call
from packed_models import prune_layers

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the compiled kernels are not built")

WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
FAMILIES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama_64": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}),
    "llama_128": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
ERROR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Of logits, a share of their norm: three blocks, in which each number is rounded a few times."""


def model_of(family="llama", dtype=torch.float32, *, pruned=True, **changes):
    name, own = FAMILIES[family]
    model = models.decoder(name, **{**WIDE, **own, **changes}).to(dtype).eval()
    model.requires_grad_(False)
    if pruned:
        prune_layers(model, "2:4")
    return model


def off(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def prompt(sequences=1, length=7):
    return torch.randint(3, models.VOCAB, (sequences, length), generator=torch.Generator().manual_seed(sequences))


def padded(sequences, length, padding):
    mask = torch.ones(sequences, length, dtype=torch.long)
    mask[0, :padding] = 0
    return mask


@torch.no_grad()
def step_by_step(model, ids, mask, start):
    """Return the logits of all tokens from ``start`` on, each computed after those before."""
    position = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    model(ids[:, :start], attention_mask=mask[:, :start], position_ids=position[:, :start], cache=cache)
    logits = []
    for at in range(start, ids.shape[1]):
        here = slice(at, at + 1)
        given = {"attention_mask": mask[:, : at + 1], "position_ids": position[:, here], "cache": cache}
        logits.append(model(ids[:, here], **given).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def in_double(model, ids, mask, start):
    """Return the same, of all tokens at once and without a cache."""
    position = (mask.cumsum(1) - 1).clamp_min(0)
    return copy.deepcopy(model).double()(ids, attention_mask=mask, position_ids=position).logits[:, start:]


@pytest.fixture
def runs(monkeypatch):
    """The number of sequences of each call of the compiled blocks."""
    found = []

    class Counted(decoding.library.Decoder):
        def run(self, batch, *rest):
            found.append(batch)
            super().run(batch, *rest)

    monkeypatch.setattr(decoding.library, "Decoder", Counted)
    return found


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_those_of_a_whole_text_in_double(family, dtype, name, monkeypatch, runs):
    monkeypatch.setattr(decoding, "instruction_sets", lambda: (name,))
    model = model_of(family, dtype)
    ids, mask = prompt(3, 30), padded(3, 30, 4)
    expected = in_double(model, ids, mask, 9)
    accelerate(model, only_where_faster=None, one_call=False)
    assert decode_in_one_call(model) == ""
    runs.clear()
    assert off(step_by_step(model, ids, mask, 9), expected) < ERROR[dtype]
    assert runs == [3] * 21


@pytest.mark.parametrize("name", quantised_instruction_sets())
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
def test_quantised_matrices_multiply_as_in_the_modules(dtype, values, name, monkeypatch):
    monkeypatch.setattr(decoding, "quantised_instruction_sets", lambda: (name,))
    model = model_of("qwen2", dtype)
    assert accelerate(model, values=values, only_where_faster=None).decoding == ""
    ids, mask = prompt(2, 12), padded(2, 12, 3)
    got = step_by_step(model, ids, mask, 5)
    decode_by_modules(model)
    assert off(got, step_by_step(model, ids, mask, 5).double()) < 0.05


def test_dense_matrices_beside_packed_and_quantised_ones():
    model = model_of()
    accelerate(model, values="int8", only_where_faster=None)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"):
        restore(model, name)
    ids, mask = prompt(1, 12), padded(1, 12, 0)
    got = step_by_step(model, ids, mask, 5)
    decode_by_modules(model)
    assert off(got, step_by_step(model, ids, mask, 5).double()) < 0.02


@pytest.mark.parametrize("family", list(FAMILIES))
def test_generated_text_is_that_of_the_modules(family, runs):
    model = model_of(family)
    asked = {"attention_mask": padded(2, 7, 2), "max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    for more in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        torch.manual_seed(0)
        expected = model.generate(prompt(2), **(asked | more))
        assert decode_in_one_call(model) == ""
        runs.clear()
        torch.manual_seed(0)
        assert torch.equal(model.generate(prompt(2), **(asked | more)), expected)
        assert len(runs) == 23
        decode_by_modules(model)


def test_a_cache_grows_and_is_an_ordinary_one(monkeypatch, runs):
    monkeypatch.setattr(decoding, "_ROOM", 2)
    model = model_of()
    ids = prompt(1, 20)
    mask = padded(1, 20, 0)
    expected = in_double(model, ids, mask, 0)
    assert decode_in_one_call(model) == ""
    runs.clear()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(ids[:, :5], cache=cache).logits]
        parts += [model(ids[:, at : at + 1], cache=cache).logits for at in range(5, 12)]
        other = copy.deepcopy(cache)
        parts.append(model(ids[:, 12:15], cache=cache).logits)  # the ordinary way
        parts += [model(ids[:, at : at + 1], cache=cache).logits for at in range(15, 20)]
        assert off(torch.cat(parts, dim=1), expected) < 1e-5
        assert cache.get_seq_length() == 20
        for at in range(12, 15):  # the copy has gone its own way
            assert off(model(ids[:, at : at + 1], cache=other).logits, expected[:, at : at + 1]) < 1e-5
        model(ids[:, :1], cache=other)
        other.crop(-1)
        assert off(model(ids[:, 15:16], cache=other).logits, expected[:, 15:16]) < 1e-5
    assert len(runs) == 7 + 5 + 3 + 2


def test_what_a_cropped_cache_has_dropped_stays_with_who_kept_it():
    model = model_of()
    assert decode_in_one_call(model) == ""
    cache = DynamicCache(config=model.config)
    ids = prompt(1, 9)
    with torch.no_grad():
        model(ids[:, :7], cache=cache)
        model(ids[:, 7:8], cache=cache)
        kept = cache.layers[0].keys
        before = kept.clone()
        cache.crop(-1)
        model(ids[:, 8:9], cache=cache)
    assert torch.equal(kept, before)


def test_a_changed_weight_counts():
    model = model_of()
    assert decode_in_one_call(model) == ""
    ids, mask = prompt(1, 8), padded(1, 8, 0)
    step_by_step(model, ids, mask, 5)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)  # in its place
    assert off(step_by_step(model, ids, mask, 5), in_double(model, ids, mask, 5)) < 1e-5
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 3  # in another
    assert off(step_by_step(model, ids, mask, 5), in_double(model, ids, mask, 5)) < 1e-5
    layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight * 4, requires_grad=False)
    assert off(step_by_step(model, ids, mask, 5), in_double(model, ids, mask, 5)) < 1e-5
    model.model.layers[0] = copy.deepcopy(layer)
    model.model.layers[0].self_attn.layer_idx = 0
    assert off(step_by_step(model, ids, mask, 5), in_double(model, ids, mask, 5)) < 1e-5


def test_a_converted_model_is_compiled_anew(runs):
    model = model_of()
    accelerate(model, only_where_faster=None)
    ids, mask = prompt(1, 8), padded(1, 8, 0)
    model.to(torch.bfloat16)
    runs.clear()
    got = step_by_step(model, ids, mask, 5)
    assert runs == [1] * 3
    decode_by_modules(model)
    assert off(got, step_by_step(model, ids, mask, 5).double()) < ERROR[torch.bfloat16]


def test_whoever_listens_to_a_module_is_heard(runs):
    model = model_of()
    assert decode_in_one_call(model) == ""
    heard = []
    ids, mask = prompt(1, 8), padded(1, 8, 0)
    step_by_step(model, ids, mask, 5)
    runs.clear()
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    step_by_step(model, ids, mask, 5)
    assert (len(heard), runs) == (4, [])
    hook.remove()
    step_by_step(model, ids, mask, 5)
    assert (len(heard), runs) == (4, [1] * 3)
    model.model.layers[0].mlp.act_fn.forward = lambda x: x * 0
    step_by_step(model, ids, mask, 5)
    assert runs == [1] * 3


@torch.no_grad()
def test_other_calls_go_the_ordinary_way(runs):
    model = model_of()
    assert decode_in_one_call(model) == ""
    ids = prompt(1, 8)
    static = StaticCache(config=model.config, max_cache_len=16)

    def cache(sequences=1):
        found = DynamicCache(config=model.config)
        model(ids[:, :5].expand(sequences, -1), cache=found)
        return found

    new = ids[:, 5:6]
    model(ids[:, :5], cache=static)
    calls = {
        "a cache of fixed size": lambda: model(new, cache=static),
        "no cache": lambda: model(new, use_cache=False),
        "two tokens": lambda: model(ids[:, 5:7], cache=cache()),
        "hidden states": lambda: model(new, cache=cache(), output_hidden_states=True),
        "a mask of its own": lambda: model(new, cache=cache(), attention_mask=torch.zeros(1, 1, 1, 6)),
        "many sequences": lambda: model(new.expand(17, -1), cache=cache(17)),
    }
    runs.clear()
    for call in calls.values():
        call()
    with torch.enable_grad():
        model(new, cache=cache())
    with torch.autocast("cpu", torch.bfloat16):
        model(new, cache=cache())
    assert runs == []
    model(new, cache=cache())
    model(inputs_embeds=model.get_input_embeddings()(new), cache=cache())
    model(new.expand(16, -1), cache=cache(16))
    assert runs == [1, 1, 16]


@torch.no_grad()
def test_embeddings_that_are_given_stay_as_they_are():
    model = model_of()
    assert decode_in_one_call(model) == ""
    cache = DynamicCache(config=model.config)
    model(prompt(), cache=cache)
    given = model.get_input_embeddings()(prompt(1, 1))
    before = given.clone()
    model(inputs_embeds=given, cache=cache)
    assert torch.equal(given, before)


def test_copies_and_pickles_compute_with_their_own_weights(runs):
    model = model_of()
    assert decode_in_one_call(model) == ""
    ids, mask = prompt(1, 8), padded(1, 8, 0)
    expected = step_by_step(model, ids, mask, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert computes_in_one_call(other)
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        runs.clear()
        assert torch.equal(step_by_step(other, ids, mask, 5), expected)
        assert runs == [1] * 3
        with torch.no_grad():
            model.model.norm.weight.div_(2)


def test_a_compiled_model_goes_the_ordinary_way(runs):
    model = model_of()
    assert decode_in_one_call(model) == ""
    ids, mask = prompt(1, 7), padded(1, 7, 0)
    expected = step_by_step(model, ids, mask, 5)
    runs.clear()
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(step_by_step(compiled, ids, mask, 5), expected, atol=1e-5)
    assert runs == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: models.decoder("gpt2"), "not of a family"),
        (lambda: models.decoder("llama"), "heads of width 8 are no multiple of 32"),
        (lambda: model_of(hidden_act="gelu"), "its activation is GELUActivation, not SiLU"),
        (lambda: model_of(intermediate_size=80), "down_proj is dense, and d_in = 80 no multiple of 64"),
        (lambda: model_of().double(), "its norms are float64"),
    ],
    ids=["family", "width", "activation", "dense", "dtype"],
)
def test_what_cannot_be_computed_in_one_call_is_left_with_the_reason(make, reason):
    model = make()
    assert reason in decode_in_one_call(model)
    assert not computes_in_one_call(model)


def test_a_sliding_window_goes_the_ordinary_way(runs):
    model = model_of("mistral", sliding_window=8)
    expected = model.generate(prompt(), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert decode_in_one_call(model) == ""
    runs.clear()
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, min_new_tokens=12, do_sample=False), expected)
    assert runs == []


def test_a_wrong_computation_is_found_out(monkeypatch):
    class Wrong(decoding.library.Decoder):
        def run(self, batch, x, cosines, sines, *rest):
            super().run(batch, x, sines, cosines, *rest)

    monkeypatch.setattr(decoding.library, "Decoder", Wrong)
    model = model_of()
    with pytest.raises(HalveError, match=r"block \d computed in one call differs from the modules' by \S+ times"):
        decode_in_one_call(model)
    assert not computes_in_one_call(model)
    with pytest.raises(HalveError, match="one call differs"):
        accelerate(model, only_where_faster=None)
    assert not [layer for layer in model.modules() if type(layer).__name__ == "SparseLinear"]
