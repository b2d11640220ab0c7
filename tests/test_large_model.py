"""``bench/large_model.py``: at a small size, all that it does."""

import pytest

import halve
import large_model
from halve.checkpoint.load import load_model


@pytest.fixture
def made(tmp_path):
    large_model.make(tmp_path / "model", large_model.SHAPES["tiny"])
    return tmp_path / "model"


def test_what_is_made_can_be_loaded_and_no_two_blocks_are_equal(made):
    model = load_model(made).model
    one, other = (block.mlp.up_proj.weight for block in model.model.layers[:2])
    assert not one.equal(other)
    assert 0.01 < float(one.float().std()) < 0.03


def test_a_run_is_killed_goes_on_and_is_measured(made, tmp_path, capsys):
    options = {"method": "wanda", "refit": "none", "stream": "always", "device": "cpu"}
    found = large_model.prune(made, tmp_path / "out", options, (2, 16), 1)
    assert halve.check(tmp_path / "out", against=made).ok
    assert found["peak"] > 10**8
    said = capsys.readouterr().out
    assert "killed at block 1" in said
    assert "reading and writing its bytes once" in said
    assert not list(tmp_path.glob("out-copied*"))


def test_a_limit_stops_what_needs_more(made, tmp_path):
    assert large_model.limit(made, tmp_path, 0.05, (2, 16)) == {"always": False, "never": False}
