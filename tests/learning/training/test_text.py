"""From texts to rows: which documents, in which order, what is held out, and what is never mixed."""

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from halve.checkpoint.load import LoadedModel, Source
from halve.errors import CorruptFileError, InputError
from halve.learning.options import TrainingText
from halve.learning.training.text import _order, keeps_documents_apart, read_rows, training_rows, write_rows
from halve.text.documents import open_corpus
from halve.text.packing import shuffled_corpus
from halve.text.rows import IGNORED
from models import decoder
from taught import words, write_text
from tiny_tokenizers import CHAT, byte_bpe, chatting


@pytest.fixture(scope="module")
def student():
    return LoadedModel(decoder("llama", vocab_size=320), byte_bpe(), None)


def read(student, *data, sequences=20, teacher=None, **options):
    text = TrainingText(data=tuple(map(str, data)), **{"seq_len": 16, "held_out": 64, **options})
    return training_rows(text, student, teacher, sequences)


def passages(rows, tokenizer):
    """Return the documents in rows as text, by where positions begin anew."""
    found, ids = [], []
    for row, places in zip(rows.ids.tolist(), rows.positions.tolist(), strict=True):
        for id_, place in zip(row, places, strict=True):
            if place == 0 and ids:
                found.append(tokenizer.decode(ids))
                ids = []
            ids.append(id_)
    return [*found, tokenizer.decode(ids)]


def test_the_held_out_documents_are_not_trained_on(student, tmp_path):
    path = write_text(tmp_path / "t.jsonl", documents=40, length=12)
    rows = read(student, path, sequences=200)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    pieces = {part.removesuffix("</s>") for part in passages(rows.rows, student.tokenizer)}
    held = {part.removesuffix("</s>") for part in passages(rows.held_out, student.tokenizer)}
    of = [
        {index for index, text in enumerate(texts) for part in some if len(part) > 12 and part in text}
        for some in (pieces, held)
    ]
    assert all(of)
    assert not of[0] & of[1]
    assert 64 <= rows.held_out.learned + 16 <= 160


