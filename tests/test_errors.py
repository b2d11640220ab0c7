import pytest

from halve.errors import counted, first_few


@pytest.mark.parametrize(
    ("names", "said"), [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (list("abcde"), "a, b, c and 2 more")]
)
def test_of_many_names_the_first_are_said_and_the_others_counted(names, said):
    assert first_few(names) == said


def test_one_is_not_counted_in_the_plural():
    assert [counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert (counted(1, "matrix", "matrices"), counted(5, "matrix", "matrices")) == ("1 matrix", "5 matrices")
