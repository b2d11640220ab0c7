import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaMLP

import models
from halve.errors import HalveError
from halve.runtime.accelerate import accelerate, restore
from halve.runtime.compiled import instruction_sets, quantised_instruction_sets
from halve.runtime.decoding import blocks, room
from halve.runtime.decoding.next_token import computes_in_one_call, decode_by_modules, decode_in_one_call
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

    class Counted(blocks.library.Decoder):
        def run(self, batch, *rest):
            found.append(batch)
            super().run(batch, *rest)

    monkeypatch.setattr(blocks.library, "Decoder", Counted)
    return found


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_those_of_a_whole_text_in_double(family, dtype, name, monkeypatch, runs):
    monkeypatch.setattr(blocks, "instruction_sets", lambda: (name,))
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
    monkeypatch.setattr(blocks, "quantised_instruction_sets", lambda: (name,))
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
    monkeypatch.setattr(room, "AHEAD", 2)
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
    for module in (model.model.norm, model.model.layers[0].mlp.act_fn):
        runs.clear()
        module.forward = lambda x: x * 0
        step_by_step(model, ids, mask, 5)
        assert runs == []
        del module.forward
    hook = model.model.norm.register_forward_hook(lambda *_: heard.append(1))
    everywhere = nn.modules.module.register_module_forward_hook
    for other in (hook, everywhere(lambda *_: heard.append(1))):
        heard.clear()
        step_by_step(model, ids, mask, 5)
        assert heard
        assert runs == []
        hook.remove()
        other.remove()
    step_by_step(model, ids, mask, 5)
    assert runs == [1] * 3


def test_what_is_set_otherwise_counts(runs):
    model = model_of()
    assert decode_in_one_call(model) == ""
    ids, mask = prompt(1, 8), padded(1, 8, 0)
    step_by_step(model, ids, mask, 5)
    for module, name, value in (
        (model.model.layers[1].self_attn, "scaling", 0.9),
        (model.model.layers[1].mlp, "act_fn", nn.GELU()),
        (model.model.norm, "variance_epsilon", 0.7),
        (model.config, "num_hidden_layers", 2),
        (model.config, "output_hidden_states", True),
    ):
        before = getattr(module, name)
        setattr(module, name, value)
        got = step_by_step(model, ids, mask, 5)
        assert off(got, in_double(model, ids, mask, 5)) < 1e-5, name
        setattr(module, name, before)
    runs.clear()
    step_by_step(model, ids, mask, 5)
    assert runs == [1] * 3


