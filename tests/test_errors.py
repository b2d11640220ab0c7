import pytest

from halve.errors import first_few


@pytest.mark.parametrize(
    ("names", "said"), [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (list("abcde"), "a, b, c and 2 more")]
)
def test_of_many_names_the_first_are_said_and_the_others_counted(names, said):
    assert first_few(names) == said
