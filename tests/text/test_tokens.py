import hashlib
import json
import logging
import random
import struct

import pytest
import torch
from torch import nn

import halve.text.packing
import halve.text.tokens
from halve.errors import InputError
from halve.text.documents import Corpus
from halve.text.limits import check_length, check_vocabulary, longest
from halve.text.tokens import TokenSet, calibration_tokens, evaluation_tokens, hash_ids
from models import VOCAB, decoder
from tiny_tokenizers import SENTENCES, InPython, byte_bpe, surrounding, word_level


def write_corpus(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def sentences(count, seed=0):
    """Distinct texts of one to twelve known words."""
    rng = random.Random(seed)
    words = " ".join(SENTENCES).split()
    return [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count)]


def split_at(ids, separator):
    parts = [[]]
    for token in ids:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl", sentences(200))


def test_packing_is_documents_joined_by_eos(corpus):
    tokenizer = byte_bpe()
    found = calibration_tokens(corpus, tokenizer, samples=7, seq_len=50, seed=3)
    assert found.ids.shape == (7, 50)
    assert found.ids.dtype == torch.int64
    assert (found.samples, found.seq_len, found.tokens) == (7, 50, 350)
    assert (found.source, found.separator) == (str(corpus), "</s>")
    *whole, last = split_at(found.ids.flatten().tolist(), tokenizer.eos_token_id)
    assert found.documents == len(whole) + 1
    texts = sentences(200)
    order = [texts.index(tokenizer.decode(part)) for part in whole]  # decoding undoes the tokens, if none is special
    assert len(set(order)) == len(order) > 10
    assert order != sorted(order)
    assert any(text.startswith(tokenizer.decode(last)) for text in texts)
    assert max(order) > 100  # drawn from all of the file


def test_the_same_arguments_give_the_same_bytes(corpus):
    tokenizer = byte_bpe()
    state, torch_state = random.getstate(), torch.get_rng_state()
    first, again, other = (
        calibration_tokens(corpus, tokenizer, samples=4, seq_len=64, seed=seed) for seed in (5, 5, 6)
    )
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert first == again
    assert torch.equal(first.ids, again.ids)
    assert first != other
    assert not torch.equal(first.ids, other.ids)


def test_without_eos_documents_are_joined_by_nothing(corpus):
    tokenizer = byte_bpe(eos=None)
    found = calibration_tokens(corpus, tokenizer, samples=2, seq_len=64, seed=1)
    texts = sentences(200)
    random.Random(1).shuffle(texts)
    assert found.separator == ""
    assert (
        tokenizer.decode(found.ids.flatten().tolist()) == "".join(texts)[: len(tokenizer.decode(found.ids.flatten()))]
    )


@pytest.mark.parametrize(("batch", "long"), [(1, 2**16), (64, 2**16), (64, 20)])
def test_batches_and_long_documents_change_nothing(corpus, monkeypatch, batch, long):
    expected = calibration_tokens(corpus, byte_bpe(), samples=5, seq_len=60)
    monkeypatch.setattr(halve.text.packing, "_BATCH", batch)
    monkeypatch.setattr(halve.text.packing, "_LONG", long)
    assert calibration_tokens(corpus, byte_bpe(), samples=5, seq_len=60) == expected


def test_a_txt_is_packed_from_its_beginning(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" ".join(sentences(2000)))
    tokenizer = byte_bpe()
    found = calibration_tokens(path, tokenizer, samples=3, seq_len=100)
    assert found.ids.flatten().tolist() == tokenizer(path.read_text(), verbose=False)["input_ids"][:300]
    assert found.documents == 1


def test_empty_documents_do_not_count(tmp_path):
    path = write_corpus(tmp_path / "a.jsonl", [*[""] * 20, "the quick fox", *[""] * 20, "the quick fox"])
    found = calibration_tokens(path, word_level(), samples=1, seq_len=7)
    assert found.documents == 2
    text = ["the", "quick", "fox"]
    assert found.ids.tolist() == [word_level().convert_tokens_to_ids([*text, "</s>", *text])]


