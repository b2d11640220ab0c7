"""``bench/engines_picture.py``: what is printed and drawn is what was measured, and the same every time."""

import json

import pytest

import engines_picture


@pytest.fixture
def measured(tmp_path):
    rates = {"dense engine": (2.0, 8.0), "sparse engine": (9.0, 16.0)}
    rows = [{"contender": name, "decode": rate} for name, pair in rates.items() for rate in pair]
    (tmp_path / "engines.json").write_text(json.dumps(rows))
    return tmp_path / "engines.json"


POINTS = [
    ("dense bf16", "dense engine", "20", "10"),
    ("dense Q4_1", "", "5", "11"),
    ("2:4 bf16", "sparse engine", "12", "30.5"),
    ("2:4 int8", "dense engine", "7", "31"),
]
GIVEN = [word for point in POINTS for word in ("--point", *point)]


def test_the_table_says_which_points_are_beaten(measured, capsys):
    engines_picture.main([str(measured), *GIVEN, "--picture", str(measured.with_name("a.svg"))])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| dense bf16 | 20.0 | 4.0 | 10.00 |  |  |",
        "| dense Q4_1 | 5.0 |  | 11.00 |  |  |",
        "| 2:4 bf16 | 12.0 | 12.0 | 30.50 | dense Q4_1 |  |",
        "| 2:4 int8 | 7.0 | 4.0 | 31.00 | dense Q4_1 | dense bf16, 2:4 bf16 |",
    ]


def test_the_picture_is_the_same_every_time(measured):
    pictures = [measured.with_name("a.svg"), measured.with_name("b.svg")]
    for picture in pictures:
        engines_picture.main([str(measured), *GIVEN, "--picture", str(picture)])
    text = pictures[0].read_text(encoding="utf-8")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert text.count(">int8<") == 2, "once over bytes and once over tokens a second"
    assert text.count(">Q4_1<") == 1, "no contender, no point over tokens a second"


def test_a_contender_that_was_not_measured_is_named(measured):
    point = ["--point", "dense bf16", "another engine", "20", "10"]
    with pytest.raises(SystemExit, match="'another engine': give one of dense engine, sparse engine"):
        engines_picture.main([str(measured), *point, "--picture", str(measured.with_name("a.svg"))])
