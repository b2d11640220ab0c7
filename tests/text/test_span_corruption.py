"""T5's denoising objective: what was masked can be put back, and the numbers are those of the paper."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from halve.checkpoint.load import LoadedModel
from halve.errors import InputError
from halve.text.calibration import Calibration
from halve.text.span_corruption import _parts, counts
from models import encoder_decoder
from tiny_tokenizers import sentinels, surrounding


def data(text, seed=0, seq_len=400, samples=4, spans=60):
    tokenizer = surrounding(sentinels(spans), "$A </s>")
    model = encoder_decoder("t5")
    model.resize_token_embeddings(128)
    found = Calibration(text, samples=samples, seq_len=seq_len, seed=seed, span_corruption=True).data(
        LoadedModel(model, tokenizer, None)
    )
    return found, tokenizer


def restored(read, said, first):
    """Put what the decoder says in the places of the sentinels; an oracle that knows nothing of lengths."""
    spans, current = {}, None
    for token in said:
        if first - token >= 0 and first - token < 60 and token > first - 60:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    whole = []
    for token in read:
        whole += spans.pop(token, [token])
    assert not spans
    return whole


def test_the_masked_spans_are_what_the_decoder_says(text):
    found, tokenizer = data(text)
    plain = tokenizer(Path(text).read_text(), add_special_tokens=False)["input_ids"]
    first = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    length = None
    for row, (read, said) in enumerate(zip(found.encoder_ids.tolist(), found.labels.tolist(), strict=True)):
        assert (read[-1], said[-1]) == (tokenizer.eos_token_id,) * 2
        masks = [token for token in said if first - 60 < token <= first]
        assert (
            masks == [token for token in read if first - 60 < token <= first] == [first - i for i in range(len(masks))]
        )
        assert (said[0], read[0] != first, read[-2]) == (first, True, masks[-1])  # text first, a mask last
        whole = restored(read[:-1], said[:-1], first)
        length = length or len(whole)
        assert whole == plain[row * length : (row + 1) * length]
        masked = len(said) - 1 - len(masks)
        assert masked / len(whole) == pytest.approx(0.15, abs=0.01)
        assert masked / len(masks) == pytest.approx(3, abs=0.1)
    assert 395 <= found.seq_len <= 400
    assert found.cut.how == "span corruption"


def test_the_seed_decides_the_places(text):
    (first, _), (again, _), (other, _) = data(text), data(text), data(text, seed=1)
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256 != other.sha256


def test_more_spans_than_sentinels_are_refused(text):
    with pytest.raises(InputError, match=r"has 1\d masked spans, and the tokenizer has no sentinel <extra_id_5>"):
        data(text, spans=5)


@pytest.mark.parametrize("total", range(1, 7))
def test_every_way_of_cutting_is_as_likely(total):
    rng = random.Random(0)
    for parts in range(1, total + 1):
        ways = [way for way in itertools.product(range(1, total + 1), repeat=parts) if sum(way) == total]
        drawn = [tuple(_parts(total, parts, rng)) for _ in range(400 * len(ways))]
        assert set(drawn) == set(ways)
        assert all(300 < drawn.count(way) < 500 for way in ways)


def test_short_texts_are_masked_too():
    assert counts(2) == (1, 1)
    assert counts(512) == (77, 26)
