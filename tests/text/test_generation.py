from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.integrations import sdpa_attention

from halve.device import compute_dtype
from halve.errors import CalibrationError, InputError, UnsupportedModelError
from halve.text import generation
from halve.text.tokens import calibration_tokens, evaluation_tokens, hash_ids
from models import DECODERS, VOCAB, decoder
from tiny_tokenizers import surrounding, word_level


@pytest.fixture
def full_precision(monkeypatch):
    monkeypatch.setattr(generation, "compute_dtype", lambda _device: torch.float32)


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_own_text_inverts_the_models_distribution(monkeypatch, batch):
    """Without the cache, in float64: every token is where the distribution function passes its uniform number."""
    monkeypatch.setattr(generation, "_BATCH", batch)
    model, tokenizer = decoder("llama"), word_level()
    found = calibration_tokens("self", tokenizer, samples=7, seq_len=20, seed=4, model=model)
    draws = 1 - torch.rand(7, 20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert (found.ids[:, 0] == tokenizer.bos_token_id).all()
    with torch.no_grad():
        logits = model.double()(input_ids=found.ids).logits[:, :-1, : len(tokenizer)]
    upper = logits.softmax(-1).cumsum(-1)
    lower = nn.functional.pad(upper, (1, 0))[..., :-1]
    next_ids = found.ids[:, 1:, None]
    assert (draws[:, 1:] <= upper.gather(-1, next_ids)[..., 0] + 1e-5).all()
    assert (draws[:, 1:] >= lower.gather(-1, next_ids)[..., 0] - 1e-5).all()
    assert len(found.ids.unique()) > 20
    assert (found.source, found.documents, found.separator) == ("self", 7, "")
    assert found.sha256 == hash_ids(found.ids)


def test_own_text_is_seeded_and_leaves_the_model_alone():
    model, tokenizer = decoder("llama", attention_dropout=0.5).train(), word_level()
    state = torch.get_rng_state()
    first, again, other = (
        calibration_tokens("self", tokenizer, samples=3, seq_len=16, seed=seed, model=model) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert first == again
    assert first != other


def test_own_text_without_bos_starts_anywhere():
    tokenizer = word_level(bos=None)
    found = calibration_tokens("self", tokenizer, samples=64, seq_len=3, model=decoder("llama"))
    first = set(found.ids[:, 0].tolist())
    assert len(first) > 10
    assert not first & set(tokenizer.all_special_ids)
    assert found.ids.max() < len(tokenizer) < VOCAB


class Scripted(nn.Module):
    """A model with given logits at every position."""

    def __init__(self, logits, cache=()):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.cache = cache

    def forward(self, input_ids, past_key_values, use_cache):
        assert use_cache
        logits = self.logits.expand(len(input_ids), 1, -1)
        return SimpleNamespace(logits=logits, past_key_values=self.cache)


def test_impossible_tokens_are_never_drawn(monkeypatch):
    impossible = -float("inf")
    logits = [impossible] * 3 + [0.0, impossible, 0.0] + [impossible] * 60
    for draw in (0.0, 0.5, 1.0 - 2**-53):
        monkeypatch.setattr(torch, "rand", lambda *size, draw=draw, **_options: torch.full(size, draw))
        found = calibration_tokens("self", word_level(), samples=2, seq_len=50, model=Scripted(logits))
        assert set(found.ids[:, 1:].flatten().tolist()) <= {3, 5}


def test_own_text_that_cannot_be_written():
    tokenizer = word_level()
    with pytest.raises(InputError, match="'self' needs the model"):
        calibration_tokens("self", tokenizer, samples=1, seq_len=8)
    with pytest.raises(InputError, match="seq_len = 129 exceeds the model's max_position_embeddings = 128"):
        calibration_tokens("self", tokenizer, samples=1, seq_len=129, model=decoder("llama"))
    with pytest.raises(CalibrationError, match="not finite after 1 tokens"):
        calibration_tokens("self", tokenizer, samples=1, seq_len=8, model=Scripted([float("nan")] * 64))
    with pytest.raises(UnsupportedModelError, match="Scripted returns no past_key_values"):
        calibration_tokens("self", tokenizer, samples=1, seq_len=8, model=Scripted([0.0] * 64, cache=None))
    with pytest.raises(InputError, match="'self' is for calibration"):
        evaluation_tokens("self", tokenizer, seq_len=8)


def test_generation_batches_are_bounded_by_the_cache(monkeypatch):
    widths = []
    model = decoder("llama")
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    size = compute_dtype(torch.device("cpu")).itemsize
    one = 2 * 3 * 2 * 8 * size * 16  # keys and values, layers, heads of keys, width, bytes, tokens
    monkeypatch.setattr(generation, "_CACHE_BYTES", 2 * one)
    calibration_tokens("self", word_level(), samples=5, seq_len=16, model=model)
    assert widths[::15] == [2, 2, 1]


@pytest.mark.parametrize("family", [name for name in DECODERS if name != "gpt_oss"])
def test_a_roomy_cache_changes_nothing_but_the_time(family, monkeypatch):
    monkeypatch.setattr(generation, "compute_dtype", lambda _device: torch.float32)
    texts, replaced = [], []
    for make in (generation._make_room, lambda _cache, _room: None):
        monkeypatch.setattr(
            generation, "_make_room", lambda *given, make=make: replaced.append(given[0]) or make(*given)
        )
        texts.append(calibration_tokens("self", word_level(), samples=3, seq_len=24, model=decoder(family)).ids)
    assert torch.equal(*texts)
    layers = getattr(replaced[0], "layers", [])
    assert not any(type(layer) is DynamicLayer for layer in layers)


@pytest.mark.parametrize(("samples", "expected"), [(5, [2, 2, 1]), (6, [2, 2, 2]), (4, [2, 2]), (1, [1])])
def test_batches_are_as_equal_as_they_can_be(monkeypatch, samples, expected):
    monkeypatch.setattr(generation, "_CACHE_BYTES", 25)
    batch = generation._batch_size(samples, 10, torch.device("cpu"), 128)
    assert [min(batch, samples - start) for start in range(0, samples, batch)] == expected
    monkeypatch.setattr(generation, "_CACHE_BYTES", 1 << 40)
    assert generation._batch_size(300, 10, torch.device("cpu"), 128) == 100
    monkeypatch.setattr(generation, "whole_memory", lambda _device: 120)
    assert generation._batch_size(300, 10, torch.device("cpu"), 128) == 3


@pytest.mark.usefixtures("full_precision")
def test_more_texts_are_written_at_once_where_that_is_asked_for():
    sizes = []
    model = decoder("llama")
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = torch.zeros(130, 1, dtype=torch.int64)
    found = [
        generation.sample_text(model, first, 3, 10, torch.Generator().manual_seed(0), batch=batch)
        for batch in (None, 130)
    ]
    assert sizes == [65, 65, 65, 65, 130, 130]
    assert torch.equal(*found)


@pytest.mark.parametrize("vocabulary", [1, 8, 256, 257, 1000, 49152])
def test_a_draw_is_where_the_whole_distribution_function_passes(vocabulary):
    """Against the running sum over all tokens in float64; at a boundary, a token may be off by one for rounding."""
    random = torch.Generator().manual_seed(vocabulary)
    probabilities = (4 * torch.randn(64, vocabulary, generator=random)).softmax(-1)
    probabilities[:, ::3] = 0.0
    probabilities[:, 0] += 1e-3
    uniform = 1 - torch.rand(64, 1, generator=random, dtype=torch.float64)
    uniform[0], uniform[1] = 1.0, 2.0**-53
    found = generation._draw(probabilities, uniform)[:, None]
    upper = probabilities.double().cumsum(-1)
    point = uniform * upper[:, -1:]
    assert (probabilities.gather(1, found) > 0).all()
    assert (point <= upper.gather(1, found) + 1e-6).all()
    assert (point >= upper.gather(1, found) - probabilities.gather(1, found) - 1e-6).all()
    last = generation._draw(probabilities, torch.ones_like(uniform))
    assert (last < vocabulary).all()  # though the chunk's sum may be rounded to more than its terms
    assert generation._draw(probabilities.fill_(float("nan")), uniform) is None


def test_who_listens_hears_how_long_it_will_take(monkeypatch):
    heard, moments = [], iter(range(100))
    monkeypatch.setattr(generation, "time", SimpleNamespace(monotonic=lambda: float(next(moments))))
    calibration_tokens(
        "self",
        word_level(),
        samples=2,
        seq_len=21,
        model=decoder("llama"),
        listen=lambda done, total, left: heard.append((done, total, left)),
    )
    # A second a step: the first word after 2 of 20, the next 15 later, the last at the end.
    assert heard == [(4, 40, 18.0), (34, 40, 3.0), (40, 40, 0.0)]


@pytest.mark.usefixtures("full_precision")
def test_queries_that_share_keys_go_together_and_give_the_same_text(monkeypatch):
    packed, pack, choose = [], sdpa_attention.pack_gqa, sdpa_attention.use_gqa_in_sdpa
    monkeypatch.setattr(sdpa_attention, "pack_gqa", lambda states, ratio: packed.append(ratio) or pack(states, ratio))
    model = decoder("llama")
    given = {"samples": 3, "seq_len": 24, "model": model}
    together = calibration_tokens("self", word_level(), **given).ids
    assert set(packed) == {2}
    assert sdpa_attention.use_gqa_in_sdpa is choose
    packed.clear()
    monkeypatch.setattr(generation, "queries_packed", nullcontext)
    assert torch.equal(calibration_tokens("self", word_level(), **given).ids, together)
    assert not packed


@pytest.mark.usefixtures("full_precision")
def test_own_text_begins_with_all_that_the_tokenizer_puts_before_text():
    model, tokenizer = decoder("llama"), surrounding(word_level(), "</s> <s> $A")
    found = calibration_tokens("self", tokenizer, samples=5, seq_len=12, seed=4, model=model)
    lead = tokenizer.convert_tokens_to_ids(["</s>", "<s>"])
    assert found.ids[:, :2].tolist() == [lead] * 5
    assert (found.bos, found.lead, found.ids.shape) == ("each", 2, (5, 12))
    draws = 1 - torch.rand(5, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        upper = model.double()(input_ids=found.ids).logits[:, 1:-1, : len(tokenizer)].softmax(-1).cumsum(-1)
    lower = nn.functional.pad(upper, (1, 0))[..., :-1]
    assert (draws[:, 2:] <= upper.gather(-1, found.ids[:, 2:, None])[..., 0] + 1e-5).all()
    assert (draws[:, 2:] >= lower.gather(-1, found.ids[:, 2:, None])[..., 0] - 1e-5).all()


@pytest.mark.parametrize("bos", ["auto", "always", "once"])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
def test_own_text_begins_with_one_bos_wherever_there_is_one(template, bos):
    tokenizer = surrounding(word_level(), template)
    found = calibration_tokens("self", tokenizer, samples=5, seq_len=4, model=decoder("llama"), bos=bos)
    expected = calibration_tokens("self", word_level(), samples=5, seq_len=4, model=decoder("llama"))
    assert (found.ids[:, 0] == tokenizer.bos_token_id).all()
    assert found == expected
    assert (found.bos, found.lead) == ("each", 1)


def test_own_text_never_begins_with_bos_where_it_is_not_wanted():
    tokenizer = surrounding(word_level(), "<s> $A")
    found = calibration_tokens("self", tokenizer, samples=64, seq_len=3, model=decoder("llama"), bos="never")
    assert len(set(found.ids[:, 0].tolist())) > 10
    assert not set(found.ids[:, 0].tolist()) & set(tokenizer.all_special_ids)
    assert (found.bos, found.lead) == ("none", 0)
    nowhere = calibration_tokens("self", word_level(bos=None), samples=4, seq_len=3, model=decoder("llama"))
    assert nowhere.bos == "none"
    with pytest.raises(InputError, match="bos = 'always', but the tokenizer has no BOS token"):
        calibration_tokens("self", word_level(bos=None), samples=4, seq_len=3, model=decoder("llama"), bos="always")
