"""What tokenizers of every kind put before text, and what sequences begin with for it."""

import pytest

from halve.errors import InputError
from halve.text.special_tokens import BOS, Beginning, begin_sequences, encode, put_before_text, said
from tiny_tokenizers import InPython, byte_bpe, surrounding, word_level


def bert():
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return surrounding(word_level(bos=None, eos=None, **names), "[CLS] $A [SEP]")


TOKENIZERS = {
    "a BOS token that is not used": (byte_bpe, []),
    "no BOS token": (lambda: byte_bpe(bos=None), []),
    "BOS": (lambda: byte_bpe(adds_bos=True), ["<s>"]),
    "BOS and EOS": (lambda: surrounding(byte_bpe(), "<s> $A </s>"), ["<s>"]),
    "EOS alone": (lambda: surrounding(byte_bpe(), "$A </s>"), []),
    "EOS in the place of BOS": (lambda: surrounding(byte_bpe(), "</s> $A"), ["</s>"]),
    "CLS and SEP": (bert, ["[CLS]"]),
    "two tokens": (lambda: surrounding(byte_bpe(), "</s> <s> $A"), ["</s>", "<s>"]),
    "written in Python": (InPython, ["<s>"]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_stands_before_text_is_seen_and_what_follows_it_is_not(kind):
    build, expected = TOKENIZERS[kind]
    tokenizer = build()
    assert tokenizer.convert_ids_to_tokens(list(put_before_text(tokenizer))) == expected
    found = begin_sequences(tokenizer, "auto")
    assert found == (Beginning(put_before_text(tokenizer), "each") if expected else Beginning())
    assert found.of_text == ()
    (whole,) = encode(tokenizer, ["the fox"], add_special_tokens=True)
    (text,) = encode(tokenizer, ["the fox"])
    assert whole[: len(expected) + len(text)] == [*found.ids, *text]


def test_a_tokenizer_that_knows_no_letters_is_asked_with_a_digit():
    class Digits(InPython):
        def _tokenize(self, text, **_):
            return [letter for letter in text if letter.isdigit()]

    assert encode(Digits(), ["The cat"], add_special_tokens=True) == [[0, 1]]
    assert put_before_text(Digits()) == (0,)


@pytest.mark.parametrize(
    ("build", "bos", "expected"),
    [
        (byte_bpe, "always", Beginning((0,), "each")),
        (byte_bpe, "once", Beginning()),
        (byte_bpe, "never", Beginning()),
        (bert, "always", Beginning((bert().cls_token_id,), "each")),
        (lambda: byte_bpe(adds_bos=True), "always", Beginning((0,), "each")),
        (lambda: byte_bpe(adds_bos=True), "once", Beginning((0,), "once")),
        (lambda: byte_bpe(adds_bos=True), "never", Beginning()),
    ],
)
def test_what_is_asked_for(build, bos, expected):
    tokenizer = build()
    found = begin_sequences(tokenizer, bos)
    assert found == expected
    assert (found.of_each, found.of_text) == {
        "each": (found.ids, ()),
        "once": ((), found.ids),
        "none": ((), ()),
    }[found.where]


def test_always_needs_a_bos_token():
    for tokenizer in (byte_bpe(bos=None), surrounding(byte_bpe(bos=None), "$A </s>")):
        with pytest.raises(InputError, match=r"^bos = 'always', but the tokenizer has no BOS token: leave bos out"):
            begin_sequences(tokenizer, "always")


@pytest.mark.parametrize("bad", ["yes", None, True, "Auto"])
def test_other_words_are_refused(bad):
    with pytest.raises(InputError, match=f"bos = {bad!r} is not known: choose one of {', '.join(BOS)}"):
        begin_sequences(byte_bpe(), bad)


def test_a_tokenizer_that_gives_text_other_tokens_is_told():
    class Reverses(InPython):
        def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
            return [self.bos_token_id, *reversed(token_ids_0)]

    with pytest.raises(InputError, match=r"cannot be told what .* before text, since 'The cat.*give bos = 'never'"):
        begin_sequences(Reverses(), "auto")
    assert begin_sequences(Reverses(), "never") == Beginning()


def test_it_is_said_in_words():
    assert [said(where) for where in ("each", "once", "none", "", "?")] == [
        "BOS in each",
        "BOS in the first alone",
        "no BOS",
        "",
        "",
    ]
