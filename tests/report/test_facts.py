import json

import pytest

from halve.errors import CorruptFileError, InputError
from halve.report.facts import read_run
from halve.report.training_facts import MOST_POINTS
from reported import fallen_back, training_entry, write_record


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


def nested(depth):
    """Return a value so deep in lists and objects that Python's own parser just takes it."""
    value = "x"
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


@pytest.mark.parametrize(
    "damage",
    [
        {"options": {"o": nested(600)}},
        {"calibration": {"o": nested(600)}},
        {"environment": {"o": nested(600)}},
        {"trainings": [training_entry(options={"o": nested(600)})]},
        {"trainings": [training_entry(environment={"o": nested(600)})]},
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


def test_trainings_are_read_in_order(tmp_path):
    second = training_entry(trained="norms", teacher=None, started_from=None, tokens=512)
    run = read_run(write_record(tmp_path, trainings=[training_entry(), second]))
    first, last = run.trainings
    assert (first.teacher, first.started_from, last.teacher, last.started_from) == ("org/small", "small-2of4", "", "")
    assert (first.teacher_name, first.trained, last.trained) == ("small", "all", "norms")
    assert [(point.step, point.loss) for point in first.losses] == [(1, 1.25), (2, 1.0), (4, 0.5)]
    assert [(point.step, point.kl, point.perplexity) for point in first.held_out] == [
        (0, 1.5, 40.0),
        (2, 0.75, 30.0),
        (4, 0.875, 31.0),
    ]
    assert first.rates_tried == {"0.0001": 2.5, "0.0003": 2.25, "0.001": None}
    assert first.settings == {
        "ce_share": "0.0",
        "schedule.batch_tokens": "64",
        "schedule.warmup": "0.05",
        "text.data": "a.txt",
    }
    (score,) = first.scores
    assert (score.title, score.before, score.after, score.difference) == ("wiki.txt", 60.0, 45.0, "-0.2877 ± 0.0100")
    assert run.tokens_trained_on == 768
    assert not run.masks_were_learned


def test_a_record_of_before_there_were_trainings_has_none(tmp_path):
    run = read_run(write_record(tmp_path))
    assert (run.trainings, run.tokens_trained_on, run.method) == ((), 0, "wanda+cg")


@pytest.mark.parametrize(
    ("kinds", "method"),
    [
        ([("finetune", "fixed mask")], "wanda+cg, fine-tuned"),
        ([("finetune", "fixed mask")] * 3, "wanda+cg, fine-tuned 3 times"),
        ([("learn", "ast"), ("finetune", "fixed mask")], "wanda+cg, masks by ast, fine-tuned"),
        ([("learn", "wanda+cg"), ("finetune", "fixed mask")], "wanda+cg, fine-tuned"),  # the record is of that training
    ],
)
def test_trainings_are_in_the_name_of_the_method(tmp_path, kinds, method):
    trainings = [training_entry(kind=kind, method=name) for kind, name in kinds]
    run = read_run(write_record(tmp_path, trainings=trainings))
    assert run.method == method
    assert run.masks_were_learned == (kinds[0][0] == "learn")


def test_the_dense_perplexity_is_that_of_the_same_tokens(tmp_path):
    known = {"source": "texts/wiki.txt", "seq_len": 16, "windows": 2, "tokens_sha256": "ee", "before": 30.0}
    run = read_run(write_record(tmp_path, trainings=[training_entry()], measured={"perplexity": [known]}))
    (score,) = run.trainings[0].scores
    assert run.dense_perplexity(score) == 30.0
    for other in ({"tokens_sha256": "ff"}, {"seq_len": 32}, {"windows": 1}, {"source": "c4"}, {"before": None}):
        write_record(tmp_path, trainings=[training_entry()], measured={"perplexity": [known | other]})
        assert read_run(tmp_path).dense_perplexity(score) is None


def test_a_trained_perplexity_that_overflowed_is_infinite(tmp_path):
    score = training_entry()["perplexity"][0] | {"before": None, "before_nll": 900.0}
    (found,) = read_run(write_record(tmp_path, trainings=[training_entry(perplexity=[score])])).trainings[0].scores
    assert (found.before, found.after) == (float("inf"), 45.0)


def test_a_text_that_was_trained_on_and_measured_is_told(tmp_path):
    text = training_entry()["text"] | {"sources": {"texts/wiki.txt": 256, "self": 0}}
    run = read_run(write_record(tmp_path, trainings=[training_entry(text=text)]))
    assert run.cautions == ("texts/wiki.txt is both trained on and evaluated on: perplexities on it flatter.",)
    assert read_run(write_record(tmp_path, trainings=[training_entry()])).cautions == ()


def text_of(**changes):
    return training_entry(text=training_entry()["text"] | changes)


def point_of(**changes):
    return training_entry(curve=[{"step": 1, "tokens": 2} | changes])


def score_of(**changes):
    return training_entry(perplexity=[training_entry()["perplexity"][0] | changes])


@pytest.mark.parametrize(
    "trainings",
    [
        None,
        {"a": 1},
        ["x"],
        [[]],
        [{}],
        [training_entry(kind="guess")],
        [training_entry(method=7)],
        [training_entry(teacher="org/small")],
        [training_entry(teacher={"kind": "moon", "name": "x"})],
        [training_entry(started_from={})],
        [training_entry(options=[])],
        [training_entry(text="c4")],
        [text_of(sources=["c4"])],
        [text_of(sources={"c4": -1})],
        [text_of(sequences=1.5)],
        [text_of(seq_len=10**400)],
        [text_of(notes="one")],
        [training_entry(learning_rate=None)],
        [training_entry(learning_rate=float("nan"))],
        [training_entry(learning_rate=float("inf"))],
        [training_entry(rates_tried={"x": "y"})],
        [training_entry(rates_tried={"x": float("nan")})],
        [training_entry(steps=-1)],
        [training_entry(best_step=True)],
        [training_entry(tokens=10**18)],
        [training_entry(tensors="model.norm.weight")],
        [training_entry(curve={})],
        [training_entry(curve=[1])],
        [training_entry(curve=[{"step": 1}])],
        [point_of(loss="low")],
        [point_of(loss=float("nan"))],
        [point_of(kl=float("-inf"))],
        [point_of(perplexity=10**400)],
        [point_of(learning_rate=1e300)],
        [point_of(step=-1)],
        [score_of(before="low")],
        [score_of(after=float("nan"))],
        [score_of(log_difference=float("inf"))],
        [score_of(log_difference_stderr=1e300)],
        [score_of(windows=-2)],
        [score_of(source=None)],
        [training_entry(environment=[])],
        [training_entry(), training_entry(steps="4")],
    ],
)
def test_a_damaged_training_is_told_in_one_sentence(tmp_path, trainings):
    with pytest.raises(CorruptFileError, match=r"halve\.json is not as Halve writes it") as caught:
        read_run(write_record(tmp_path, trainings=trainings))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_training_that_was_damaged_above_is_sound_without_the_damage(tmp_path):
    for sound in (training_entry(), text_of(), point_of(), point_of(loss=None), score_of()):
        assert len(read_run(write_record(tmp_path, trainings=[sound])).trainings) == 1


def test_a_curve_of_very_many_points_is_thinned_and_keeps_its_end(tmp_path):
    curve = [{"step": step, "tokens": 8 * step, "loss": 1.0 + step} for step in range(100_000)]
    curve += [{"step": step, "tokens": 8 * step, "kl": 2.0 + step} for step in range(2500)]
    (training,) = read_run(write_record(tmp_path, trainings=[training_entry(curve=curve)])).trainings
    assert len(training.losses) == MOST_POINTS
    assert (training.losses[0].step, training.losses[-1].step) == (99, 99_999)
    assert [point.step for point in training.held_out[-3:]] == [2493, 2496, 2499]
    assert len(training.held_out) == 834
