"""What a model says, and how far it moved."""

import pytest
import torch
import transformers as tf

from halve.errors import InputError, UnsupportedModelError
from halve.sensitivity import logits
from halve.sensitivity.logits import divergence, log_probabilities
from models import bert, decoder, encoder_decoder, pairs, tokens, vit


def test_divergence_is_that_of_the_definition(monkeypatch):
    before, after = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    p, q = before.double().exp(), after.double().exp()
    expected = float((p * (p.log() - q.log())).sum())
    assert divergence(before, after) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(logits, "_AT_ONCE", 20)  # two rows at a time
    assert divergence(before, after) == pytest.approx(expected, rel=1e-5)
    assert divergence(before, before) == 0.0


def test_padding_does_not_count():
    model, ids = decoder("llama"), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    found = log_probabilities(model, {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        rows = [model(input_ids=ids[:1]).logits[0], model(input_ids=ids[1:, :4]).logits[0]]
    torch.testing.assert_close(found, torch.cat(rows).log_softmax(-1))


def test_a_decoder_has_a_mask_of_its_own():
    model, batch = encoder_decoder("t5"), pairs("t5", rows=2, length=8)
    mask = torch.ones_like(batch["decoder_input_ids"])
    mask[0, 2:] = 0
    assert len(log_probabilities(model, {**batch, "decoder_attention_mask": mask})) == 2 + mask.shape[1]
    assert len(log_probabilities(model, {**batch, "attention_mask": torch.ones(2, 8)})) == 2 * mask.shape[1]


def test_labels_that_stand_for_padding_do_not_count():
    ids = tokens(2, 6)
    labels = ids.clone()
    labels[1, 4:] = -100
    model, batch = encoder_decoder("t5"), {"input_ids": ids, "labels": labels}
    found = log_probabilities(model, batch)
    with torch.no_grad():
        whole = model(**batch).logits
    torch.testing.assert_close(found, torch.cat([whole[0], whole[1, :4]]).log_softmax(-1))


def test_an_image_is_one_position():
    assert log_probabilities(vit(), {"pixel_values": torch.randn(3, 3, 16, 16)}).shape == (3, 2)
    assert log_probabilities(bert(), {"input_ids": tokens(2, 5)}).shape == (10, 64)


def test_a_model_without_logits_is_refused():
    model = tf.LlamaModel(decoder("llama").config)
    with pytest.raises(UnsupportedModelError, match="LlamaModel gives none: name what is to stay dense with skip"):
        log_probabilities(model, {"input_ids": tokens(1, 4)})


def test_logits_that_are_not_finite_are_refused():
    model = decoder("llama")
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="LlamaForCausalLM gives NaN or infinity on the calibration data"):
        log_probabilities(model, {"input_ids": tokens(1, 4)})
