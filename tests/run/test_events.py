from dataclasses import replace

import pytest

from halve.model.reconstruct import Tuned
from halve.run.events import BlockReport, RunReport
from halve.solve.outcome import Status
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
