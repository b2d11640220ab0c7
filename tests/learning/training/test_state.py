"""A training's files: what counts as a state, and what becomes of the rest."""

import json

import pytest
import torch

from halve.errors import AlreadyCompleteError, CorruptFileError, InputError, ResumeMismatchError
from halve.learning.training.state import MARK, TrainingFiles, open_training, recorded_training

MARKED = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def files(tmp_path):
    with open_training(tmp_path / "out") as found:
        found.begin({"seed": "1"}, {"command": "finetune"})
        yield found


def state(files, step, *, mark=True):
    place = files.home / f"checkpoint-{step}"
    place.mkdir()
    files.write_trained(place, MARKED, {"mask": torch.ones(3, dtype=torch.bool)})
    (place / "optimizer.pt").write_bytes(b"moments")
    if mark:
        files.mark(place)
    return place


def test_the_newest_whole_state_counts_and_the_others_go(files):
    first = state(files, 2)
    second = state(files, 10)
    assert not first.exists()
    third = state(files, 12, mark=False)
    assert files.newest() == second
    assert not third.exists()


def test_without_a_mark_there_is_no_state(files):
    place = state(files, 2, mark=False)
    assert files.newest() is None
    assert not place.exists()


def test_who_does_not_write_removes_nothing(files):
    place = state(files, 2, mark=False)
    assert TrainingFiles(files.out, writes=False).newest() is None
    assert place.exists()


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content + b"x", None])
def test_a_damaged_state_is_refused_by_name(files, name, damage):
    place = state(files, 2)
    if damage is None:
        (place / name).unlink()
    else:
        (place / name).write_bytes(damage((place / name).read_bytes()))
    with pytest.raises(CorruptFileError, match=name):
        files.newest()


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', '{"files": {}, "more": 1}'])
def test_a_damaged_mark_is_refused_by_name(files, content):
    place = state(files, 2)
    (place / MARK).write_text(content)
    if content.endswith("1}"):
        assert files.newest() == place
    else:
        with pytest.raises(CorruptFileError, match=MARK):
            files.newest()


def test_tensors_come_back_as_they_were(files):
    place = state(files, 2)
    target = {name: torch.zeros_like(value) for name, value in MARKED.items()}
    own = files.read_trained(place, target)
    assert all(torch.equal(target[name], MARKED[name]) for name in MARKED)
    assert own["mask"].dtype == torch.bool
    with pytest.raises(CorruptFileError, match="other parameters"):
        files.read_trained(place, {"a": target["a"]})


def test_the_best_weights_stay_as_long_as_a_state_needs_them(files):
    files.write_best(2, MARKED, {})
    files.write_best(4, MARKED, {}, needed=2)
    files.write_best(6, MARKED, {}, needed=2)
    assert {path.stem for path in files.home.glob("best-*")} == {"best-2", "best-6"}
    files.read_best(2, {name: torch.zeros_like(value) for name, value in MARKED.items()})
    with pytest.raises(CorruptFileError, match=r"best-4\.json is missing"):
        files.read_best(4, MARKED)
    (files.home / "best-6.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError, match=r"best-6\.safetensors was changed"):
        files.read_best(6, MARKED)


def test_another_training_is_refused_by_the_field_that_differs(files):
    files.compare({"seed": "1"})
    with pytest.raises(ResumeMismatchError, match="seed was 1 and is 2, and 1 more differ"):
        files.compare({"seed": "2", "text": "new"})
    files.keep_fact("rates", [[0.1, None]])
    again = TrainingFiles(files.out)
    assert again.fact("rates") == [[0.1, None]]
    assert again.fact("other") is None
    assert again.call == {"command": "finetune"}


def test_nothing_stays_of_a_training_that_was_not_begun(tmp_path):
    with pytest.raises(InputError, match="why"), open_training(tmp_path / "a" / "out"):
        raise InputError("why")
    assert not (tmp_path / "a").exists()


def test_what_lies_there_without_a_manifest_is_not_taken_for_a_state(tmp_path):
    with open_training(tmp_path) as files:
        state(files, 2)
        files.write_best(2, MARKED, {})
        files.begin({}, None)
        assert files.newest() is None
        assert not list(files.home.glob("best-*"))
    with pytest.raises(InputError, match="was given a model in memory"):
        recorded_training(tmp_path)


def test_two_processes_are_kept_apart_and_other_runs_are_named(files, tmp_path):
    with pytest.raises(InputError, match="is being written by another process"), open_training(files.out):
        pass
    for name in ("run.json", "work.json", "block-00000.safetensors"):
        home = tmp_path / name / ".halve"
        home.mkdir(parents=True)
        (home / name).write_text("{}")
        with pytest.raises(InputError, match="unfinished run of halve prune"), open_training(tmp_path / name):
            pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(InputError, match="is not empty"), open_training(tmp_path / "full"):
        pass


def test_a_training_that_was_stopped_while_it_was_cleared_away_is_complete(tmp_path):
    with open_training(tmp_path) as files:
        files.begin({}, {})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".halve" / "training.json").unlink()
    with pytest.raises(AlreadyCompleteError, match="nothing is left to do"):
        recorded_training(tmp_path)
    assert not (tmp_path / ".halve").exists()
    with pytest.raises(AlreadyCompleteError, match="nothing is left to do"):
        recorded_training(tmp_path)


def test_a_text_that_was_kept_before_the_beginning_is_said(tmp_path):
    (tmp_path / ".halve").mkdir()
    (tmp_path / ".halve" / "text.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="was stopped before it began; its text is kept"):
        recorded_training(tmp_path)
    (tmp_path / ".halve" / "text.safetensors").unlink()
    assert recorded_training(tmp_path) is None


def test_a_manifest_is_checked(tmp_path):
    with open_training(tmp_path) as files:
        files.begin({}, {})
    (tmp_path / ".halve" / "training.json").write_text(json.dumps({"fingerprint": 3}))
    with pytest.raises(CorruptFileError, match=r"training\.json"):
        TrainingFiles(tmp_path)
