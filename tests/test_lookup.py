from dataclasses import dataclass

import pytest

from halve.errors import InputError
from halve.lookup import build_options, find_row


@dataclass(frozen=True)
class Options:
    steps: int = 3


@dataclass(frozen=True)
class Nothing:
    pass


def test_rows_are_found_or_suggested():
    table = {"wanda": 1, "magnitude": 2}
    assert find_row(table, "wanda", "method") == 1
    with pytest.raises(
        InputError, match=r"unknown method 'wandda': did you mean 'wanda'\? choose one of wanda, magnitude"
    ):
        find_row(table, "wandda", "method")
    with pytest.raises(InputError, match="unknown method 7: choose one of"):
        find_row(table, 7, "method")


def test_options_are_built_or_named():
    assert build_options(Options, "refit gd", {"steps": 5}, "refit_") == Options(5)
    with pytest.raises(InputError, match="refit gd has no option 'refit_step': its options are refit_steps"):
        build_options(Options, "refit gd", {"step": 5}, "refit_")
    with pytest.raises(InputError, match="refit none has no option 'x': it takes none"):
        build_options(Nothing, "refit none", {"x": 1})
