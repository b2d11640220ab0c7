import contextlib

import pytest
import torch

from halve.cli.values import (
    allowed_fallback,
    merge_options,
    on_threads,
    parse_number,
    parse_options,
    parse_options_by_method,
)
from halve.errors import InputError


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with on_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with contextlib.suppress(RuntimeError), on_threads(before + 2):
        raise RuntimeError
    with on_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(InputError, match=r"threads must be a whole number of at least 1, got 0"), on_threads(0):
        pytest.fail("ran on no threads")


def test_values_read_as_what_they_are():
    options = parse_options(["beta=1.02", "refit-steps=7", "effort=best", "flag=true"])
    assert options == {"beta": 1.02, "refit_steps": 7, "effort": "best", "flag": True}


@pytest.mark.parametrize("pair", ["beta", "=3", ""])
def test_a_pair_without_name_or_value_is_refused(pair):
    with pytest.raises(InputError, match="write NAME=VALUE"):
        parse_options([pair])


def test_options_by_method():
    grouped = parse_options_by_method(["prox-gradient.beta=1.1", "block.epochs=2", "block.held_out=0.2"])
    assert grouped == {"prox-gradient": {"beta": 1.1}, "block": {"epochs": 2, "held_out": 0.2}}
    for pair in ("beta=1.1", "beta", "a=b.c"):
        with pytest.raises(InputError, match=r"write METHOD\.NAME=VALUE"):
            parse_options_by_method([pair])


def test_flags_join_the_options_and_do_not_contradict_them():
    assert merge_options({"beta": 1.1}, effort="best", time_limit=None) == {"beta": 1.1, "effort": "best"}
    with pytest.raises(InputError, match="time_limit is given twice: give it once, by -o or by --time-limit"):
        merge_options({"time_limit": 5}, time_limit=6.0)


def test_no_option_comes_twice():
    for parse, pairs in ((parse_options, ["beta=1", "beta=2"]), (parse_options_by_method, ["a.b=1", "a.b=2"])):
        with pytest.raises(InputError, match="is given twice: give it once"):
            parse(pairs)


def test_a_shrinkage_is_a_number_or_a_word_left_to_the_objective():
    assert parse_number("0.25") == 0.25
    assert parse_number("1e-3") == 1e-3
    assert parse_number("auto") == "auto"
    assert parse_number("much") == "much"


@pytest.mark.parametrize(
    ("given", "strict", "expected"),
    [(None, True, None), (None, False, "magnitude"), ("wanda", True, "wanda"), ("wanda", False, "wanda")],
)
def test_a_run_is_strict_unless_it_is_told_what_to_fall_back_on(given, strict, expected):
    assert allowed_fallback(given, strict=strict) == expected
