"""The model card: what it says, what it takes over from the base model's card, and that nothing in that stops a run."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from halve.checkpoint import directory
from halve.checkpoint.directory import BASE_CARD, card_of_base, is_sealed, sealed
from halve.checkpoint.durable import sha256_of
from halve.errors import CorruptFileError, InputError
from halve.packed.read import unpack_checkpoint
from halve.packed.write import pack_checkpoint
from halve.pruning import prune, resume
from halve.report import card as card_module
from halve.report.card import card, leave_beside, read_base, write_card
from halve.report.facts import read_run
from halve.verification import check
from models import decoder, save, tokens
from reported import fallen_back, prune_and_measure, training_entry, write_record

SCORE = {"source": "/home/me/wiki.txt", "seq_len": 16, "windows": 2, "dtype": "float32", "tokens_sha256": "ee"}
access = directory.os.access
HUB = {"kind": "hub", "name": "org/small", "revision": "abc"}
BASE = """---
license: other
license_name: small-licence
license_link: LICENSE
language:
- no
- en
datasets: [org/text]
tags: [conversational]
model-index:
- name: small
  results: []
---
# Small

Scores 99 of 100.
"""


def shown(text):
    """Return what of a card a reader of Markdown would take for more than text."""
    return re.sub(r"`[^`]*`|\\.", "", text)


def card_of(directory):
    """Write a card, and return what the hub's own reader makes of it: its fields and its text."""
    assert write_card(directory) == ""
    found = ModelCard.load(directory / "README.md")
    return found.data.to_dict(), found.text


def test_a_card_has_the_fields_of_the_hub_and_says_what_was_done(tmp_path):
    write_record(tmp_path, source=HUB, measured={"perplexity": [SCORE | {"before": 10.5, "after": 12.25}]})
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / BASE_CARD).write_text(BASE)
    (tmp_path / "LICENSE").touch()
    fields, text = card_of(tmp_path)
    assert fields.pop("model-index")
    assert fields == {
        "base_model": "org/small",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "small-licence",
        "license_link": "LICENSE",
        "language": ["no", "en"],
        "datasets": ["org/text"],
        "tags": ["halve", "pruned", "n:m-sparsity", "2:4"],
    }
    for words in (
        "[`org/small`](https://huggingface.co/org/small) (commit `abc`), pruned to 2:4",
        "of every 4 weights side by side along a matrix's inputs, at most 2 are not zero",
        "in 6 matrices, which are 75.0 % of the weights of all matrices",  # 6 of 32 weights, and 64 in the head
        "Method: wanda+cg",
        "`text.txt`, 4 sequences of 16 tokens",
        "Left dense: 1 × outside the blocks",  # noqa: RUF001 - a times sign
        "| `wiki.txt` | 10.500 | 12.250 | — | 2 windows of 16 tokens, float32 |",
        "Mean relative loss of a matrix: 0.2050",
        "AutoModelForCausalLM.from_pretrained",
        "`halve check DIR --against org/small`",
        "small-licence (LICENSE), as the base model's card says",
        "halve 0.1.0, torch 2.13.0",
    ):
        assert words in text
    assert "\n\n`BASE_MODEL_README.md` is the card" in text
    assert "Scores 99" not in text
    assert "/home" not in text


def results_of(directory):
    """Write a card, and return the name and the results that the hub reads from its `model-index`."""
    assert write_card(directory) == ""
    front = (directory / "README.md").read_text().split("---\n")[1]
    return model_index_to_eval_results(yaml.safe_load(front)["model-index"])


def test_what_was_measured_is_in_the_hubs_model_index(tmp_path):
    pictures = {"source": "/home/me/digits", "pictures": 200, "after": 151, "before": 190, "sha256": "dd"}
    scores = [SCORE | {"before": 10.5, "after": 12.254321}, SCORE | {"source": "org/text", "after_nll": 800.0}]
    write_record(tmp_path, source=HUB, measured={"perplexity": scores, "top_one": [pictures]})
    name, (perplexity, accuracy) = results_of(tmp_path)
    assert name == "small, 2:4"
    assert perplexity == EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type="wiki.txt",
        dataset_name="wiki.txt",
        dataset_args={"seq_len": 16, "windows": 2, "tokens_sha256": "ee"},
        metric_type="perplexity",
        metric_name="Perplexity, 2 windows of 16 tokens, float32",
        metric_value=12.254321,
    )
    assert (accuracy.task_type, accuracy.metric_type, accuracy.dataset_type) == (
        "image-classification",
        "accuracy",
        "digits",
    )
    assert accuracy.metric_value == 151 / 200
    assert "200 pictures" in accuracy.metric_name


