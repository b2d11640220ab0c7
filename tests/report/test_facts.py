import json

import pytest

from halve.errors import CorruptFileError, InputError
from halve.report.facts import read_run
from reported import fallen_back, write_record


def test_a_record_is_read(tmp_path):
    score = {"source": "a/wiki.txt", "seq_len": 16, "windows": 2, "dtype": "float32", "tokens_sha256": "ee"}
    measured = {
        "seconds": {"load": 1.0, "solve": 2.0, "verify": 4.0},
        "peak_memory": {"solve": 5_000_000_000},
        "matrix_seconds": {"model.layers.0.mlp.down_proj.weight": 0.5},
        "resumed_blocks": 2,
        "finished": "2026-01-02T03:04:05Z",
        "perplexity": [score | {"before": 10.0, "after": 12.0}],
    }
    run = read_run(write_record(tmp_path, measured=measured))
    assert (run.model_name, run.pattern, run.method, run.mean_loss) == ("small.gguf", "2:4", "wanda+cg", 0.205)
    assert [matrix.name for matrix in run.worst[:2]] == [
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
    ]
    assert len(run.worst) == 5
    assert run.kinds == ("self_attn.q_proj", "mlp.down_proj")
    assert run.kept() == (3, 6, 87)
    assert run.kept("mlp.down_proj") == (3, 3, 42)
    assert run.weights == 6 * 32
    assert run.seconds_of_pruning == 2.0
    assert [matrix.seconds for matrix in run.matrices][:2] == [None, 0.5]
    assert (run.matrices[0].tokens, run.matrices[0].iterations, run.matrices[0].loss_before_refit) == (64, 7, 0.12)
    (text,) = run.perplexity
    assert (text.title, text.before, text.after) == ("wiki.txt", 10.0, 12.0)
    assert text.measured_as == "2 windows of 16 tokens, float32"
    assert run.excluded == {"outside the blocks": 1}
    assert run.settings["refit_tolerance"] == "0.0001"
    assert run.settings["objective.match_dense"] == "0.0"
    assert run.settings["skip"] == run.settings["fallback"] == "—"


def test_the_method_is_named_with_what_followed_it(tmp_path):
    tuning = {"epochs": 6, "learning_rate": None, "held_out": 0.125}
    run = read_run(write_record(tmp_path, refit="none", reconstruction=tuning))
    assert run.method == "wanda+block"
    assert run.settings["reconstruction.learning_rate"] == "—"


def test_without_measurements_there_are_no_times(tmp_path):
    run = read_run(write_record(tmp_path))
    assert run.seconds == {}
    assert run.seconds_of_pruning is None
    assert run.perplexity == ()


def test_fallbacks_are_found(tmp_path):
    run = read_run(write_record(tmp_path, **fallen_back(write_record(tmp_path))))
    assert [matrix.name for matrix in run.fallbacks] == ["model.layers.1.mlp.down_proj.weight"]


def test_a_directory_without_a_record_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no halve\.json: give a checkpoint"):
        read_run(tmp_path)


def test_an_unfinished_run_is_told_as_such(tmp_path):
    (tmp_path / ".halve").mkdir()
    with pytest.raises(InputError, match="holds an unfinished run: complete it with `halve resume"):
        read_run(tmp_path)


def broken(matrix):
    return {"matrices": [matrix]}


def sound(**changes):
    given = {"name": "x", "tensors": [], "facts": {}, "shape": [1, 2], "method": "", "status": "ok", "reason": ""}
    return broken(given | changes)


@pytest.mark.parametrize(
    "damage",
    [
        {"matrices": None},
        {"matrices": ["x"]},
        broken({"name": "x"}),
        sound(shape=[1]),
        sound(status="splendid"),
        sound(facts={"relative_loss": "low"}),
        {"objective": None},
        {"source": "x"},
        {"blocks": [{"name": "x"}]},
        {"environment": ["x"]},
        {"mean_relative_loss": "low"},
        {"mean_relative_loss": float("nan")},
        {"format": 99},
        {"objective": {}},
        sound(facts={"relative_loss": float("nan")}),
        sound(facts={"relative_loss": 10**400}),
        sound(facts={"tokens": float("inf")}),
        sound(kept_per_group=[0, 0, 0]),
        sound(kept_per_group=[-1, 0, 3]),
        {"blocks": [{"name": "x", "error_before": float("inf"), "error_after": 1.0, "epoch": 1}]},
    ],
)
def test_a_damaged_record_is_told(tmp_path, damage):
    with pytest.raises(CorruptFileError, match=r"halve\.json is not as Halve writes it"):
        read_run(write_record(tmp_path, **damage))


def test_the_record_that_is_damaged_above_is_sound_without_the_damage(tmp_path):
    assert len(read_run(write_record(tmp_path, **sound())).matrices) == 1


def test_the_field_is_named(tmp_path):
    matrices = json.loads((write_record(tmp_path) / "halve.json").read_text())["matrices"]
    matrices[3]["shape"] = [4, "8"]
    with pytest.raises(CorruptFileError, match=r"`matrices\[3\]\.shape\[1\]`: expected `int`, got `str`; restore it"):
        read_run(write_record(tmp_path, matrices=matrices))


def test_a_record_of_before_some_fields_were_added_is_read(tmp_path):
    record = json.loads((write_record(tmp_path) / "halve.json").read_text())
    assert "only_where_faster" not in record
    del record["files"]
    for matrix in record["matrices"]:
        del matrix["kept_per_group"], matrix["mask_sha256"]
    (tmp_path / "halve.json").write_text(json.dumps(record))
    run = read_run(tmp_path)
    assert (run.kept(), run.files, len(run.matrices)) == ((), {}, 6)


def test_counts_of_different_lengths_are_damage(tmp_path):
    matrices = json.loads((write_record(tmp_path) / "halve.json").read_text())["matrices"]
    matrices[0]["kept_per_group"] = [1, 2]
    with pytest.raises(CorruptFileError, match="different lengths"):
        read_run(write_record(tmp_path, matrices=matrices))


def test_a_perplexity_that_overflowed_is_infinite_and_not_unmeasured(tmp_path):
    score = {"source": "x", "seq_len": 16, "windows": 2, "dtype": "float32", "tokens_sha256": "ee"}
    entry = score | {"before": None, "after": None, "after_nll": 1000.0}
    (text,) = read_run(write_record(tmp_path, measured={"perplexity": [entry]})).perplexity
    assert (text.before, text.after) == (None, float("inf"))
