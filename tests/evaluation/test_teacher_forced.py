"""Perplexity of encoder-decoders: the second half of each window, given the first."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as tf

from halve.checkpoint.load import LoadedModel
from halve.errors import InputError
from halve.evaluation.figure import SECOND_HALF
from halve.evaluation.perplexity import evaluate, perplexity
from halve.evaluation.request import Evaluation
from halve.text.halves import evaluation_halves
from halve.text.tokens import Cut, TokenSet, hash_ids
from models import decoder, encoder_decoder, save, seq2seq, tokens
from tiny_tokenizers import surrounding, word_level

TEMPLATES = {"t5": "$A </s>", "bart": "<s> $A </s>", "marian": "$A </s>"}


def windows(text, family, model, seq_len=48, **options):
    tokenizer = surrounding(word_level(), TEMPLATES[family])
    asked = {"max_windows": 7, "text_field": "text", "bos": "auto", **options}
    return evaluation_halves(text, tokenizer, model, seq_len=seq_len, **asked)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_it_is_the_models_own_loss_of_the_text_in_the_second_half(family, batch_size, text):
    """The oracle: the loss that transformers computes of labels, all that is no text of the half left out of it."""
    model = encoder_decoder(family).double()
    data = windows(text, family, model)
    found = perplexity(model, data, batch_size=batch_size)
    labels = data.labels.clone()
    masked = labels.clone()
    masked[:, -1] = -100  # </s>
    if family == "bart":
        masked[:, 0] = -100  # <s>
    with torch.no_grad():
        fed = model.prepare_decoder_input_ids_from_labels(labels)
        expected = float(model(input_ids=data.encoder_ids, decoder_input_ids=fed, labels=masked).loss)
    assert found.nll == pytest.approx(expected, rel=1e-9)
    assert (found.windows, found.seq_len, found.scored) == (7, 48, SECOND_HALF)
    assert sum(found.window_nll) / 7 == pytest.approx(expected, rel=1e-9)


def test_the_encoder_is_read(text):
    model = encoder_decoder("bart").double()
    data = windows(text, "bart", model)
    other = replace(data, ids=torch.cat((data.encoder_ids.flip(0), data.labels), dim=1))
    assert perplexity(model, data).nll != pytest.approx(perplexity(model, other).nll, rel=1e-6)


def test_it_is_never_compared_with_another_kind_of_figure(text):
    model = encoder_decoder("bart")
    found = perplexity(model, windows(text, "bart", model))
    assert found.pairs_with(found)
    assert not found.pairs_with(replace(found, scored=""))
    with pytest.raises(InputError, match="cannot be compared"):
        found.minus(replace(found, scored=""))
    assert found.as_json()["scored"] == SECOND_HALF


def test_it_is_measured_of_a_checkpoint(tmp_path, text):
    place = save(encoder_decoder("bart"), tmp_path / "bart")
    surrounding(word_level(), "<s> $A </s>").save_pretrained(place)
    asked = {"seq_len": 48, "max_windows": 7, "forward_dtype": "float32"}
    found = evaluate(place, text, **asked)
    model = encoder_decoder("bart")
    assert found.nll == pytest.approx(perplexity(model, windows(text, "bart", model), forward_dtype="float32").nll)
    loaded = LoadedModel(model, surrounding(word_level(), "<s> $A </s>"), None)
    (texts,) = Evaluation([text]).texts(loaded, None)
    assert (texts.seq_len, texts.cut) == (256, Cut("halves", 128, 1, 1))
    assert json.loads(json.dumps(found.as_json()))["bos"] == "each"


def cut(how="halves", labels=16, before=0):
    ids = tokens(2, 32)
    return TokenSet(ids, "x", hash_ids(ids), 1, cut=Cut(how, 32 - labels, before, 1))


@pytest.mark.parametrize(
    ("build", "data", "message"),
    [
        (lambda: encoder_decoder("bart"), TokenSet(tokens(2, 32), "x", "", 1), "is tokens of one sequence each"),
        (lambda: decoder("llama"), cut(), "is cut for an encoder-decoder, and LlamaForCausalLM is none"),
        (lambda: encoder_decoder("t5"), cut("span corruption"), "is not cut in halves"),
        (lambda: encoder_decoder("t5"), cut(labels=2, before=1), "leave the decoder no text to predict"),
        (lambda: tf.BartModel(tf.BartConfig(**seq2seq())), cut(), "has no language-model head on its decoder"),
    ],
)
def test_what_cannot_be_measured_is_refused(build, data, message):
    with pytest.raises(InputError, match=message):
        perplexity(build(), data)


def test_windows_that_are_too_short_or_too_long_are_refused(text):
    model = encoder_decoder("bart")
    with pytest.raises(InputError, match=r"seq_len = 5 leaves 2 tokens to the decoder \(halves\), and it needs 3"):
        windows(text, "bart", model, seq_len=5)
    with pytest.raises(InputError, match=r"seq_len = 300 gives the encoder 150 tokens, and it was built for 128"):
        windows(text, "bart", model, seq_len=300)


def test_broken_weights_are_named(text):
    model = encoder_decoder("bart")
    model.lm_head.weight = torch.nn.Parameter(torch.full_like(model.lm_head.weight, float("nan")))
    with pytest.raises(InputError, match=r"the loss of window 0 of .* is not finite"):
        perplexity(model, windows(text, "bart", model))