def test_reading_stops_when_there_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(halve.text.packing, "LOCAL_SHUFFLE", 10)
    monkeypatch.setattr(halve.text.packing, "_BATCH", 4)
    path = write_corpus(tmp_path / "a.jsonl", ["the quick fox"] * 100)
    path.write_text(path.read_text() + "not json\n")
    assert calibration_tokens(path, word_level(), samples=1, seq_len=80).documents == 21  # 4 tokens each, with EOS
    with pytest.raises(InputError, match="line 101, is not JSON"):
        calibration_tokens(path, word_level(), samples=1, seq_len=400)


def test_too_few_tokens(tmp_path):
    path = write_corpus(tmp_path / "few.jsonl", ["the quick fox"] * 10)  # 3 * 10 tokens, 9 separators
    calibration_tokens(path, word_level(), samples=3, seq_len=13)
    with pytest.raises(InputError, match=r"few\.jsonl' has 39 tokens, .* need 40.*samples = 3 is the most"):
        calibration_tokens(path, word_level(), samples=4, seq_len=10)
    with pytest.raises(InputError, match=r"not even one sample fits; seq_len <= 39 would"):
        calibration_tokens(path, word_level(), samples=1, seq_len=40)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_corpus(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"empty\.jsonl' holds no text"):
        calibration_tokens(path, word_level(), samples=1, seq_len=1)
    with pytest.raises(InputError, match=r"empty\.jsonl' holds no text"):
        evaluation_tokens(path, word_level(), seq_len=2)


@pytest.mark.parametrize("bad", [{"samples": 0}, {"seq_len": 0}, {"samples": -1}, {"seq_len": 2.5}])
def test_counts_are_checked(corpus, bad):
    (name,) = bad
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least 1, got {bad[name]}"):
        calibration_tokens(corpus, word_level(), **bad)


@pytest.mark.parametrize("bad", [{"seq_len": 0}, {"seq_len": 1}, {"seq_len": 4, "max_windows": 0}])
def test_evaluation_counts_are_checked(corpus, bad):
    with pytest.raises(InputError, match="at least"):
        evaluation_tokens(corpus, word_level(), **bad)


def test_ids_beyond_the_vocabulary(corpus):
    with pytest.raises(InputError, match=r"hold the id \d+, but the model's vocabulary has 64 entries"):
        calibration_tokens(corpus, byte_bpe(), samples=1, seq_len=64, model=decoder("llama"))
    model = decoder("llama")
    check_vocabulary(torch.tensor([[0, VOCAB - 1]]), model, "x")
    for bad in (VOCAB, -1):
        with pytest.raises(InputError, match=f"hold the id {bad}, "):
            check_vocabulary(torch.tensor([[3, bad]]), model, "x")
    check_vocabulary(torch.tensor([10**6]), nn.Linear(1, 1), "x")  # nothing is known of its vocabulary


@pytest.mark.parametrize(("family", "limit"), [("llama", 128), ("gpt2", 128), ("gemma3", 128), ("bloom", None)])
def test_length_limit(family, limit):
    model = decoder(family)
    assert longest(model) == limit
    check_length(limit or 10**6, model)
    if limit:
        with pytest.raises(InputError, match=f"seq_len = 129 exceeds the model's max_position_embeddings = {limit}"):
            check_length(129, model)
    assert longest(nn.Linear(1, 1)) is None


def test_hash_is_of_shape_and_bytes():
    ids = torch.tensor([[1, 2, 3], [4, 5, 2**40]])
    expected = hashlib.sha256(b"2x3\n" + struct.pack("<6q", *ids.flatten().tolist())).hexdigest()
    assert hash_ids(ids) == expected
    assert hash_ids(ids.mT.contiguous().mT) == expected
    assert hash_ids(ids.reshape(3, 2)) != expected


# Evaluation windows


