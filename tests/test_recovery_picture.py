"""``bench/recovery_picture.py``: the curve is that of the record, and the picture the same every time."""

import json

import matplotlib as mpl
import pytest

import recovery_picture


@pytest.fixture
def trained(tmp_path):
    points = [(0, None, 60.5), (512, 4.0, None), (1024, 3.5, 50.25)]
    first = {"curve": [{"tokens": 7, "loss": 1.0, "perplexity": 1.0}]}
    last = {"curve": [{"tokens": at, "loss": loss, "perplexity": value} for at, loss, value in points]}
    (tmp_path / "halve.json").write_text(json.dumps({"trainings": [first, last]}))
    return tmp_path


def test_the_curve_is_that_of_the_last_training(trained):
    assert recovery_picture.curve(trained) == ([0, 1024], [60.5, 50.25])


def test_the_picture_is_the_same_every_time(trained):
    pictures, before = [trained / "a.svg", trained / "b.svg"], mpl.rcParams["svg.hashsalt"]
    for picture in pictures:
        recovery_picture.main([str(trained), "--picture", str(picture), "--labels", "from block"])
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert "from block" in pictures[0].read_text()
    assert mpl.rcParams["svg.hashsalt"] == before


def test_labels_have_to_fit(trained, capsys):
    with pytest.raises(SystemExit):
        recovery_picture.main([str(trained), "--picture", str(trained / "a.svg"), "--labels", "one", "two"])
    assert "2 labels are given for 1 directories" in capsys.readouterr().err
