import pytest

from halve.errors import InputError, PatternError
from halve.solve.defaults import Defaults
from halve.solve.methods import METHODS
from halve.solve.settings import effective_options, method_defaults, validate_settings


def test_settings_can_be_checked_alone():
    validate_settings("sparsegpt", "gd", "50%", fallback="wanda", damping=0.1, refit_steps=5)
    with pytest.raises(PatternError, match="not to 50%"):
        validate_settings("prox-gradient", "cg", "50%")
    with pytest.raises(InputError, match="no option 'refit_steps'"):
        validate_settings("wanda", "cg", "2:4", refit_steps=5)
    with pytest.raises(InputError, match="fallback 'x' is unknown"):
        validate_settings("wanda", "cg", "2:4", fallback="x")


def test_options_that_were_not_given_are_at_their_defaults():
    assert effective_options("wanda", "cg") == {"refit_tolerance": 1e-4, "refit_max_iterations": 500}
    assert effective_options("sparsegpt", "gd", damping=0.1)["damping"] == 0.1
    assert effective_options("auto", "cg", effort="fast")["refit_tolerance"] == 1e-2
    assert effective_options("auto", "cg", effort="fast", refit_tolerance=1e-3)["refit_tolerance"] == 1e-3
    assert effective_options("auto", "swap", effort="fast")["refit_tolerance"] == 1e-5
    assert effective_options("auto", "cg")["refit_tolerance"] == 1e-4


def test_what_goes_with_a_method_where_nothing_is_said():
    assert method_defaults("auto", {"effort": "fast"}) == Defaults(True, 0.0, False, False, 1e-2)
    assert method_defaults("auto", {"refit_tolerance": 1.0}) == Defaults(True, 0.25, False, True, None)
    assert method_defaults("auto", {"effort": "best"}) == Defaults(True, 0.25, True, True, None)
    assert {method_defaults(name, {}) for name in METHODS if name != "auto"} == {Defaults()}
    with pytest.raises(InputError, match="effort must be one of"):
        method_defaults("auto", {"effort": "great"})
    with pytest.raises(InputError, match=r"belongs to the objective: write objective=halve\.Objective\(shrinkage=…\)"):
        method_defaults("auto", {"shrinkage": 0.1})
