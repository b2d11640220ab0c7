"""Text for encoder-decoders: what goes to which side, and what the decoder is fed."""

from pathlib import Path

import pytest
import torch
import transformers as tf

import halve
from halve.checkpoint.load import LoadedModel
from halve.errors import InputError
from halve.text.calibration import Calibration, calibration_batches, default_length
from halve.text.halves import Frames, evaluation_halves, shift_right, without_start
from halve.text.tokens import TokenSet, hash_ids
from models import VOCAB, decoder, encoder_decoder, seq2seq, tokens
from tiny_tokenizers import SENTENCES, byte_bpe, sentinels, surrounding, word_level

SHAPES = {"t5": "$A </s>", "bart": "<s> $A </s>", "marian": "$A </s>"}


def loaded(family, template=None):
    return LoadedModel(encoder_decoder(family), surrounding(word_level(), template or SHAPES[family]), None)


def mbart():
    torch.manual_seed(0)
    return tf.MBartForConditionalGeneration(tf.MBartConfig(**seq2seq())).eval()


@pytest.mark.parametrize("build", [*(lambda f=f: encoder_decoder(f) for f in ("t5", "bart", "marian")), mbart])
def test_the_decoder_is_fed_what_the_models_own_loss_feeds_it(build):
    model, read, labels = build(), tokens(3, 20), tokens(3, 17, 1)
    with torch.no_grad():
        expected = model(input_ids=read, labels=labels).logits
        found = model(input_ids=read, decoder_input_ids=shift_right(model, labels)).logits
    assert torch.equal(found, expected)


def test_whisper_has_no_shift_of_its_own_to_ask_and_is_fed_the_same():
    model, labels = encoder_decoder("whisper"), tokens(2, 9)
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_features=features, labels=labels).logits
        found = model(input_features=features, decoder_input_ids=shift_right(model, labels)).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_a_model_that_does_not_say_how_its_decoder_begins_is_refused(family):
    model = encoder_decoder(family)
    for config in (model.config, model.generation_config):
        vars(config)["decoder_start_token_id"] = None
    with pytest.raises(InputError, match=r"does not say which token its decoder begins with.*decoder_start_token_id"):
        shift_right(model, tokens(1, 4))


@pytest.mark.parametrize("family", SHAPES)
def test_each_sequence_is_cut_in_two_and_both_halves_are_framed(family, text):
    data = Calibration(text, samples=3, seq_len=130).data(loaded(family))
    words = word_level()(Path(text).read_text(), add_special_tokens=False)["input_ids"]
    lead, (before, after) = len(data.bos_ids), ([1] if family == "bart" else [], [2])
    for row in range(3):
        read, said = data.encoder_ids[row].tolist(), data.labels[row].tolist()
        assert (len(read), len(said)) == (65, 65)
        assert (read[: len(before)], said[: len(before)]) == (before, before)
        assert (read[-1:], said[-1:]) == (after, after)
        both = read[lead:-1] + said[lead:-1]
        assert both == words[row * len(both) : (row + 1) * len(both)]  # as the text goes on
    assert (data.cut.how, data.cut.encoder, data.cut.before, data.cut.after) == ("halves", 65, lead, 1)


def test_batches_are_what_the_model_takes_and_hold_so_many_tokens_at_most(text):
    model = loaded("bart")
    data = Calibration(text, samples=5, seq_len=128).data(model)
    batches = calibration_batches(data, model.model, 300)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert all(batch.keys() == {"input_ids", "decoder_input_ids"} for batch in batches)
    fed = torch.cat([batch["decoder_input_ids"] for batch in batches])
    assert fed[:, 0].tolist() == [model.model.config.decoder_start_token_id] * 5
    assert torch.equal(fed[:, 1:], data.labels[:, :-1])


def test_how_sequences_begin_can_be_chosen(text):
    def ids(bos, template):
        data = Calibration(text, samples=1, seq_len=128, bos=bos).data(loaded("bart", template))
        return data.encoder_ids[0, 0].item(), data.labels[0, 0].item(), data.bos

    assert ids("auto", "<s> $A </s>") == (1, 1, "each")
    assert ids("always", "$A </s>")[::2] == (1, "each")
    assert 1 not in ids("never", "<s> $A </s>")
    assert ids("never", "<s> $A </s>")[2] == "none"
    with pytest.raises(InputError, match=r"bos = 'once' is how tables of decoder-only models cut a text"):
        ids("once", "<s> $A </s>")
    with pytest.raises(InputError, match="the tokenizer has no BOS token"):
        Frames.of(surrounding(byte_bpe(bos=None), "$A </s>"), encoder_decoder("bart"), "always")