def test_the_last_training_is_in_the_model_index_until_weights_are_changed(tmp_path):
    (result,) = results_of(write_record(tmp_path, trainings=[training_entry()]))[1]
    assert (result.dataset_type, result.metric_value) == ("wiki.txt", 45.0)
    rounding = [{"values": "int4", "weights_before": {}}]
    fields, _ = card_of(write_record(tmp_path, trainings=[training_entry()], quantised=rounding))
    assert "model-index" not in fields


def test_what_is_not_known_is_not_claimed(tmp_path):
    fields, text = card_of(write_record(tmp_path, calibration={"seed": 0}, mean_relative_loss=None))
    assert fields == {"library_name": "transformers", "tags": ["halve", "pruned", "n:m-sparsity", "2:4"]}
    for words in ("Perplexity was not measured", "Calibration: none was needed", "No licence is on record", "no card"):
        assert words in text
    assert "relative loss" not in text
    assert "from_pretrained" not in text


def test_trainings_merges_roundings_and_fallbacks_are_told(tmp_path):
    changes = fallen_back(write_record(tmp_path)) | {"trainings": [training_entry()], "source": HUB}
    changes |= {"merges": [{"adapter": {"name": "my-adapter", "kind": "lora"}, "tensors": []}]}
    fields, text = card_of(write_record(tmp_path, **changes))
    assert fields["base_model_relation"] == "finetune"
    for words in (
        "256 tokens of `a.txt`, `self`, learning rate 0.0003, taught by `org/small`",
        "The training took the perplexity of `wiki.txt` from 60.000 to 45.000",
        "`my-adapter`",
        r"**1 of 6 matrices fell back** to another method: `model.layers.1.mlp.down_proj.weight`",
        r"it \<b\>failed\</b\>",
    ):
        assert words in text
    rounding = [{"values": "int4", "weights_before": {}}]
    fields, text = card_of(write_record(tmp_path, quantised=rounding, source=HUB, pattern="50%"))
    assert fields["base_model_relation"] == "quantized"
    assert fields["tags"] == ["halve", "pruned", "unstructured-sparsity", "int4"]
    assert "Kept weights rounded to int4" in text
    assert "not measured since the weights were rounded" in text
    assert "50% of the weights of each row of a matrix are zero" in text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"kind": "directory", "name": "/home/me/models/small"}, None),
        ({"kind": "memory", "name": "LlamaForCausalLM"}, None),
        ({"kind": "hub", "name": "org/small)](javascript:alert(1)"}, None),
        ({"kind": "directory", "name": "/c/hub/models--org--small/snapshots/0123abcd"}, "org/small"),
        ({"kind": "directory", "name": "/home/me/small-2of4", "made_from": HUB}, "org/small"),
    ],
)
def test_the_base_model_is_named_where_its_name_on_the_hub_is_known(source, expected, tmp_path):
    fields, text = card_of(write_record(tmp_path, source=source))
    assert fields.get("base_model") == expected
    assert "/home" not in text
    assert "](javascript" not in shown(text)


def test_a_base_model_of_unknown_name_leaves_the_name_that_its_card_has(tmp_path):
    (tmp_path / BASE_CARD).write_text("---\nbase_model: org/first\n---\n")
    fields, _ = card_of(write_record(tmp_path, source={"kind": "directory", "name": "tuned"}))
    assert fields["base_model"] == "org/first"
    assert card_of(write_record(tmp_path, source=HUB))[0]["base_model"] == "org/small"


