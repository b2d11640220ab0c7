import pytest

from halve.errors import (
    CorruptFileError,
    HalveError,
    InputError,
    UnreadableFileError,
    counted,
    first_few,
    noting,
    one_line,
)


@pytest.mark.parametrize(
    ("names", "said"), [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (list("abcde"), "a, b, c and 2 more")]
)
def test_of_many_names_the_first_are_said_and_the_others_counted(names, said):
    assert first_few(names) == said


def test_one_is_not_counted_in_the_plural():
    assert [counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert (counted(1, "matrix", "matrices"), counted(5, "matrix", "matrices")) == ("1 matrix", "5 matrices")


def test_an_error_of_others_is_part_of_a_sentence():
    assert one_line(ValueError("two\n  lines")) == "ValueError: two lines"
    assert one_line(KeyError()) == "KeyError: no reason given"
    assert len(one_line(ValueError("x" * 1000))) < 320


def test_details_are_what_led_to_an_error():
    found, near = InputError("no network"), ValueError("name")
    found.__cause__, near.__context__ = near, OSError("cable")
    assert found.details == "ValueError: name\nOSError: cable"
    assert InputError("bad").details == ""


def test_a_file_that_cannot_be_read_is_not_called_corrupt():
    assert not issubclass(UnreadableFileError, CorruptFileError)
    assert issubclass(UnreadableFileError, HalveError)


def test_what_stops_a_step_is_noted_and_anything_else_is_not_caught():
    faults = []
    for error in (UnreadableFileError("a"), CorruptFileError("b")):
        with noting(faults.append):
            raise error
    assert list(map(str, faults)) == ["a", "b"]
    with pytest.raises(ValueError, match="c"), noting(faults.append):
        raise ValueError("c")
