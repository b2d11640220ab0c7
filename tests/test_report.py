import json
import math

from halve.objective import Objective
from halve.outcome import Status
from halve.pattern import Pattern
from halve.report import environment, finite, settings_json, to_json
from halve.run_report import MatrixReport, RunReport
from halve.settings import Settings


def record(facts, objective):
    matrix = MatrixReport("a", "a", None, (4, 8), "out_in", "wanda", "wanda", "cg", Status.OK, "", facts)
    asked = Settings(Pattern("2:4"), "wanda", "cg", objective=objective)
    report = RunReport((matrix,), (), 1, {"solve": 1.0})
    return to_json(report, asked, {}, {}, source={}, calibration={}, device="cpu", precision="float32")


def test_what_is_not_finite_is_null_and_no_time_is_told():
    assert (finite(0.5), finite(math.nan), finite(-math.inf)) == (0.5, None, None)
    found = record({"relative_loss": math.nan, "seconds": 3.0, "tokens": 5.0}, Objective())
    assert found["mean_relative_loss"] is None
    assert found["matrices"][0]["facts"] == {"relative_loss": None, "tokens": 5.0}
    assert "seconds" not in json.dumps(found, allow_nan=False)


def test_the_objective_is_told_as_it_was_followed():
    asked = Objective(match_dense=0.5)
    assert record({"match_dense": 0.5}, asked)["objective"] == {
        "shrinkage": 0.0,
        "match_dense": 0.5,
        "match_ridge": 0.1,
    }
    assert record({}, asked)["objective"]["match_dense"] == 0.0  # nothing could be paired
    assert settings_json(Settings(Pattern("2:4"), "auto", "cg"))["objective"]["shrinkage"] == "auto"


def test_the_environment_names_what_can_change_a_result():
    assert {"halve", "torch", "cpu_capability", "threads", "prox_kernel"} <= environment().keys()
