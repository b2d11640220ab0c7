import math

import pytest

from halve.errors import InputError, PatternError
from halve.maths.pattern import Pattern
from halve.model.reconstruct import Reconstruction
from halve.run.settings import MIN_EXPERT_TOKENS, Settings, default_reconstruction
from halve.solve.objective import Objective


def settings(method="wanda", refit="none", pattern="2:4", **changes):
    return Settings(pattern=Pattern(pattern), method=method, refit=refit, **changes)


def test_the_defaults_leave_the_problem_as_it_is():
    asked = settings()
    assert asked.objective == Objective()
    assert asked.reconstruction is None
    assert asked.fallback is None
    assert asked.min_expert_tokens == MIN_EXPERT_TOKENS


@pytest.mark.parametrize(
    ("changes", "needs", "matches"),
    [
        ({}, False, False),
        ({"objective": Objective(shrinkage=0.5)}, False, False),
        ({"objective": Objective(match_dense=1e-3)}, True, True),
        ({"reconstruction": Reconstruction()}, True, False),
        ({"reconstruction": Reconstruction(), "objective": Objective(match_dense=1.0)}, True, True),
    ],
)
def test_who_looks_at_the_dense_model_needs_calibration(changes, needs, matches):
    assert settings(**changes).matches_dense is matches
    assert settings("auto").matches_dense
    assert settings("magnitude", **changes).needs_calibration is needs
    assert settings("magnitude", "cg", **changes).needs_calibration
    assert settings("wanda", **changes).needs_calibration


def test_options_not_given_are_at_their_defaults():
    asked = settings("auto", "cg", options={"effort": "fast"})
    assert asked.all_options["effort"] == "fast"
    assert asked.all_options["time_limit"] is None
    assert "refit_tolerance" in asked.all_options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_expert_tokens": 0}, "min_expert_tokens must be a whole number of at least 1, got 0"),
        ({"min_expert_tokens": 1.5}, r"min_expert_tokens must be .* got 1\.5"),
        ({"method": "wandda"}, "did you mean 'wanda'"),
        ({"refit": "sgd"}, "unknown refit 'sgd'"),
        ({"fallback": "alps"}, "fallback 'alps' is unknown"),
        ({"options": {"effort": "best"}}, "method wanda has no option 'effort'"),
        ({"method": "auto", "options": {"time_limit": 0}}, "time_limit of auto must be a finite number above 0, got 0"),
        ({"method": "auto", "options": {"time_limit": math.nan}}, "time_limit of auto must be"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)


def test_a_pattern_the_method_cannot_do_is_refused():
    with pytest.raises(PatternError, match="not to 50%"):
        settings("prox-admm", pattern="50%")


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("auto", {"effort": "best"}, "block"),
        ("auto", {"effort": "best", "time_limit": 3.0}, "block"),
        ("auto", {"effort": "balanced"}, "none"),
        ("auto", {}, "none"),
        ("wanda", {}, "none"),
    ],
)
def test_blocks_are_tuned_unasked_for_the_best_effort_alone(method, options, expected):
    assert default_reconstruction(method, options) == expected


@pytest.mark.parametrize(
    ("changes", "reorders"),
    [
        ({}, True),
        ({"options": {"effort": "best"}}, True),
        ({"options": {"effort": "fast"}}, False),
        ({"options": {"effort": "fast"}, "permute": "fold"}, True),
        ({"permute": "none"}, False),
        ({"pattern": "50%"}, False),
        ({"method": "sparsegpt"}, False),
        ({"method": "sparsegpt", "permute": "fold"}, True),
        ({"method": "magnitude", "refit": "none"}, False),
    ],
)
def test_auto_reorders_channels_where_that_can_gain(changes, reorders):
    asked = settings(**{"method": "auto", "refit": "cg", **changes})
    assert asked.reorders is reorders
    assert asked.as_followed.permute == ("fold" if reorders else "none")
    asked.check_objective()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magnitude", "objective": Objective("auto")}, "shrinkage acts on statistics, which magnitude with"),
        ({"objective": Objective(match_ridge=1.0)}, "match_ridge goes with targets from the dense model"),
        (
            {"method": "auto", "options": {"effort": "fast"}, "objective": Objective(match_ridge=1.0)},
            "match_ridge goes",
        ),
    ],
)
def test_an_objective_without_effect_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes).check_objective()
    for fine in ({"objective": Objective(0.5)}, {"method": "auto", "objective": Objective(match_ridge=1.0)}):
        settings(**fine).check_objective()
