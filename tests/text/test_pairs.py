"""Pairs of two named fields: tokenised as for fine-tuning, in batches whose padding counts nowhere."""

import copy
import json
from itertools import pairwise

import pytest
import torch
import transformers as tf
from torch import nn

import halve
from halve.checkpoint.load import LoadedModel
from halve.errors import InputError
from halve.run.loop import prune_blocks
from halve.text.calibration import Calibration, calibration_batches
from halve.text.calibration_record import calibration_record
from halve.text.pairs import _mixes_experts
from models import encoder_decoder, seq2seq
from pruned_blocks import CPU, settings
from tiny_tokenizers import SENTENCES, UNKNOWN, surrounding, word_level

WORDS = SENTENCES[0].split()


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    """Eight pairs of 1 to 8 words."""
    lines = [{"source": " ".join(WORDS[: i + 1]), "target": " ".join(WORDS[7 - i :])} for i in range(8)]
    return write(tmp_path / "pairs.jsonl", lines)


def loaded(family="bart", template="<s> $A </s>"):
    return LoadedModel(encoder_decoder(family), surrounding(word_level(pad_token=UNKNOWN), template), None)


def read(file, model=None, **options):
    asked = {"samples": 8, "pair_fields": "source,target", **options}
    return Calibration(file, **asked).data(model or loaded())


def test_both_texts_are_tokenised_as_for_fine_tuning(file):
    model = loaded()
    found, tokenizer = read(file, model), model.tokenizer
    rows = {tuple(row["input_ids"][0].tolist()): row["decoder_input_ids"][0].tolist() for row in found.rows}
    for line in map(json.loads, file.read_text().splitlines()):
        labels = tokenizer(text_target=line["target"])["input_ids"]
        assert rows[tuple(tokenizer(line["source"])["input_ids"])] == [0, *labels[:-1]]  # 0 is the start token
    assert len(rows) == 8
    assert calibration_record(found) == {
        "source": str(file),
        "samples": 8,
        "seq_len": 128,
        "pairs": "fields source and target",
        "encoder_tokens": 36 + 16,
        "decoder_tokens": found.decoder_tokens,
        "sha256": found.sha256,
    }


def test_a_tokenizer_with_a_target_side_is_asked_for_it(file):
    class Translating(tf.PreTrainedTokenizerFast):
        def _switch_to_input_mode(self):
            surrounding(self, "$A </s>")

        def _switch_to_target_mode(self):
            surrounding(self, "<s> $A </s>")

    tokenizer = Translating(tokenizer_object=word_level().backend_tokenizer)
    found = read(file, LoadedModel(encoder_decoder("bart"), tokenizer, None))
    assert {row["input_ids"][0, 0].item() for row in found.rows}.isdisjoint({1})
    assert {row["decoder_input_ids"][0, 1].item() for row in found.rows} == {1}


def test_each_side_is_cut_to_the_length(file):
    found = read(file, seq_len=4)
    assert max(row["input_ids"].shape[1] for row in found.rows) == 4
    assert max(row["decoder_input_ids"].shape[1] for row in found.rows) == 4
    assert all(row["input_ids"][0, -1] == 2 for row in found.rows)  # </s> stays


def test_the_seed_decides_the_choice(file):
    assert read(file, samples=3) == read(file, samples=3)
    assert read(file, samples=3).sha256 != read(file, samples=3, seed=1).sha256