def test_windows_of_a_txt(tmp_path):
    path = tmp_path / "a.txt"
    text = "\r\n\n".join(sentences(300)) + "\r"
    path.write_bytes(text.encode())
    tokenizer = byte_bpe(adds_bos=True)
    expected = tokenizer(text, verbose=False)["input_ids"]
    found = evaluation_tokens(path, tokenizer, seq_len=64, bos="once")
    assert expected[0] == tokenizer.bos_token_id
    assert found.ids.flatten().tolist() == expected[: len(expected) // 64 * 64]
    assert len(expected) % 64
    assert found.seq_len == 64
    assert (found.documents, found.separator) == (1, "")


def test_documents_are_joined_by_blank_lines(corpus):
    tokenizer = byte_bpe()
    expected = tokenizer("\n\n".join(sentences(200)), verbose=False)["input_ids"]
    found = evaluation_tokens(str(corpus), tokenizer, seq_len=50)
    assert found.ids.flatten().tolist() == expected[: len(expected) // 50 * 50]
    assert (found.documents, found.separator) == (200, "\n\n")


TEXTS = {
    "sentences": " ".join(sentences(3000)),
    "one run": "the" * 20_000,
    "spaces": "fox" + " " * 60_000 + "dog",
    "lines": "\n".join(sentences(3000)),
    "no letters": "\u4e2d\u6587" * 5_000,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_bounded_windows_are_a_prefix(tmp_path, name, adds_bos):
    path = tmp_path / "a.txt"
    path.write_text(TEXTS[name])
    tokenizer = byte_bpe(adds_bos=adds_bos)
    whole = evaluation_tokens(path, tokenizer, seq_len=37)
    for bound in (1, 2, 3, 50, 100, 10**6):
        found = evaluation_tokens(path, tokenizer, seq_len=37, max_windows=bound)
        assert torch.equal(found.ids, whole.ids[:bound])


def test_the_end_of_a_bounded_text_is_not_used(tmp_path, monkeypatch):
    """A cut inside a word changes the tokens around it; the margin keeps them out."""
    path = tmp_path / "a.txt"
    path.write_text(" exponential" * 5000)
    tokenizer = byte_bpe(400)
    assert len(tokenizer.tokenize(" exponential")) == 1
    whole = evaluation_tokens(path, tokenizer, seq_len=11)
    assert torch.equal(evaluation_tokens(path, tokenizer, seq_len=11, max_windows=1).ids, whole.ids[:1])
    monkeypatch.setattr(halve.text.packing, "_MARGIN", 0)
    monkeypatch.setattr(halve.text.packing, "_CHARACTERS_PER_TOKEN", 11)  # of 12
    assert not torch.equal(evaluation_tokens(path, tokenizer, seq_len=11, max_windows=1).ids, whole.ids[:1])


def test_a_bound_limits_what_is_read(tmp_path):
    path = write_corpus(tmp_path / "a.jsonl", sentences(5000))
    path.write_text(path.read_text() + "not json\n")
    assert evaluation_tokens(path, byte_bpe(), seq_len=32, max_windows=2).documents < 1000
    with pytest.raises(InputError, match="line 5001"):
        evaluation_tokens(path, byte_bpe(), seq_len=32)


def test_shorter_than_one_window(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the quick fox")
    assert evaluation_tokens(path, word_level(), seq_len=3).samples == 1
    with pytest.raises(InputError, match=r"has 3 tokens, fewer than one window of seq_len = 4"):
        evaluation_tokens(path, word_level(), seq_len=4, max_windows=5)


def test_c4_is_bounded_by_default(monkeypatch):
    texts = ["the quick fox"] * 300_000
    corpus = Corpus("c4", lambda: iter(texts), joined=True, local=False, revision="abc")
    monkeypatch.setattr(halve.text.tokens, "open_corpus", lambda *_arguments, **_options: corpus)
    found = evaluation_tokens("c4", word_level(), seq_len=8)
    assert (found.samples, found.revision) == (256, "abc")
    assert found.documents < 3000
    assert evaluation_tokens("c4", word_level(), seq_len=8, max_windows=300).samples == 300


def test_long_text_gives_no_warning(corpus, caplog):
    tokenizer = byte_bpe(model_max_length=16)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        calibration_tokens(corpus, tokenizer, samples=2, seq_len=64)
        evaluation_tokens(corpus, tokenizer, seq_len=64)
        assert not caplog.records
        tokenizer("the quick fox " * 10)
        assert "longer than the specified maximum" in caplog.text  # the warning there would have been
    finally:
        logger.removeHandler(caplog.handler)


def test_token_sets_compare_by_content():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert TokenSet(ids, "a", hash_ids(ids), 1) == TokenSet(ids.clone(), "a", hash_ids(ids), 1)
    assert TokenSet(ids, "a", hash_ids(ids), 1) != TokenSet(ids + 1, "a", hash_ids(ids + 1), 1)


# What sequences begin with


BEFORE = {
    "none": (byte_bpe, []),
    "BOS": (lambda: byte_bpe(adds_bos=True), ["<s>"]),
    "BOS and EOS": (lambda: surrounding(byte_bpe(), "<s> $A </s>"), ["<s>"]),
    "EOS alone": (lambda: surrounding(byte_bpe(), "$A </s>"), []),
    "two": (lambda: surrounding(byte_bpe(), "</s> <s> $A </s>"), ["</s>", "<s>"]),
    "in Python": (InPython, ["<s>"]),
}


def without_special(tokenizer, text):
    """The tokens of a text alone: those of pieces of it that are special are left out by hand."""
    return [token for token in tokenizer(text, verbose=False)["input_ids"] if token not in tokenizer.all_special_ids]


@pytest.mark.parametrize("max_windows", [None, 3])
@pytest.mark.parametrize("kind", BEFORE)
def test_every_window_begins_as_the_tokenizer_begins_text(tmp_path, kind, max_windows):
    build, before = BEFORE[kind]
    tokenizer = build()
    path = tmp_path / "a.txt"
    path.write_text(" ".join(sentences(300)))
    lead = tokenizer.convert_tokens_to_ids(before)
    text = without_special(tokenizer, path.read_text())
    room = 20 - len(lead)
    windows = len(text) // room if max_windows is None else max_windows
    expected = [[*lead, *text[start : start + room]] for start in range(0, windows * room, room)]
    found = evaluation_tokens(path, tokenizer, seq_len=20, max_windows=max_windows)
    assert found.ids.tolist() == expected
    assert found.ids.dtype == torch.int64
    assert (found.bos, found.lead, found.bos_ids) == ("each" if lead else "none", len(lead), lead)
    assert found.sha256 == hash_ids(found.ids)


@pytest.mark.parametrize("kind", BEFORE)
def test_windows_fit_to_the_last_token_of_the_text_and_not_beyond(tmp_path, kind):
    build, before = BEFORE[kind]
    tokenizer = build()
    path = tmp_path / "a.txt"
    path.write_text("the fox jumps over the lazy dog")
    text = without_special(tokenizer, path.read_text())
    found = evaluation_tokens(path, tokenizer, seq_len=len(text) + len(before))
    assert found.ids.tolist() == [[*tokenizer.convert_tokens_to_ids(before), *text]]
    with pytest.raises(InputError, match=f"has {len(text)} tokens, fewer than one window of seq_len = ") as refused:
        evaluation_tokens(path, tokenizer, seq_len=len(text) + len(before) + 1)
    assert (" holds beside BOS" in str(refused.value)) == bool(before)


@pytest.mark.parametrize("bos", ["auto", "never", "once"])
def test_a_tokenizer_that_puts_nothing_before_text_gives_what_it_always_gave(corpus, bos):
    """The hashes are of the version before sequences could begin with BOS."""
    tokenizer = byte_bpe()
    found = calibration_tokens(corpus, tokenizer, samples=7, seq_len=50, seed=3, bos=bos)
    assert found.sha256 == "149988eda2f97babb40dee9574cb004cadfcfc465c19a072d88e480f51724eed"
    windows = evaluation_tokens(corpus, tokenizer, seq_len=50, bos=bos)
    assert windows.sha256 == "4e5c8c1ad84ede0b148e3ae3a9f84483408e5c2aa7dc9063574a1bfb25f53e4a"
    assert (found.bos, found.lead, windows.bos, windows.lead) == ("none", 0, "none", 0)


def test_once_gives_what_was_given_before(corpus):
    tokenizer = byte_bpe(adds_bos=True)
    found = calibration_tokens(corpus, tokenizer, samples=7, seq_len=50, seed=3, bos="once")
    assert (found.sha256, found.bos) == ("149988eda2f97babb40dee9574cb004cadfcfc465c19a072d88e480f51724eed", "none")
    windows = evaluation_tokens(corpus, tokenizer, seq_len=50, bos="once")
    assert (windows.sha256, windows.bos, windows.lead) == (
        "c389c19ffbb2ba2d20041f859812176fb389a062acc90c763bc93daa45cd8af5",
        "once",
        0,
    )
    assert windows.ids[0, 0] == 0
    assert not (windows.ids[1:] == 0).any()


@pytest.mark.parametrize("kind", BEFORE)
def test_every_calibration_sequence_begins_as_the_tokenizer_begins_text(corpus, kind):
    build, before = BEFORE[kind]
    tokenizer = build()
    lead = tokenizer.convert_tokens_to_ids(before)
    room = 30 - len(lead)
    packed = calibration_tokens(corpus, tokenizer, samples=1, seq_len=8 * room, seed=2, bos="never")
    assert (packed.bos, packed.lead) == ("none", 0)
    found = calibration_tokens(corpus, tokenizer, samples=8, seq_len=30, seed=2)
    assert found.ids[:, : len(lead)].tolist() == [lead] * 8
    assert found.ids[:, len(lead) :].flatten().tolist() == packed.ids[0].tolist()
    assert (found.bos, found.lead, found.bos_ids) == ("each" if lead else "none", len(lead), lead)
    assert (found.tokens, found.documents) == (240, packed.documents)


def test_bos_can_be_asked_for_where_the_tokenizer_puts_none(corpus):
    tokenizer = byte_bpe()
    found = calibration_tokens(corpus, tokenizer, samples=4, seq_len=30, bos="always")
    windows = evaluation_tokens(corpus, tokenizer, seq_len=30, max_windows=4, bos="always")
    assert (found.ids[:, 0] == tokenizer.bos_token_id).all()
    assert (windows.ids[:, 0] == tokenizer.bos_token_id).all()
    assert (found.bos, windows.bos, windows.lead) == ("each", "each", 1)
    for tokens_of in (calibration_tokens, evaluation_tokens):
        with pytest.raises(InputError, match="bos = 'always', but the tokenizer has no BOS token"):
            tokens_of(corpus, byte_bpe(bos=None), seq_len=30, bos="always")
        with pytest.raises(InputError, match="bos = 'first' is not known: choose one of auto, always, never, once"):
            tokens_of(corpus, tokenizer, seq_len=30, bos="first")


def test_bos_that_the_text_has_itself_is_not_doubled(tmp_path):
    tokenizer = byte_bpe(adds_bos=True)
    path = write_corpus(tmp_path / "a.jsonl", ["<s>the quick fox jumps"])
    text = without_special(tokenizer, "the quick fox jumps")
    for found in (
        calibration_tokens(path, tokenizer, samples=1, seq_len=1 + len(text)),
        evaluation_tokens(path, tokenizer, seq_len=1 + len(text)),
    ):
        assert found.ids.tolist() == [[tokenizer.bos_token_id, *text]]


def test_bos_leaves_room_for_text(corpus):
    tokenizer = surrounding(byte_bpe(), "</s> <s> $A")
    for tokens_of in (calibration_tokens, evaluation_tokens):
        with pytest.raises(InputError, match=r"seq_len = 2 leaves no room for text beside BOS: give at least 3"):
            tokens_of(corpus, tokenizer, seq_len=2)
        assert tokens_of(corpus, tokenizer, seq_len=3).seq_len == 3


def test_too_few_tokens_beside_bos(tmp_path):
    path = write_corpus(tmp_path / "few.jsonl", ["the quick fox"] * 10)  # 3 * 10 tokens, 9 separators
    tokenizer = surrounding(word_level(), "<s> $A")
    calibration_tokens(path, tokenizer, samples=3, seq_len=14)
    with pytest.raises(InputError, match=r"has 39 tokens, .* need 40 beside BOS: .*samples = 3 is the most"):
        calibration_tokens(path, tokenizer, samples=4, seq_len=11)
    calibration_tokens(path, tokenizer, samples=1, seq_len=40)
    with pytest.raises(InputError, match=r"not even one sample fits; seq_len <= 40 would"):
        calibration_tokens(path, tokenizer, samples=1, seq_len=41)
