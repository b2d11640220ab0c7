"""Packing in one step: integers that are solved for on the way are those of the two steps, and nothing else is left."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import halve
from halve import packing
from halve.checkpoint.directory import is_sealed
from halve.errors import CalibrationError, HalveError, InputError, PatternError
from halve.packing import pack
from halve.pruning import prune
from halve.run.events import Progress
from models import decoder, edit_json, save, tokens
from packed_models import edit_tensor, sums
from reported import training_entry
from tiny_tokenizers import SENTENCES, byte_bpe

ASKED = {"samples": 8, "seq_len": 16}


@pytest.fixture
def plain(checkpoint, text, tmp_path):
    """A pruned checkpoint of which some matrices stayed dense."""
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")
    prune(checkpoint, tmp_path / "plain", calibration=text, method="wanda", skip="*.q_proj.*", **ASKED)
    return tmp_path / "plain"


def beside(directory):
    return sorted(path.name for path in directory.parent.iterdir())


def test_one_step_gives_what_the_two_steps_give(plain, text, tmp_path):
    prune(plain, tmp_path / "solved", values="int4", method="magnitude", skip="*.q_proj.*", calibration=text, **ASKED)
    by_hand = pack(tmp_path / "solved", tmp_path / "by-hand", values="int4")
    there = beside(plain)
    told, steps = [], []
    result = pack(
        plain,
        tmp_path / "packed",
        values="int4",
        calibration=text,
        listen=lambda done, total, name: told.append((done, total)),
        solving=steps.append,
        **ASKED,
    )
    assert beside(plain) == sorted([*there, "packed"])
    assert result.matrices == by_hand.matrices
    assert not any("q_proj" in name for name in result.matrices)
    assert result.error == by_hand.error == 0
    assert result.moved == ()
    weights = [load_file(tmp_path / name / "packed.safetensors") for name in ("packed", "by-hand")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert told == [(done, 18) for done in range(1, 19)]
    assert all(isinstance(step, Progress) for step in steps)
    record = json.loads((tmp_path / "packed" / "halve.json").read_text())
    before = json.loads((plain / "halve.json").read_text())
    for name in ("method", "refit", "source", "matrices", "calibration"):
        assert record[name] == before[name]
    (rounding,) = record["quantised"]
    assert rounding["values"] == "int4"
    assert rounding["weights_before"] == {"model.safetensors": sums(plain)["model.safetensors"]}
    assert rounding["calibration"]["source"] == text
    assert 0 < rounding["mean_relative_loss"] < 1
    assert {each["reason"] for each in record["excluded"] if "q_proj" in each["name"]} == {"skipped on request"}
    assert halve.check(tmp_path / "packed").ok
    assert "/solved" not in (tmp_path / "packed" / "report.html").read_text().partition("<script>")[0]
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "license: mit" in card
    assert "Method: wanda" in card
    assert "Kept weights rounded to int4" in card
    assert result.notes == ()


def test_integers_that_are_solved_for_lose_less_than_rounding(plain, text, tmp_path):
    ids = byte_bpe()(" ".join(SENTENCES), return_tensors="pt").input_ids[:, :256]
    dense = halve.load(plain).model(ids).logits
    solved = pack(plain, tmp_path / "solved", values="int4", calibration=text, samples=64, seq_len=32)
    rounded = pack(plain, tmp_path / "rounded", values="int4")
    assert len(rounded.moved) == len(rounded.matrices) == 18
    assert rounded.error > 0
    off = [float((halve.load(done.out).model(ids).logits - dense).norm()) for done in (solved, rounded)]
    assert off[0] < off[1]


def test_rounded_weights_have_a_card_without_what_was_measured(plain, text, tmp_path):
    halve.prune(plain.parent / "dense", tmp_path / "measured", calibration=text, eval_data=[text], **ASKED)
    assert "| `text.txt` |" in (tmp_path / "measured" / "README.md").read_text()
    pack(tmp_path / "measured", tmp_path / "packed", values="int8")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "Kept weights rounded to int8" in card
    assert "not measured since the weights were rounded" in card
    assert "| `text.txt` |" not in card
    assert is_sealed(tmp_path / "packed" / "README.md")
    halve.unpack(tmp_path / "packed", tmp_path / "back")
    halve.write_report(tmp_path / "back")
    assert card.count("packed form") == 1
    back = (tmp_path / "back" / "README.md").read_text()
    assert "packed form" not in back
    assert "Kept weights rounded to int8" in back
    assert is_sealed(tmp_path / "back" / "README.md")
    assert halve.check(tmp_path / "back").ok
    (tmp_path / "measured" / "README.md").write_text("mine")
    for values in ("int8", "own"):
        (said,) = pack(tmp_path / "measured", tmp_path / values, values=values).notes
        assert (tmp_path / values / "README.md").read_text() == "mine"
        assert "goes along as it is" in said
        assert ("was measured before" in said) == (values == "int8")
    halve.unpack(tmp_path / "own", tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


def test_damage_to_what_was_measured_costs_the_card_alone(plain, tmp_path):
    (plain / "halve-measured.json").write_text("{")
    result = pack(plain, tmp_path / "packed", values="int8")
    (said,) = result.notes
    assert "has no model card: " in said
    assert "halve-measured.json" in said
    assert not (tmp_path / "packed" / "README.md").exists()
    assert halve.check(tmp_path / "packed").ok
    assert pack(plain, tmp_path / "own").notes == ()


def test_history_and_an_edited_card_outlive_solving_even_if_no_page_can_be_written(plain, text, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("no page")

    edit_json(plain / "halve.json", trainings=[training_entry(tensors=[])])
    (plain / "README.md").write_text("mine")
    monkeypatch.setattr("halve.report.card.write_report", fail)
    (tmp_path / "packed").mkdir()  # where it is, the work is done inside
    result = pack(plain, tmp_path / "packed", values="int4", calibration=text, **ASKED)
    assert result.out == tmp_path / "packed"
    assert [len([note for note in result.notes if words in note]) for words in ("no page", "goes along as it is")] == [
        1,
        1,
    ]
    assert not [note for note in result.notes if "not taken along" in note]
    assert (tmp_path / "packed" / "README.md").read_text() == "mine"
    record = json.loads((tmp_path / "packed" / "halve.json").read_text())
    assert record["trainings"] == [training_entry(tensors=[])]
    assert not [path for path in (tmp_path / "packed").iterdir() if path.name.startswith(".")]
    assert halve.check(tmp_path / "packed").ok


def test_there_has_to_be_room_for_both_what_is_solved_for_and_what_is_packed(plain, text, tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in plain.glob("*.safetensors"))
    usage = shutil.disk_usage(plain)
    monkeypatch.setattr("halve.checkpoint.room.shutil.disk_usage", lambda _path: usage._replace(free=int(size * 1.05)))
    monkeypatch.setattr(packing, "prune_as", None)
    with pytest.raises(InputError, match="its volume has"):
        pack(plain, tmp_path / "packed", values="int4", calibration=text, **ASKED)


def test_a_folder_that_cannot_be_made_is_a_sentence(plain, text, tmp_path, monkeypatch):
    def refuse(**_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packing, "TemporaryDirectory", refuse)
    with pytest.raises(HalveError, match=r"failed \(Permission denied\): check the volume"):
        pack(plain, tmp_path / "packed", values="int4", calibration=text, **ASKED)


def test_matrices_that_are_on_no_grid_are_named(plain, text, tmp_path):
    prune(plain, tmp_path / "solved", values="int4", method="magnitude", skip="*.q_proj.*", calibration=text, **ASKED)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensor(tmp_path / "solved" / "model.safetensors", name, lambda weight: weight * 1.01)
    record = json.loads((tmp_path / "solved" / "halve.json").read_text())
    files = record["files"] | {"model.safetensors": sums(tmp_path / "solved")["model.safetensors"]}
    edit_json(tmp_path / "solved" / "halve.json", files=files)
    result = pack(tmp_path / "solved", tmp_path / "packed", values="int4")
    assert result.moved == (name,)
    assert 0 < result.error < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "c4"}, r"values is own: give int4 \(--values int4\), or leave calibration out"),
        ({"calibration": "c4", "values": "int8"}, "values is int8: give int4"),
        ({"samples": 4, "values": "int4"}, "calibration, which names no text"),
        ({"device": "cpu", "values": "int4", "forward_dtype": "float32"}, "nothing is solved for without calibration"),
        ({"calibration": "nowhere.txt", "values": "int4"}, r"nowhere\.txt"),
        ({"calibration": "c4", "values": "int4", "pattern": "1:4"}, r"are 2:4, not 1:4: leave the pattern out"),
        ({"calibration": "c4", "values": "int4", "work": "blocks"}, "for halve prune: leave them out"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused_before_anything_is_done(options, message, plain, tmp_path):
    there = beside(plain)
    with pytest.raises(InputError, match=message):
        pack(plain, tmp_path / "packed", **options)
    assert beside(plain) == there


def test_checkpoints_that_cannot_be_solved_for_are_refused(plain, text, tmp_path):
    shutil.copytree(plain, tmp_path / "unknown")
    (tmp_path / "unknown" / "halve.json").unlink()
    with pytest.raises(InputError, match=r"has no halve\.json, which says what was pruned"):
        pack(tmp_path / "unknown", tmp_path / "packed", values="int4", calibration=text)
    other = save(decoder("llama", vocab_size=320), tmp_path / "other")
    byte_bpe().save_pretrained(other)
    prune(other, tmp_path / "4of8", pattern="4:8", method="magnitude", refit="none")
    with pytest.raises(InputError, match="quantised at 2:4 alone, not at 4:8"):
        pack(tmp_path / "4of8", tmp_path / "packed", values="int4", calibration=text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="is not empty"):
        pack(plain, tmp_path / "full", values="int4", calibration=text)
    pack(plain, tmp_path / "packed")
    with pytest.raises(InputError, match="is a packed checkpoint"):
        pack(tmp_path / "packed", tmp_path / "again", values="int4", calibration=text)


@pytest.mark.parametrize("error", [CalibrationError("no"), KeyboardInterrupt()])
def test_a_run_that_stops_leaves_nothing(error, plain, text, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        if isinstance(error, CalibrationError):
            error.unfinished = tmp_path
        raise error

    there = beside(plain)
    monkeypatch.setattr(packing, "pack_checkpoint", fail)
    with pytest.raises(type(error)):
        pack(plain, tmp_path / "packed", values="int4", calibration=text, **ASKED)
    assert beside(plain) == there
    monkeypatch.setattr(packing, "prune_as", fail)
    with pytest.raises(type(error)):
        pack(plain, tmp_path / "packed", values="int4", calibration=text, **ASKED)
    assert beside(plain) == there
    assert getattr(error, "unfinished", None) is None


def test_values_of_a_run_are_its_refit(checkpoint, text, tmp_path):
    with pytest.raises(InputError, match="values int4 is the refit int4, and refit gd is given"):
        prune(checkpoint, tmp_path / "no", values="int4", refit="gd", calibration=text)
    with pytest.raises(InputError, match="only int4 is solved for"):
        prune(checkpoint, tmp_path / "no", values="int8", calibration=text)
    with pytest.raises(PatternError, match="refit int4 is for 2:4"):
        prune(checkpoint, tmp_path / "no", values="int4", pattern="4:8", calibration=text)
    done = prune(checkpoint, tmp_path / "out", values="int4", method="wanda", calibration=text, **ASKED)
    assert done.record["refit"] == "int4"
    assert prune(checkpoint, None, values="own", calibration=text, method="wanda", **ASKED).record["refit"] == "cg"


def test_a_matrix_that_no_input_reached_is_told_to_be_on_no_grid(tmp_path):
    settings = {"method": "magnitude", "fallback": "magnitude", "min_expert_tokens": 100}
    done = prune(decoder("mixtral"), tmp_path / "out", calibration=tokens(8), values="int4", **settings)
    loose = [each for each in done.report.fallbacks if "integer_gain" not in each.facts]
    assert loose
    (said,) = [warning for warning in done.report.warnings if "integers of 4 bits" in warning]
    assert said.startswith(f"{len(loose)} of {len(done.report.matrices)} matrices are no integers")
    assert loose[0].name in said
    assert said in json.loads((tmp_path / "out" / "halve.json").read_text())["warnings"]
    whole = prune(decoder("llama"), None, calibration=tokens(8), values="int4", method="magnitude")
    assert not [warning for warning in whole.report.warnings if "integers of 4 bits" in warning]
