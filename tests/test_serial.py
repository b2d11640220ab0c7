from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.option_groups import option
from halve.run.request import Request
from halve.serial import from_plain, to_plain


@dataclass(frozen=True)
class Inner:
    number: float | str | None = None


@dataclass(frozen=True)
class Outer:
    pattern: Pattern
    dtype: torch.dtype | None = None
    place: Path | None = None
    names: tuple[str, ...] = ()
    inner: Inner | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    asked: str | None = option(None, transient=True)


@pytest.mark.parametrize(
    "value",
    [
        Outer(Pattern("1:4")),
        Outer(Pattern("50%"), torch.bfloat16, Path("/a"), ("x", "y"), Inner(0.5), {"beta": 1.5}),
        Outer(Pattern("2:4"), inner=Inner("auto")),
    ],
)
def test_what_is_written_down_is_read_back(value):
    assert from_plain(Outer, to_plain(value)) == value


def test_values_are_those_of_json():
    value = Outer(Pattern("2:4"), torch.float16, Path("a"), ("x",), Inner(1.0), {"limit": None}, "block")
    assert to_plain(value) == {
        "pattern": "2:4",
        "dtype": "float16",
        "place": "a",
        "names": ["x"],
        "inner": {"number": 1.0},
        "options": {"limit": None},
    }


def test_fields_that_an_earlier_version_did_not_have_keep_their_defaults():
    assert from_plain(Outer, {"pattern": "2:4"}) == Outer(Pattern("2:4"))


def test_the_whole_of_a_request_survives():
    request = Request.of(
        {
            "pattern": "1:4",
            "eval_data": ["a"],
            "only_where_faster": 1.2,
            "reconstruct_epochs": 2,
            "reconstruct": "block",
        }
    )
    back = from_plain(Request, to_plain(request))
    assert to_plain(back) == to_plain(request)
    assert back.settings == request.settings


def test_what_another_version_has_written_is_refused():
    with pytest.raises(InputError, match="Outer has no field 'colour': it was written by another version"):
        from_plain(Outer, {"pattern": "2:4", "colour": "red"})
    with pytest.raises(InputError, match="dtype 'float8' is not known"):
        from_plain(Outer, {"pattern": "2:4", "dtype": "float8"})