def test_a_long_txt_is_cut_in_two_for_that(student, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(words(600, seed=1), encoding="utf-8")
    rows = read(student, path)
    ids = student.tokenizer(path.read_text())["input_ids"]
    cut = len(ids) + 1 - 64  # EOS follows
    assert rows.held_out.ids.flatten().tolist()[:-1] == ids[cut:]
    assert rows.rows.ids.flatten().tolist()[:cut] == ids[:cut]
    assert rows.rows.labels[0, 0] == rows.held_out.labels[0, 0] == IGNORED


def calibrated(student, folder, source, documents, tokens=10_000, seed=0):
    """Return the student as one that was calibrated on the first documents of a text."""
    folder.mkdir()
    about = {"source": str(source), "seed": seed, "documents": documents, "samples": 3, "tokens": tokens, "bos": "none"}
    (folder / "halve.json").write_text(json.dumps({"calibration": about}))
    return replace(student, source=Source("directory", folder, "pruned"))


@pytest.mark.parametrize("seed", [0, 5])
def test_what_the_model_was_calibrated_on_is_trained_on_and_not_held_out(student, tmp_path, seed):
    path = write_text(tmp_path / "t.jsonl", documents=40, length=12)
    corpus = open_corpus(path, use="calibration")
    known = list(shuffled_corpus(corpus, seed))[:25]
    pruned = calibrated(student, tmp_path / "pruned", path, 25, seed=seed)
    rows = read(pruned, path, sequences=200)
    held, trained = ("".join(passages(part, student.tokenizer)) for part in (rows.held_out, rows.rows))
    assert not any(document[:30] in held for document in known)
    assert all(document[:30] in trained for document in known)
    assert not any("flatters" in note for note in rows.notes)
    few = read(pruned, path, sequences=4)  # fewer than it was calibrated on: more is read for what is held out
    assert torch.equal(few.held_out.ids[0], rows.held_out.ids[0])


def test_another_text_than_it_was_calibrated_on_is_held_out_as_ever(student, tmp_path):
    path, other = (write_text(tmp_path / name, documents=40, length=12) for name in ("t.jsonl", "other.jsonl"))
    plain = read(student, path, sequences=200)
    for number, source in enumerate((other, tmp_path / "gone.jsonl", "c4")):
        pruned = calibrated(student, tmp_path / f"pruned-{number}", source, 25)
        assert read(pruned, path, sequences=200).sha256 == plain.sha256


def test_that_all_of_a_text_is_known_is_told(student, tmp_path):
    path = write_text(tmp_path / "t.jsonl", documents=40, length=12)
    rows = read(calibrated(student, tmp_path / "pruned", path, 40), path, sequences=200)
    assert len(rows.held_out)
    assert any(f"the model was calibrated on all of {path}" in note and "flatters" in note for note in rows.notes)


@pytest.mark.parametrize(("tokens", "told"), [(1000, False), (10_000, True)])
def test_of_a_txt_the_beginning_may_be_known(student, tmp_path, tokens, told):
    path = tmp_path / "long.txt"
    path.write_text(words(600, seed=1), encoding="utf-8")
    rows = read(calibrated(student, tmp_path / "pruned", path, 1, tokens), path)
    assert any("flatters" in note for note in rows.notes) == told
    assert student.tokenizer.decode(rows.held_out.ids.flatten()[:-1]) in path.read_text()[-400:]


def test_the_teachers_own_text_is_known_where_it_was_calibrated_on_it(student, tmp_path):
    pruned = calibrated(student, tmp_path / "pruned", "self", 3)
    text = TrainingText(data="self", seq_len=16, held_out=16)
    rows = training_rows(text, pruned, LoadedModel(decoder("llama", seed=3, vocab_size=320), None, None), 8)
    plain = training_rows(text, student, LoadedModel(decoder("llama", seed=3, vocab_size=320), None, None), 8)
    assert torch.equal(plain.held_out.ids[0], rows.rows.ids[0])
    assert torch.equal(rows.held_out.ids[0], plain.rows.ids[2])  # the fourth of all


def test_sources_share_the_tokens_by_their_weights(student, tmp_path):
    first, second = write_text(tmp_path / "a.jsonl", 60), write_text(tmp_path / "b.jsonl", 60, seed=9)
    rows = read(student, f"{first}=3", f"{second}", sequences=40)
    bound = -(-rows.sources[str(first)] // 16)
    from_first = rows.order < bound
    assert int(from_first.sum()) == 30
    assert all(5 <= int(part.sum()) <= 10 for part in from_first.split(10))  # evenly over the training
    assert len(rows.order) == 40


@pytest.mark.parametrize(("parts", "sequences"), [([(10, 25)], 25), ([(7, 10), (3, 11)], 21), ([(5, 3), (5, 3)], 7)])
def test_the_order_covers_rows_evenly(parts, sequences):
    order = _order(parts, sequences, seed=0)
    first = 0
    for count, wanted in parts:
        times = torch.bincount(order[(order >= first) & (order < first + count)] - first, minlength=count)
        assert int(times.max() - times.min()) <= 1 + (sequences > sum(part[1] for part in parts))
        assert int(times.sum()) in {wanted, wanted + 1}
        first += count
    assert len(order) == sequences
    assert torch.equal(order, _order(parts, sequences, seed=0))
    assert not torch.equal(order, _order(parts, sequences, seed=1))


def test_a_short_text_is_read_again_and_that_is_said(student, tmp_path):
    rows = read(student, write_text(tmp_path / "t.jsonl", 6), sequences=100)
    assert len(rows.order) == 100
    assert any("of the 100 sequences that are wanted, and is read" in note for note in rows.notes)
    assert read(student, write_text(tmp_path / "t.jsonl", 40), sequences=20).notes == ()


def test_too_little_text_is_refused(student, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("the", encoding="utf-8")
    with pytest.raises(InputError, match=r"the training text '.*t\.txt' is too short: it fills 0 sequences"):
        read(student, path)


def test_bos_is_where_the_tokenizer_puts_it_and_is_not_learned(tmp_path):
    path = write_text(tmp_path / "t.jsonl", 20, 6)
    student = LoadedModel(decoder("llama", vocab_size=320), byte_bpe(adds_bos=True), None)
    bos = student.tokenizer.bos_token_id
    rows = read(student, path, sequences=10).rows
    first = rows.ids == bos
    assert bool(first.any())
    assert torch.equal(rows.positions[first], torch.zeros_like(rows.positions[first]))
    after = torch.zeros_like(first)
    after[:, 1:] = first[:, :-1]
    assert bool((rows.labels[first | after] == IGNORED).all())
    without = read(student, path, sequences=10, bos="never").rows
    assert not bool((without.ids == bos).any())


def test_packed_documents_do_not_attend_to_each_other(student, tmp_path):
    assert keeps_documents_apart(student.model, 320)
    assert keeps_documents_apart(copy.deepcopy(student.model).bfloat16(), 320)
    rows = read(student, write_text(tmp_path / "t.jsonl", 60, 2)).rows
    packed = student.model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False).logits
    assert int((rows.positions == 0).sum()) > len(rows)
    for row in range(len(rows)):
        starts = [*(rows.positions[row] == 0).nonzero().flatten().tolist(), 16]
        assert len(starts) >= 2
        for start, stop in pairwise(starts):
            alone = student.model(input_ids=rows.ids[row : row + 1, start:stop]).logits[0]
            torch.testing.assert_close(packed[row, start:stop], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_a_model_that_would_mix_them_gets_one_document_a_row(family, tmp_path):
    student = LoadedModel(decoder(family, vocab_size=320), byte_bpe(), None)
    apart = not keeps_documents_apart(student.model, 320)
    assert apart or family == "opt"
    rows = read(student, write_text(tmp_path / "t.jsonl", 60, 5))
    assert rows.apart == apart
    if apart:
        assert any("one document, padded" in note for note in rows.notes)
        real = rows.rows.labels != IGNORED
        starts = (rows.rows.positions == 0).sum(-1)
        assert int(starts.max()) <= 2  # the document, and padding
        assert bool(real.any(-1).all())


def test_what_the_assistant_says_is_learned(student, tmp_path):
    tokenizer = chatting()
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(30)), encoding="utf-8")
    chats = LoadedModel(student.model, tokenizer, None)
    rows = read(chats, path, sequences=6, seq_len=100, held_out=100)
    said = [
        tokenizer.decode(row[labels != IGNORED]) for row, labels in zip(rows.rows.ids, rows.rows.labels, strict=True)
    ]
    assert set(said) <= {"jumps over<|im_end|>\nthe lazy dog<|im_end|>\n"[: len(each)] for each in said}
    cut = read(chats, path, sequences=6, seq_len=70, held_out=100)
    assert any("longer than seq_len and were cut" in note for note in cut.notes)
    everything = read(chats, path, sequences=6, seq_len=100, held_out=100, loss_on="all")
    assert everything.rows.learned > 2 * rows.rows.learned


def test_the_teachers_own_text(student):
    teacher = LoadedModel(decoder("llama", seed=3, vocab_size=320), student.tokenizer, None)
    heard = []
    text = TrainingText(data="self", seq_len=16, held_out=16)
    rows = training_rows(text, student, teacher, 8, lambda *given: heard.append(given))
    assert len(rows.rows) + len(rows.held_out) == 9
    again = training_rows(text, student, teacher, 8)
    assert rows.sha256 == again.sha256
    other = training_rows(text, student, LoadedModel(student.model, student.tokenizer, None), 8)
    assert rows.sha256 != other.sha256
    with pytest.raises(InputError, match="there is no teacher"):
        training_rows(text, student, None, 8)


def test_ids_that_the_model_does_not_have_and_no_tokenizer_are_refused(student, tmp_path):
    path = write_text(tmp_path / "t.jsonl")
    with pytest.raises(InputError, match="vocabulary"):
        read(LoadedModel(decoder("llama", vocab_size=64), student.tokenizer, None), path)
    with pytest.raises(InputError, match="has no tokenizer"):
        read(LoadedModel(student.model, None, None), path)


def test_rows_are_kept_and_read_again(student, tmp_path):
    rows = read(student, write_text(tmp_path / "t.jsonl"))
    write_rows(tmp_path, rows, {"seed": 0, "data": ("a",)})
    again = read_rows(tmp_path, {"seed": 0, "data": ("a",)})
    assert again.sha256 == rows.sha256
    assert (again.notes, again.sources, again.apart) == (rows.notes, rows.sources, rows.apart)
    assert read_rows(tmp_path, {"seed": 1, "data": ("a",)}) is None
    path = tmp_path / "text.safetensors"
    content = bytearray(path.read_bytes())
    content[-len(rows.order) * 8 - 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"text\.safetensors was changed"):
        read_rows(tmp_path, {"seed": 0, "data": ("a",)})
