"""Speakers: what a model says of each token, the same whether its logits stand whole or not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from halve.errors import InputError
from halve.learning.training.heads import Speaker, check_causal, plain_head
from halve.learning.training.losses import Scores, Target, loss_sums
from halve.text.rows import IGNORED
from models import VOCAB, bert, decoder, encoder_decoder, tokens


def batch(rows=3, length=12):
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[0, :5] = IGNORED
    return {"input_ids": ids, "position_ids": torch.arange(length).expand(rows, -1), "labels": labels}


def loss_of(model, speaker, given):
    labels = given["labels"][:, 1:]
    labels = labels[labels != IGNORED]
    return speaker.say(model, given, lambda said: loss_sums(said, None, labels, Target(), torch.float32)[0])


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "mixtral", "gemma2"])
def test_the_loss_is_that_of_whole_logits(family):
    model, given = decoder(family).requires_grad_(True), batch()
    speaker = Speaker(model, given["input_ids"][:1], apart=False)
    assert ("stand whole" in speaker.note) == (family == "gemma2")  # whose logits are capped
    loss = loss_of(model, speaker, given)
    loss.backward()
    grads = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    logits = model(input_ids=given["input_ids"], position_ids=given["position_ids"]).logits[:, :-1].double()
    wanted = nn.functional.cross_entropy(
        logits.flatten(0, 1), given["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert (grad is None) == (parameter.grad is None)
        if grad is not None:
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-3 * float(parameter.grad.abs().max()))


def test_scores_are_of_the_tokens_that_are_learned_and_logits_come_back_after():
    model, given = decoder("llama"), batch()
    speaker = Speaker(model, given["input_ids"][:1], apart=False)
    scores = speaker.scores(given)
    whole = model(input_ids=given["input_ids"]).logits[:, :-1][given["labels"][:, 1:] != IGNORED]
    torch.testing.assert_close(scores.logits(0, len(scores.states)), whole, rtol=1e-4, atol=1e-4)
    assert scores.states.shape == (11 * 3 - 4, 32)
    assert (scores.vocabulary, scores.states.requires_grad) == (VOCAB, False)


def test_positions_are_left_out_where_every_row_is_one_document():
    seen = {}

    class Model(nn.Module):
        def forward(self, **given):
            seen.update(given)
            return SimpleNamespace(logits=torch.zeros(*given["input_ids"].shape, VOCAB))

    for apart in (True, False):
        seen.clear()
        speaker = Speaker(Model(), tokens(1, 5), apart=apart)
        speaker.scores(batch())
        assert ("position_ids" in seen) == (not apart)


def test_what_wraps_the_model_is_called_and_the_head_is_used_inside():
    model, given, inside = decoder("llama"), batch(), []

    class Wrapper(nn.Module):
        def forward(self, **fed):
            inside.append("in")
            out = model(**fed)
            inside.append("out")
            return out

    speaker = Speaker(model, given["input_ids"][:1], apart=False)

    def use(said):
        inside.append("head")
        return said.states.sum()

    speaker.say(Wrapper(), given, use)
    assert inside == ["in", "head", "out"]
    assert "forward" not in vars(model.lm_head)


def test_a_head_is_itself_again_after_an_error():
    model, given = decoder("llama"), batch()
    speaker = Speaker(model, given["input_ids"][:1], apart=False)
    with pytest.raises(ZeroDivisionError):
        speaker.say(model, given, lambda _said: 1 / 0)
    assert model(given["input_ids"]).logits.shape == (3, 12, VOCAB)


def test_scaled_logits_are_no_plain_heads():
    model = decoder("llama")
    assert plain_head(model, tokens(1, 5)) is model.lm_head
    model.lm_head = nn.Sequential(model.lm_head)
    assert plain_head(model, tokens(1, 5)) is None
    assert Scores(torch.zeros(2, 7)).vocabulary == 7


def test_a_model_that_predicts_no_tokens_is_refused():
    class Encoder(nn.Module):
        def forward(self, input_ids, use_cache=None):
            return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 4))

    with pytest.raises(InputError, match=r"Encoder says nothing of every token .* give a causal language model"):
        Speaker(Encoder(), tokens(1, 5), apart=False)


def test_only_causal_models_are_trained():
    for family in ("llama", "gpt2", "bloom", "mixtral"):
        check_causal(decoder(family))
    with pytest.raises(InputError, match="BertForMaskedLM reads a text in both directions"):
        check_causal(bert())
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder-decoder"):
        check_causal(encoder_decoder("t5"))
