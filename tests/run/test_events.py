import json
from dataclasses import replace

import pytest

from halve.checkpoint.directory import HOME
from halve.model.reconstruct import Tuned
from halve.pruning import prune
from halve.run.events import LOG, BlockReport, Progress, RunLog, RunReport
from halve.solve.outcome import Status
from models import decoder, tokens
from reported import matrix_report


def matrix(name, status=Status.OK, tokens=100.0, reason=""):
    facts = {"relative_loss": 0.25, "tokens": tokens}
    return matrix_report(name, facts, shape=(4, 64), status=status, reason=reason)


def report(matrices, blocks=()):
    return RunReport(matrices=tuple(matrices), excluded=(), blocks=2, seconds={}, reconstructions=tuple(blocks))


def test_warnings_name_what_went_otherwise():
    warnings = report(
        [
            matrix("a"),
            matrix("thin", tokens=8.0),
            matrix("slow", Status.MAX_ITER),
            matrix("fallen", Status.FELL_BACK, reason="no luck"),
        ],
        [
            BlockReport("b0", ("a",), Tuned(before=0.2, after=0.1, epoch=3, learning_rate=1e-3, steps=9, held_out=1)),
            BlockReport("b1", (), Tuned(before=0.2, after=0.2, epoch=0, learning_rate=None, steps=9, held_out=1)),
        ],
    ).warnings
    assert len(warnings) == 4
    assert "1 of 4 matrices saw fewer calibration tokens" in warnings[0]
    assert "slow" in warnings[1]
    assert "fallen: no luck" in warnings[2]
    assert "1 of 2 blocks gained nothing on held-out batches and was undone (the first is b1)" in warnings[3]


@pytest.mark.parametrize(("limit", "seconds", "warned"), [(None, 9.0, 0), (5.0, 2.6, 0), (5.0, 3.0, 1)])
def test_a_time_limit_that_was_not_kept_is_told(limit, seconds, warned):
    each = [replace(matrix(name), facts={"tokens": 100.0, "seconds": seconds}) for name in "ab"]
    warnings = replace(report(each), time_limit=limit).warnings
    assert len(warnings) == warned
    assert all("solving took 6 s, more than the time limit of 5 s" in warning for warning in warnings)


def test_what_is_around_pruning_does_not_count_as_pruning():
    around = {"load": 32.0, "evaluate": 64.0, "calibrate": 128.0, "commit": 4.0, "write": 8.0, "verify": 16.0}
    done = replace(report([]), seconds={"capture": 1.0, "solve": 2.0, **around})
    assert done.seconds_of_pruning == 3.0


def test_what_changed():
    done = report(
        [matrix("a"), matrix("b")],
        [
            BlockReport(
                "b0", ("a", "norm"), Tuned(before=0.2, after=0.1, epoch=3, learning_rate=1e-3, steps=9, held_out=1)
            )
        ],
    )
    assert done.changed == {"a", "b", "norm"}
    assert done.mean_relative_loss == 0.25
    assert done.warnings == ()


def test_a_line_a_step_with_time_and_memory(tmp_path):
    matrix = matrix_report("a", {"relative_loss": 0.25})
    RunLog(tmp_path)(Progress(0, 2, "collect", 0, 3))
    RunLog(tmp_path)(Progress(1, 2, "solve", 1, 3, matrix))
    first, second = (json.loads(line) for line in (tmp_path / LOG).read_text().splitlines())
    assert (first["phase"], first["block"], first["matrix"]) == ("collect", 0, None)
    assert (second["phase"], second["block"], second["matrix"], second["relative_loss"]) == ("solve", 1, "a", 0.25)
    assert second["peak_memory_gb"] >= first["peak_memory_gb"] > 0.01
    assert second["time"].endswith("Z")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    RunLog(tmp_path / "absent")(Progress(0, 2, "collect", 0, 3))
    assert not (tmp_path / "absent").exists()


def test_a_stopped_run_says_where_it_was_and_a_finished_one_leaves_no_log(tmp_path):
    def stop(step):
        if step.matrix is not None and step.matrix.name.endswith("layers.1.self_attn.o_proj.weight"):
            raise KeyboardInterrupt

    arguments = {"calibration": tokens(4), "method": "wanda"}
    with pytest.raises(KeyboardInterrupt):
        prune(decoder("llama"), tmp_path / "out", listen=stop, **arguments)
    last = json.loads((tmp_path / "out" / HOME / LOG).read_text().splitlines()[-1])
    assert (last["phase"], last["matrix"]) == ("solve", "model.layers.1.self_attn.o_proj.weight")
    prune(decoder("llama"), tmp_path / "out", **arguments)
    assert not list((tmp_path / "out").rglob(LOG))
