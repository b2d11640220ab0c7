import pytest

from halve.checks import check_count, check_not_negative, check_positive, is_number
from halve.errors import InputError


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "1", None, True])
def test_what_is_not_positive_is_refused_by_name(value):
    with pytest.raises(InputError, match="rho of alps must be a finite number above 0, got"):
        check_positive("rho of alps", value)


def test_bounds():
    check_positive("x", 1e-30)
    check_positive("x", 2, above=1.0)
    check_not_negative("x", 0)
    check_count("x", 1)
    with pytest.raises(InputError, match="x must be a finite number above 1, got 1"):
        check_positive("x", 1, above=1.0)
    for value in (-1e-9, float("inf"), "0", False):
        with pytest.raises(InputError, match="x must be a finite number of at least 0"):
            check_not_negative("x", value)
    for value in (0, 1.0, True, "3"):
        with pytest.raises(InputError, match="x must be a whole number of at least 1"):
            check_count("x", value)
    check_count("x", 0, least=0)
    with pytest.raises(InputError, match="x must be a whole number of at least 0, got -1"):
        check_count("x", -1, least=0)


def test_numbers():
    assert is_number(1)
    assert is_number(0.5)
    assert not is_number(True)
    assert not is_number("1")