def unpadded(batches):
    """Return every pair of some batches without its padding."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            sides = (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))
            found.append(tuple(tuple(batch[ids][row][batch[mask][row].bool()].tolist()) for ids, mask in sides))
    return sorted(found)


def test_batches_are_padded_and_their_masks_say_where(file):
    model, found = loaded(), read(file)
    batches = calibration_batches(found, model.model, 40)
    assert len(batches) < 8
    rows = [(row["input_ids"], row["decoder_input_ids"]) for row in found.rows]
    assert unpadded(batches) == sorted((tuple(a[0].tolist()), tuple(b[0].tolist())) for a, b in rows)
    sizes = [batch["input_ids"].numel() + batch["decoder_input_ids"].numel() for batch in batches]
    assert max(sizes) <= 40
    assert any(not batch["attention_mask"].all() for batch in batches)
    assert not any(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairwise(batches))


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_padding_counts_in_neither_stack(file, family):
    """The oracle: every pair alone, and the tokens of the file."""
    model = loaded(family)
    found = read(file, model)
    alone = [dict(row) for row in found.rows]
    reports = [
        prune_blocks(copy.deepcopy(model.model), batches, settings("wanda"), device=CPU)
        for batches in (alone, calibration_batches(found, model.model, 40))
    ]
    expected = {found.encoder_tokens, found.decoder_tokens}
    assert {m.facts["tokens"] for m in reports[1].matrices} == expected
    for one, two in zip(*(report.matrices for report in reports), strict=True):
        assert one.facts["tokens"] == two.facts["tokens"], one.name
        assert one.facts["relative_loss"] == pytest.approx(two.facts["relative_loss"], rel=1e-3), one.name


def test_models_that_mix_experts_get_pairs_of_equal_lengths(file):
    model = loaded()
    found = read(file)
    model.model.model.encoder.layers[0].experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    batches = calibration_batches(found, model.model, 4096)
    assert len(batches) == 8
    assert all(batch.keys() == {"input_ids", "decoder_input_ids"} for batch in batches)


def test_experts_are_seen_by_structure():
    sparse = tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64, num_experts=4
        )
    )
    assert _mixes_experts(sparse)
    assert not any(_mixes_experts(encoder_decoder(family)) for family in ("t5", "bart", "marian", "whisper"))
    assert not _mixes_experts(tf.MBartForConditionalGeneration(tf.MBartConfig(**seq2seq())))


def test_a_model_that_takes_no_mask_of_the_decoder_gets_none(file, monkeypatch):
    model = loaded()
    found = read(file)

    def forward(input_ids, attention_mask, decoder_input_ids):
        """Takes one mask only."""

    monkeypatch.setattr(model.model.model, "forward", forward)
    assert all(
        batch.keys() == {"input_ids", "decoder_input_ids"} for batch in calibration_batches(found, model.model, 4096)
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"source": "the fox"}, r"pairs.jsonl, line 2, has no text in a field 'target'"),
        ({"source": "the fox", "target": " "}, r"pairs.jsonl, line 2, has an empty field 'target'"),
        ({"source": "", "target": "the fox"}, r"pairs.jsonl, line 2, has an empty field 'source'"),
        ({"source": 5, "target": "the fox"}, r"pairs.jsonl, line 2, has no text in a field 'source'"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line, message):
    file = write(tmp_path / "pairs.jsonl", [{"source": "the", "target": "fox"}, line])
    with pytest.raises(InputError, match=message):
        read(file, samples=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 9}, r"has 8 pairs, but samples = 9: give more pairs, or fewer samples"),
        ({"seq_len": 129}, r"seq_len = 129 gives the encoder 129 tokens, and it was built for 128"),
        ({"pair_fields": "source"}, r"pair_fields = 'source' does not name two fields"),
        ({"pair_fields": ("source", "source")}, r"does not name two fields"),
        ({"bos": "never"}, r"bos is for text that is cut into sequences, and pair_fields has each side"),
        ({"span_corruption": True}, r"pair_fields is for pairs, span_corruption for plain text"),
    ],
)
def test_what_does_not_go_with_pairs_is_refused(file, options, message):
    asked = {"samples": 8, "pair_fields": "source,target", "calibration": file, **options}
    with pytest.raises(InputError, match=message):
        halve.prune(encoder_decoder("bart"), tokenizer=loaded().tokenizer, **asked)


@pytest.mark.parametrize("source", [None, "self", "c4", [{"input_ids": torch.ones(1, 4)}]])
def test_pairs_are_of_a_file(source):
    with pytest.raises(InputError, match=r"pair_fields are of a .jsonl or .parquet file, and calibration names none"):
        halve.prune(encoder_decoder("bart"), calibration=source, pair_fields="a,b")
    if source != "c4":
        with pytest.raises(InputError, match="span_corruption masks text, and calibration names none"):
            halve.prune(encoder_decoder("t5"), calibration=source, span_corruption=True)


def test_files_of_another_kind_are_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"holds no pairs: pair_fields needs .jsonl or .parquet"):
        read(text)
    with pytest.raises(InputError, match="does not exist: give a file of pairs"):
        read(tmp_path / "absent.jsonl")


def test_a_directory_and_parquet_are_read_alike(file, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "more").mkdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    parquet.write_table(pa.Table.from_pylist(lines), tmp_path / "more" / "pairs.parquet")
    assert read(tmp_path / "more").sha256 == read(file).sha256
    with pytest.raises(InputError, match="has no column 'answer': name the one"):
        read(tmp_path / "more", pair_fields="source,answer")
    parquet.write_table(pa.Table.from_pylist([{"source": "the", "target": ""}]), tmp_path / "more" / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 1, has an empty field 'target'"):
        read(tmp_path / "more")