@pytest.mark.parametrize(
    ("build", "read", "fed"),
    [
        (tf.MBartTokenizer, ([], ["</s>", "en_XX"]), (["de_DE"], ["</s>"])),
        (tf.MBart50Tokenizer, (["en_XX"], ["</s>"]), (["</s>", "de_DE"], [])),
    ],
)
def test_translators_read_one_language_and_say_another(build, read, fed, text):
    """Of mBART's own tokenizers: the language that is said comes first, though it is the last of mBART's labels."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [(name, 0.0) for name in (*special, *(f"▁{word}" for word in " ".join(SENTENCES).split()))]
    tokenizer = build(vocab=list(dict.fromkeys(vocabulary)), src_lang="en_XX", tgt_lang="de_DE")
    model = mbart()
    model.config.pad_token_id = 1
    model.resize_token_embeddings(len(tokenizer))
    data = Calibration(text, samples=1, seq_len=128).data(LoadedModel(model, tokenizer, None))
    (batch,) = calibration_batches(data, model, 4096)
    for name, (before, after) in (("input_ids", read), ("decoder_input_ids", fed)):
        found = tokenizer.convert_ids_to_tokens(batch[name][0].tolist())
        assert len(found) == 64
        assert found[: len(before)] == before
        assert found[len(found) - len(after) :] == after
        assert all(word.startswith("▁") for word in found[len(before) : len(found) - len(after)])


def test_a_start_token_that_the_tokenizer_puts_there_too_is_not_said():
    model = encoder_decoder("bart")
    model.config.decoder_start_token_id = 5
    assert without_start([5, 6, 5], model) == (6, 5)
    assert without_start([6, 5], model) == (6, 5)


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        (
            {"seq_len": 127},
            "bart",
            r"seq_len = 127 leaves 63 tokens to the decoder \(halves\), .* 64 at least",
        ),
        ({"seq_len": 300}, "bart", r"seq_len = 300 gives the encoder 150 tokens, and it was built for 128 at most"),
        ({"seq_len": 200, "span_corruption": True}, "t5", r"leaves 37 tokens to the decoder \(span corruption\)"),
        ({"seq_len": 300, "span_corruption": True}, "bart", "needs a tokenizer with sentinels.*<extra_id_0>"),
        ({"seq_len": 256, "source": "self"}, "bart", "is an encoder-decoder, which cannot write its own"),
        ({"seq_len": 256}, "whisper", "takes input_features, not text, .*its two fields as pair_fields"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, family, message, text):
    tokenizer = surrounding(word_level() if family != "t5" else sentinels(20), "$A </s>")
    with pytest.raises(InputError, match=message):
        Calibration(**{"source": text, "samples": 2, **options}).data(
            LoadedModel(encoder_decoder(family), tokenizer, None)
        )


def test_tokens_of_one_sequence_each_are_refused_and_so_are_cut_ones_elsewhere(text):
    ids = tokens(2, 128)
    with pytest.raises(InputError, match=r"tokens of one sequence each, and BartForCond.* is an encoder-decoder"):
        halve.prune(encoder_decoder("bart"), calibration=ids)
    cut = Calibration(text, samples=2, seq_len=128).data(loaded("bart"))
    with pytest.raises(InputError, match="is cut for an encoder-decoder, and LlamaForCausalLM is none"):
        halve.prune(decoder("llama"), calibration=cut)
    assert (
        len(halve.prune(encoder_decoder("bart"), calibration=cut, method="wanda", refit="none").report.matrices) == 32
    )


def test_an_id_that_one_side_has_no_row_for_is_refused(text):
    model = loaded("bart")
    model.model.model.decoder.embed_tokens = torch.nn.Embedding(20, 32)
    with pytest.raises(InputError, match="but the model's vocabulary has 20 entries"):
        Calibration(text, samples=2, seq_len=128).data(model)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [("bart", {}, 256), ("t5", {}, 2048), ("t5", {"n_positions": 512}, 1024)],
)
def test_the_default_length_leaves_both_sides_within_what_they_were_built_for(family, changes, expected):
    model = encoder_decoder(family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert default_length(LoadedModel(model, None, None)) == expected


@pytest.mark.parametrize("option", ["pair_fields", "span_corruption"])
def test_options_of_encoder_decoders_are_refused_elsewhere(option, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"source": "a", "target": "b", "text": "c"}\n')
    value = "source,target" if option == "pair_fields" else True
    with pytest.raises(InputError, match=f"{option} is for encoder-decoders, and LlamaForCausalLM is none"):
        halve.prune(
            decoder("llama"), tokenizer=word_level(), calibration=tmp_path / "a.jsonl", samples=1, **{option: value}
        )


def test_windows_go_through_the_whole_text(text):
    model = encoder_decoder("bart")
    tokenizer = surrounding(word_level(), "<s> $A </s>")
    data = evaluation_halves(text, tokenizer, model, seq_len=64, max_windows=None, text_field="text", bos="auto")
    words = tokenizer(" ".join(SENTENCES * 40), add_special_tokens=False)["input_ids"]
    assert data.samples == len(words) // 60
    body = torch.cat((data.encoder_ids[:, 1:-1], data.labels[:, 1:-1]), dim=1).flatten()
    assert body.tolist() == words[: body.numel()]
    short = evaluation_halves(text, tokenizer, model, seq_len=64, max_windows=2, text_field="text", bos="auto")
    assert torch.equal(short.ids, data.ids[:2])
    assert isinstance(data, TokenSet)
    assert data.sha256 != hash_ids(data.ids)  # where they are cut counts
    assert int(data.ids.max()) < VOCAB