LEVELS = range(1, 60)
BOMB = "---\na0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in LEVELS) + "---\n"
MERGES = "---\na0: &a0 {b: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in LEVELS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe-\x00-\x00", None),  # UTF-16, without fields
        (b"---\nlicense: \xff\n---\n", "utf-8"),
        (b"---\nlicense: [mit\n---\n", "no YAML"),
        (b"---\nlicense: mit\n", "do not end"),
        (b"---\n- mit\n---\n", "a list"),
        (b"---\n" + b"[" * 100_000 + b"\n---\n", "nest"),
        (b"---\nx: " + b"y" * (1 << 20) + b"\n---\n", "do not end"),
        (b"---\nlicense: {a: [mit]}\nlanguage: [[en], null, ~]\npipeline_tag: " + b"x" * 400 + b"\n---\n", "`license`"),
        (b"---\n!!python/object/apply:os.system ['false']\n---\n", "a list"),
        (BOMB.encode(), None),
        (b"", None),
        (b"# A model\n", None),
    ],
)
def test_a_broken_or_hostile_card_costs_a_sentence_and_none_of_its_values_is_taken(content, words, tmp_path):
    write_record(tmp_path)
    (tmp_path / BASE_CARD).write_bytes(content)
    note = write_card(tmp_path)
    assert note == "" if words is None else words in note
    assert note.count("\n") == 0
    assert len(note) < 400
    assert ModelCard.load(tmp_path / "README.md").data.to_dict().keys() == {"library_name", "tags"}
    assert (tmp_path / BASE_CARD).read_bytes() == content


def test_licence_fields_that_are_not_taken_and_a_licence_file_that_is_not_there_are_told(tmp_path):
    write_record(tmp_path)
    (tmp_path / BASE_CARD).write_text(f"---\nlicense: mit\nlicense_name: {'x' * 400}\nlicense_link: Terms.pdf\n---\n")
    said = write_card(tmp_path)
    assert "`license_name`" in said
    assert "`license`" not in said
    assert "Terms.pdf" in said
    (tmp_path / "Terms.pdf").touch()
    assert "Terms.pdf" not in write_card(tmp_path)


@pytest.mark.parametrize(
    "content", ["---\nlicense: mit\n---", "\n--- \r\nlicense: mit\r\n---\t\r\nText", "---\rlicense: mit\r---\r"]
)
def test_fields_are_found_between_fences_with_spaces_behind_them(content, tmp_path):
    (tmp_path / BASE_CARD).write_bytes(content.encode())
    assert read_base(tmp_path).fields == {"license": "mit"}
    (tmp_path / BASE_CARD).write_bytes(b"---\n---\nlicense: mit\n---\n")
    assert read_base(tmp_path) == card_module.BaseCard(True)


def test_values_of_the_wrong_type_are_left_out_and_the_others_taken(tmp_path):
    (tmp_path / BASE_CARD).write_text(f"{MERGES}license: mit\nlanguage: {{en: 1}}\ndatasets: 12\n---\n")
    assert read_base(tmp_path).fields == {"license": "mit", "datasets": "12"}
    (tmp_path / BASE_CARD).write_bytes(
        b"\xef\xbb\xbf---\r\nlicense: mit\r\npipeline_tag: [a, b]\r\n---\r\n# Windows\r\n"
    )
    assert read_base(tmp_path).fields == {"license": "mit", "pipeline_tag": "a"}


