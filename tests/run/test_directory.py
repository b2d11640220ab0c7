import json
import os

import pytest
import torch

from halve.checkpoint.directory import HOME, is_unfinished
from halve.errors import AlreadyCompleteError, CorruptFileError, HalveError, InputError, ResumeMismatchError
from halve.run.directory import open_run, recorded_call
from halve.run.manifest import hash_of
from halve.text.tokens import Cut, TokenSet, hash_ids

MARK = {"pattern": "2:4", "environment.threads": "2"}
CALL = {"model": "m", "pattern": "2:4"}
ASKED = {"source": "self", "samples": 2, "seq_len": 8, "seed": 0}
TENSORS = {"a.weight": torch.arange(8.0).reshape(2, 4), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


class StoppedError(Exception):
    """What ends a run in these tests."""


def token_set(source="self"):
    ids = torch.arange(16).reshape(2, 8)
    return TokenSet(ids, source, hash_ids(ids), 2, "</s>", "", "each", 1, Cut("halves", 5, 0, 1))


def begin(out, blocks=1, work=None, mark=MARK, source="self"):
    """Begin a run, finish some blocks, and stop."""
    with pytest.raises(StoppedError), open_run(out, work) as run:  # noqa: PT012
        run.begin(mark, CALL, token_set(source), ASKED)
        for index in range(blocks):
            run.commit({name: tensor + index for name, tensor in TENSORS.items()}, {"block": index})
        raise StoppedError


@pytest.mark.parametrize("elsewhere", [False, True])
def test_finished_blocks_come_back(tmp_path, elsewhere):
    out, work = tmp_path / "out", tmp_path / "work" if elsewhere else None
    begin(out, 2, work)
    assert is_unfinished(out)
    assert recorded_call(out) == CALL
    with open_run(out) as run:
        assert run.begun
        assert run.committed == 2
        assert run.state == (work or out / HOME)
        run.begin(MARK, None, None, {})
        tensors, record = run.read(1)
        assert record == {"block": 1}
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, TENSORS[name] + 1)
        kept = run.tokens(ASKED)
        assert kept == token_set()
        assert torch.equal(kept.ids, token_set().ids)
        assert (kept.bos, kept.lead, kept.cut) == ("each", 1, Cut("halves", 5, 0, 1))
        assert run.tokens({**ASKED, "seed": 1}) is None


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    begin(tmp_path / "new" / "out", 0, tmp_path / "work", source="text.txt")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "work").exists()


def test_a_run_that_was_begun_by_another_process_is_never_thrown_away(tmp_path):
    begin(tmp_path / "out", 1)
    with pytest.raises(ResumeMismatchError), open_run(tmp_path / "out") as run:
        run.begin({**MARK, "pattern": "1:4"}, CALL, None, {})
    with open_run(tmp_path / "out") as run:
        assert run.committed == 1


def test_a_difference_is_refused_field_by_field(tmp_path):
    begin(tmp_path / "out")
    message = r"begun differently \(environment.threads was 2 and is 1; pattern was 2:4 and is 1:4\): call as then"
    with open_run(tmp_path / "out") as run, pytest.raises(ResumeMismatchError, match=message):
        run.begin({"pattern": "1:4", "environment.threads": "1"}, CALL, None, {})


def test_a_second_process_is_kept_out(tmp_path):
    message = rf"is being written by another process \({os.getpid()}\)"
    with open_run(tmp_path / "out") as run:
        run.begin(MARK, CALL, None, {})
        with pytest.raises(InputError, match=message), open_run(tmp_path / "out"):
            pass
        run.commit(TENSORS, {})


def test_publishing_moves_every_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    begin(tmp_path / "out", 1, tmp_path / "work")
    moved = []
    with open_run(tmp_path / "out") as run:
        folder = run.prepare_staging()
        (folder / "sub").mkdir(parents=True)
        files = {}
        for name in ("config.json", "model.safetensors", "sub/x.jinja", "model.safetensors.index.json", "halve.json"):
            (folder / name).write_text(name, encoding="utf-8")
            files[name] = sha256(name)
        replace = type(folder).replace
        monkeypatch.setattr(
            type(folder),
            "replace",
            lambda path, target: (path.suffix != ".tmp" and moved.append(target.name), replace(path, target))[1],
        )
        run.publish(files)
    assert moved == ["halve.json", "model.safetensors", "x.jinja", "model.safetensors.index.json", "config.json"]
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(f"out/{name}" for name in files)
    assert not (tmp_path / "work").exists()
    assert (tmp_path / "out" / "sub" / "x.jinja").read_text(encoding="utf-8") == "sub/x.jinja"


def sha256(text):
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def test_a_file_that_changed_since_it_was_verified_is_not_published(tmp_path):
    with pytest.raises(CorruptFileError, match=r"model.safetensors was changed"), open_run(tmp_path / "out") as run:  # noqa: PT012
        run.begin(MARK, CALL, None, {})
        run.commit(TENSORS, {})
        folder = run.prepare_staging()
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text("x", encoding="utf-8")
        run.publish({"config.json": sha256("x"), "model.safetensors": sha256("y")})
    assert not (tmp_path / "out" / "config.json").exists()


def test_damage_is_named(tmp_path):
    begin(tmp_path / "out", 2)
    home = tmp_path / "out" / HOME
    manifest = (home / "run.json").read_text(encoding="utf-8")
    for bad in (
        manifest[:-3],
        manifest.replace("2:4", "1:4", 1),
        "{}",
        "[]",
        json.dumps({"sha256": "", "content": {}}),
        json.dumps({"sha256": "0", "content": []}),
        manifest.replace('"format": 3', '"format": 4'),
    ):
        (home / "run.json").write_text(bad, encoding="utf-8")
        with pytest.raises(CorruptFileError, match=r"run\.json"), open_run(tmp_path / "out"):
            pass
        assert len(list(home.glob("block-*"))) == 2
    (home / "run.json").write_text(manifest, encoding="utf-8")
    (home / "block-00001.safetensors").write_bytes(b"")
    with open_run(tmp_path / "out") as run:
        run.read(0)
        with pytest.raises(CorruptFileError, match=r"block-00001\.safetensors was changed"):
            run.read(1)


