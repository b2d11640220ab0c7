from halve.outcome import Status
from halve.reconstruct import Tuned
from halve.run_report import BlockReport, MatrixReport, RunReport


def matrix(name, status=Status.OK, tokens=100.0, reason=""):
    facts = {"relative_loss": 0.25, "tokens": tokens}
    return MatrixReport(name, name, None, (4, 64), "out_in", "wanda", "wanda", "cg", status, reason, facts)


def report(matrices, blocks=()):
    return RunReport(tuple(matrices), (), 2, {}, tuple(blocks))


def test_warnings_name_what_went_otherwise():
    warnings = report(
        [
            matrix("a"),
            matrix("thin", tokens=8.0),
            matrix("slow", Status.MAX_ITER),
            matrix("fallen", Status.FELL_BACK, reason="no luck"),
        ],
        [
            BlockReport("b0", ("a",), Tuned(0.2, 0.1, 3, 1e-3, 9, 1)),
            BlockReport("b1", (), Tuned(0.2, 0.2, 0, None, 9, 1)),
        ],
    ).warnings
    assert len(warnings) == 4
    assert "1 of 4 matrices saw fewer calibration tokens" in warnings[0]
    assert "slow" in warnings[1]
    assert "fallen: no luck" in warnings[2]
    assert "1 of 2 blocks gained nothing on held-out batches and was undone (the first is b1)" in warnings[3]


def test_what_changed():
    done = report([matrix("a"), matrix("b")], [BlockReport("b0", ("a", "norm"), Tuned(0.2, 0.1, 3, 1e-3, 9, 1))])
    assert done.changed == {"a", "b", "norm"}
    assert done.mean_relative_loss == 0.25
    assert done.warnings == ()