def test_what_strangers_wrote_stays_text(tmp_path):
    nasty = "x`](http://evil) <script>alert(1)</script>\n\n# Heading | a\n---\n"
    matrices = json.loads((write_record(tmp_path) / "halve.json").read_text())["matrices"]
    changes = {"source": {"kind": "directory", "name": nasty}, "method": nasty, "pattern": nasty}
    changes |= {"environment": {"halve": nasty}, "excluded": [{"name": "x", "shape": [1], "reason": nasty}]}
    measured = {"perplexity": [SCORE | {"source": nasty, "before": 1.0, "after": 2.0}]}
    (tmp_path / BASE_CARD).write_text(yaml.dump({"license": "]<b>mit"}, explicit_start=True) + "---\n")
    fields, text = card_of(write_record(tmp_path, matrices=matrices, measured=measured, **changes))
    assert fields["license"] == "]<b>mit"
    assert "](http" not in shown(text)
    assert not re.search("<(?!!--)", shown(text))
    assert "\n# Heading" not in text
    row = next(line for line in text.splitlines() if line.startswith("| `x'"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_numbers_that_nobody_measured_are_refused(tmp_path):
    entry = {"name": "x", "shape": [10**17] * 90, "reason": "too large"}
    with pytest.raises(CorruptFileError, match=r"halve\.json"):
        write_card(write_record(tmp_path, excluded=[entry]))


def test_a_card_is_written_again_until_somebody_has_changed_it(tmp_path):
    write_record(tmp_path)
    assert write_card(tmp_path) == ""
    first = (tmp_path / "README.md").read_bytes()
    assert is_sealed(tmp_path / "README.md")
    write_record(tmp_path, measured={"perplexity": [SCORE | {"before": 1.0, "after": 2.0}]})
    assert write_card(tmp_path) == ""
    second = (tmp_path / "README.md").read_bytes()
    assert second != first
    own = second.replace(b"## What it cost", b"## What it came to")
    (tmp_path / "README.md").write_bytes(own)
    assert "left as it is" in write_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == own
    (tmp_path / "README.md").write_bytes(sealed("text"))
    assert is_sealed(tmp_path / "README.md")
    (tmp_path / "README.md").write_bytes(sealed("text") + b"more")
    assert not is_sealed(tmp_path / "README.md")


def test_no_record_no_card(tmp_path):
    with pytest.raises(InputError, match=r"no halve\.json"):
        write_card(tmp_path)


@pytest.fixture
def base(tmp_path):
    """A tiny model with a card of its own."""
    place = save(decoder("llama"), tmp_path / "base")
    (place / "README.md").write_text(BASE)
    (place / "LICENSE").write_text("terms")
    return place


def test_a_pruned_checkpoint_has_its_card_and_the_base_models_under_another_name(base, tmp_path):
    out = tmp_path / "out"
    pruned = prune(base, out, calibration=tokens(4))
    assert pruned.notes == ()
    assert (out / BASE_CARD).read_bytes() == (base / "README.md").read_bytes()
    record = json.loads((out / "halve.json").read_text())
    assert record["files"][BASE_CARD] == sha256_of(base / "README.md")
    assert "README.md" not in record["files"]  # it may be written again
    assert check(out).ok
    found = ModelCard.load(out / "README.md")
    assert found.data.license_name == "small-licence"
    assert "LlamaForCausalLM" not in found.text
    assert (out / "README.md").read_bytes() == card(read_run(out), read_base(out), "LlamaForCausalLM")
    again = prune(base, tmp_path / "again", calibration=tokens(4)).out
    assert (again / "README.md").read_bytes() == (out / "README.md").read_bytes()
    # pruned once more: what it came from is known, and the base's card is still the base's
    twice = prune(out, tmp_path / "twice", calibration=tokens(4), pattern="1:4").out
    assert (twice / BASE_CARD).read_text() == BASE
    assert json.loads((twice / "halve.json").read_text())["source"]["made_from"]["name"] == str(base)


def test_the_card_has_perplexities_once_they_are_measured(checkpoint, text, tmp_path):
    (checkpoint / "README.md").write_text(BASE)
    out = prune_and_measure(checkpoint, text, tmp_path / "out")
    score = read_run(out).perplexity[0]
    found = (out / "README.md").read_text()
    assert f"| `text.txt` | {score.before:.3f} | {score.after:.3f} |" in found
    assert "text.txt is" in found  # measured on what it was calibrated on
    assert str(tmp_path) not in found.replace("\\", "")
    assert is_sealed(out / "README.md")


def test_a_stopped_run_ends_with_the_same_card(checkpoint, text, tmp_path):
    (checkpoint / "README.md").write_text(BASE)
    asked = {"calibration": text, "samples": 4, "seq_len": 16}
    whole = prune(checkpoint, tmp_path / "whole", **asked).out
    out = tmp_path / "out"

    def stop(step):
        if step.phase == "solve" and step.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(checkpoint, out, listen=stop, **asked)
    resume(out)
    assert (out / "README.md").read_bytes() == (whole / "README.md").read_bytes()


@pytest.mark.parametrize("how", ["link", "directory", "unreadable"])
def test_a_card_that_cannot_be_taken_along_is_told(how, base, tmp_path, monkeypatch):
    (base / "README.md").unlink()
    if how == "link":
        (tmp_path / "secret").write_text("secret")
        (base / "README.md").symlink_to(tmp_path / "secret")
    elif how == "directory":
        (base / "README.md").mkdir()
    else:
        (base / "README.md").write_text(BASE)
        monkeypatch.setattr(directory.os, "access", lambda path, mode: path.name != "README.md" and access(path, mode))
    pruned = prune(base, tmp_path / "out", calibration=tokens(4))
    assert [note for note in pruned.notes if "README.md was not taken along" in note] == list(pruned.notes)
    assert not (tmp_path / "out" / BASE_CARD).exists()
    assert "had no card" in (tmp_path / "out" / "README.md").read_text()
    assert check(tmp_path / "out").ok


def test_which_card_goes_along(tmp_path):
    own, carried = tmp_path / "README.md", tmp_path / BASE_CARD
    assert card_of_base(tmp_path) == (None, "")
    own.write_text("theirs")
    assert card_of_base(tmp_path) == (own, "")
    write_record(tmp_path)
    assert card_of_base(tmp_path) == (own, "")  # no base card: what somebody wrote is all there is
    carried.write_text("the base's")
    found, said = card_of_base(tmp_path)
    assert found == carried
    assert "README.md was not taken along" in said
    own.write_bytes(sealed("ours"))
    assert card_of_base(tmp_path) == (carried, "")
    carried.unlink()
    assert card_of_base(tmp_path) == (None, "")


def test_what_stands_in_the_way_of_a_card_is_no_error(tmp_path):
    write_record(tmp_path)
    (tmp_path / "README.md").mkdir()
    sums, notes = leave_beside(tmp_path, None)
    assert sums.keys() == {"report.html"}
    assert "left as it is" in notes[0]
    shutil.rmtree(tmp_path / "README.md")
    (tmp_path / "halve-measured.json").write_text("{")
    sums, notes = leave_beside(tmp_path, None)
    assert not sums
    assert [("report" in note, "card" in note) for note in notes] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("texts/me/wiki.TXT", "wiki.TXT"),
        ("C:\\Users\\me\\texts", "texts"),
        ("file:///home/me/texts/", "texts"),
        ("~/texts", "texts"),
        ("../me/texts", "texts"),
        ("data/me/wiki.jsonl.gz", "wiki.jsonl.gz"),
        ("allenai/c4", "allenai/c4"),
        ("c4", "c4"),
    ],
)
def test_a_source_that_is_a_file_is_named_without_its_directories(name, expected):
    assert card_module._local(name) == expected