@torch.no_grad()
def test_caches_and_inputs_that_do_not_fit_are_the_modules_business(runs):
    model = model_of()
    assert decode_in_one_call(model) == ""
    ids = prompt(1, 8)

    class Own(DynamicCache):
        pass

    def filled(cache, of=model, sequences=1):
        of(ids[:, :5].expand(sequences, -1), cache=cache)
        return cache

    runs.clear()
    model(ids[:, 5:6], cache=filled(Own(config=model.config)))
    uneven = filled(DynamicCache(config=model.config))
    uneven.layers[1].keys, uneven.layers[1].values = uneven.layers[1].keys[:, :, 1:], uneven.layers[1].values[:, :, 1:]
    model(ids[:, 5:6], cache=uneven)
    for other in (model_of(num_key_value_heads=4), model_of(head_dim=64), model_of(dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            model(ids[:, 5:6], cache=filled(DynamicCache(config=other.config), other))
    with pytest.raises(RuntimeError):
        model(inputs_embeds=torch.randn(1, 1, 48), cache=filled(DynamicCache(config=model.config)))
    model(ids[:, 5:6], cache=filled(DynamicCache(config=model.config)), nobody_knows_this=[1])
    assert runs == []


@torch.no_grad()
def test_masks_of_any_kind_and_texts_of_padding_alone():
    model = model_of()
    ids = prompt(2, 6)
    for mask in (torch.tensor([[0, 0.5, 1, 1, 1, 1], [1] * 6]), torch.tensor([[0, 256, 1, 1, 1, 1], [1] * 6])):
        got = []
        for one_call in (False, True):
            assert not one_call or decode_in_one_call(model) == ""
            cache = DynamicCache(config=model.config)
            model(ids[:, :5], attention_mask=mask[:, :5], cache=cache)
            got.append(model(ids[:, 5:], attention_mask=mask, cache=cache).logits)
            decode_by_modules(model)
        assert off(got[1], got[0].double()) < 1e-5
    assert decode_in_one_call(model) == ""
    cache = DynamicCache(config=model.config)
    mask = torch.tensor([[0] * 6, [1] * 6])
    model(ids[:, :5], cache=cache)
    assert model(ids[:, 5:], attention_mask=mask, cache=cache).logits.isfinite().all()


def test_a_model_that_is_let_go_is_gone(runs):
    gc.disable()
    try:
        model = model_of()
        assert decode_in_one_call(model) == ""
        step_by_step(model, prompt(1, 8), padded(1, 8, 0), 5)
        gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_accelerating_says_what_is_so(runs):
    model = model_of()
    assert decode_in_one_call(model) == ""
    assert accelerate(model, only_where_faster=None).decoding == ""
    assert computes_in_one_call(model)
    other = model_of()
    assert decode_in_one_call(other) == ""
    assert accelerate(other, only_where_faster=None, one_call=False).decoding == "one call was not asked for"
    assert not computes_in_one_call(other)


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


class OwnMLP(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(torch.Tensor):
    """A tensor whose numbers are elsewhere, as quantisers have them."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [arg.held if isinstance(arg, Wrapped) else arg for arg in args]
        found = func(*plain, **(kwargs or {}))
        return Wrapped(found) if func is torch.ops.aten.detach.default else found


def changed(place, module):
    model = model_of()
    model.model.set_submodule(place, module)
    return model


def with_weight(place, weight):
    model = model_of()
    model.model.get_submodule(place).weight = nn.Parameter(weight, requires_grad=False)
    return model


def setting(place, name, value):
    model = model_of()
    setattr(model.model.get_submodule(place), name, value)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: models.decoder("gpt2"), "not of a family"),
        (lambda: models.decoder("llama"), "heads of width 8 are no multiple of 32"),
        (lambda: model_of(hidden_act="gelu"), "its activation is GELUActivation, not SiLU"),
        (lambda: model_of(intermediate_size=80), "the dense weight of down_proj is not contiguous, or its 80 columns"),
        (lambda: model_of().double(), "its last norm is float64"),
        (lambda: changed("norm", nn.LayerNorm(64)), "its last norm is a LayerNorm"),
        (lambda: changed("norm", nn.Identity()), "its last norm is a Identity"),
        (lambda: changed("layers.1.mlp", nn.Identity()), "block 1: mlp is a Identity"),
        (lambda: changed("layers.1.mlp", OwnMLP(model_of().config)), "block 1: mlp is a OwnMLP"),
        (
            lambda: changed("layers.2.self_attn.q_proj", nn.Linear(64, 64, bias=False)),
            "block 2: o_proj has shape (64, 128), where (64, 64) goes",
        ),
        (lambda: with_weight("layers.0.input_layernorm", torch.rand(128)[::2]), "block 0: input_layernorm has shape"),
        (lambda: with_weight("layers.0.mlp.up_proj", Wrapped(torch.rand(192, 64))), "is no plain tensor"),
        (lambda: setting("layers.1.self_attn", "scaling", 0.5), "its norms or its attentions are set differently"),
        (lambda: setting("norm", "variance_epsilon", 0.5), "its norms or its attentions are set differently"),
        (lambda: setting("layers.1.self_attn", "layer_idx", 0), "block 1: it says that it is block 0"),
        (lambda: with_weight("layers.0.input_layernorm", torch.full((64,), torch.nan)), "returns no finite numbers"),
    ],
)
def test_what_cannot_be_computed_in_one_call_is_left_with_the_reason(make, reason):
    model = make()
    assert reason in decode_in_one_call(model)
    assert not computes_in_one_call(model)


def test_a_sliding_window_goes_the_ordinary_way(runs):
    model = model_of("mistral", sliding_window=8)
    expected = model.generate(prompt(), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert "a sliding window of 8 tokens" in decode_in_one_call(model)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, min_new_tokens=12, do_sample=False), expected)
    assert runs == []
    assert decode_in_one_call(model_of("mistral", sliding_window=128)) == ""  # as long as a text can be


def test_a_wrong_computation_is_found_out(monkeypatch):
    class Wrong(blocks.library.Decoder):
        def run(self, batch, x, cosines, sines, *rest):
            super().run(batch, x, sines, cosines, *rest)

    monkeypatch.setattr(blocks.library, "Decoder", Wrong)
    model = model_of()
    with pytest.raises(HalveError, match=r"block \d computed in one call differs from the modules' by \S+ times"):
        decode_in_one_call(model)
    assert not computes_in_one_call(model)
    with pytest.raises(HalveError, match="one call differs"):
        accelerate(model, only_where_faster=None)
    assert not [layer for layer in model.modules() if type(layer).__name__ == "SparseLinear"]