def test_the_damaged_field_is_named(tmp_path):
    begin(tmp_path / "out", 2)
    path = tmp_path / "out" / HOME / "run.json"
    content = json.loads(path.read_text(encoding="utf-8"))["content"]
    content["blocks"][1] = ["block-00001.safetensors"]
    path.write_text(json.dumps({"sha256": hash_of(content), "content": content}), encoding="utf-8")
    with pytest.raises(
        CorruptFileError, match=r"`content\.blocks\[1\]`: expected `array` of length 2, got 1; no finished"
    ):
        recorded_call(tmp_path / "out")


@pytest.mark.parametrize("damage", ["{}", '{"work": 3}', "[]", "{"])
def test_a_damaged_note_of_where_blocks_are_is_named(tmp_path, damage):
    begin(tmp_path / "out", 2, tmp_path / "work")
    (tmp_path / "out" / HOME / "work.json").write_text(damage)
    with pytest.raises(CorruptFileError, match=r"work\.json is "):
        recorded_call(tmp_path / "out")


def test_blocks_kept_elsewhere_that_are_gone_are_missed(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    begin(out, 2, work)
    work.rename(tmp_path / "moved")
    for call in (lambda: open_run(out).__enter__(), lambda: recorded_call(out)):
        with pytest.raises(CorruptFileError, match="is missing: mount or restore it"):
            call()
    (tmp_path / "moved").rename(work)
    with open_run(out) as run:
        assert run.committed == 2
    (work / "run.json").unlink()
    with pytest.raises(CorruptFileError, match=r"run\.json, which names the finished blocks .* is missing"):
        recorded_call(out)
    assert (work / "block-00001.safetensors").exists()


def test_a_finished_checkpoint_and_another_place_for_blocks_are_told(tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.json").touch()
    with pytest.raises(AlreadyCompleteError, match="holds a finished checkpoint: nothing is left to do"):
        recorded_call(tmp_path / "done")
    begin(tmp_path / "out")
    with pytest.raises(InputError, match=r"keeps its blocks there, not in .*: leave work out"):
        open_run(tmp_path / "out", tmp_path / "work").__enter__()
    assert not (tmp_path / "work").exists()


def test_a_fallback_may_be_added_but_not_changed(tmp_path):
    begin(tmp_path / "out")
    for fallback in ("wanda", "wanda"):
        with open_run(tmp_path / "out") as run:
            run.begin(MARK, {"asked": fallback}, None, {}, fallback)
        assert recorded_call(tmp_path / "out") == {"asked": "wanda"}  # the call that goes on repeats it
    for other in (None, "magnitude"):
        with open_run(tmp_path / "out") as run, pytest.raises(ResumeMismatchError, match="fallback was wanda and is"):
            run.begin(MARK, None, None, {}, other)


def test_text_that_the_model_wrote_is_worth_keeping(tmp_path):
    begin(tmp_path / "out", 0)
    assert is_unfinished(tmp_path / "out")
    with open_run(tmp_path / "out") as run:
        assert (run.committed, run.worth_keeping) == (0, True)
        assert run.tokens(ASKED) == token_set()


def test_directories_that_are_not_a_runs_are_refused(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="is not empty"), open_run(tmp_path / "used"):
        pass
    assert sorted(os.listdir(tmp_path / "used")) == ["thesis.txt"]  # noqa: PTH208
    with pytest.raises(InputError, match=r"thesis\.txt is a file: give"), open_run(tmp_path / "used" / "thesis.txt"):
        pass
    begin(tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds thesis\.txt"), open_run(tmp_path / "out"):
        pass
    assert is_unfinished(tmp_path / "out")
    with pytest.raises(InputError, match="is not an empty directory"), open_run(tmp_path / "b", tmp_path / "used"):
        pass
    assert not (tmp_path / "b").exists()
    begin(tmp_path / "c", 1, tmp_path / "work")
    with pytest.raises(InputError, match="keeps its blocks in"), open_run(tmp_path / "c", tmp_path / "other"):
        pass


def test_what_cannot_be_resumed_says_why(tmp_path):
    with pytest.raises(InputError, match="holds no unfinished run"):
        recorded_call(tmp_path)
    (tmp_path / "early" / HOME).mkdir(parents=True)
    with pytest.raises(InputError, match="stopped before anything was kept"):
        recorded_call(tmp_path / "early")
    with pytest.raises(StoppedError), open_run(tmp_path / "memory") as run:  # noqa: PT012
        run.begin(MARK, None, None, {})
        run.commit(TENSORS, {})
        raise StoppedError
    with pytest.raises(InputError, match="model or data in memory"):
        recorded_call(tmp_path / "memory")


def test_a_full_disk_is_a_sentence_and_loses_only_the_block(tmp_path, monkeypatch):
    from halve.checkpoint import durable

    begin(tmp_path / "out", 1)

    def full(_file, _chunk):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "_append", full)
    with open_run(tmp_path / "out") as run:
        with pytest.raises(HalveError, match="free some space and call again"):
            run.commit(TENSORS, {})
        assert run.committed == 1
    monkeypatch.undo()
    with open_run(tmp_path / "out") as run:
        run.commit(TENSORS, {"block": "again"})
        assert run.read(1)[1] == {"block": "again"}