@pytest.mark.parametrize("name", ["card", "write_report"])
def test_no_error_of_any_class_stops_what_is_left_beside_a_checkpoint(name, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise ImportError("no name 'x'\nin module y")

    write_record(tmp_path)
    monkeypatch.setattr(card_module, name, fail)
    sums, notes = leave_beside(tmp_path, None)
    assert len(sums) == len(notes) == 1
    assert notes[0].endswith("is not written: ImportError: no name 'x' in module y")


def test_a_packed_checkpoint_has_a_card_of_its_own_and_gives_the_plain_one_back(base, tmp_path):
    plain = prune(base, tmp_path / "plain", calibration=tokens(4)).out
    pack_checkpoint(plain, tmp_path / "packed")
    assert (tmp_path / "packed" / BASE_CARD).read_bytes() == (plain / BASE_CARD).read_bytes()
    found = ModelCard.load(tmp_path / "packed" / "README.md")
    assert found.text.lstrip().startswith("> **This is the packed form")
    assert found.data.license_name == "small-licence"
    assert is_sealed(tmp_path / "packed" / "README.md")
    assert check(tmp_path / "packed").ok
    unpack_checkpoint(tmp_path / "packed", tmp_path / "back")
    for path in plain.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    content = (tmp_path / "packed" / "README.md").read_bytes().replace(b"ordinary", b"ordinery")
    (tmp_path / "packed" / "README.md").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"README\.md of .* does not come out"):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "changed")
