import inspect
import json
from pathlib import Path

import pytest
import torch

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.model.reconstruct import Reconstruction
from halve.planner.where_faster import WhereFaster
from halve.pruning import prune
from halve.run.call_record import read_back, written_down
from halve.solve.objective import Objective


def arguments(**given):
    """All arguments of `prune`, as it sees them itself."""
    parameters = inspect.signature(prune).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {**defaults, "model": "org/model", "options": {}, **given}


def test_what_was_asked_comes_back_from_json():
    asked = arguments(
        model=Path("/a/model"),
        pattern=Pattern("1:4"),
        calibration=Path("text.txt"),
        skip=("*q_proj*",),
        reconstruct=Reconstruction(epochs=2),
        objective=Objective(0.1, None, 0.5),
        only_where_faster=WhereFaster(1.1, 8),
        dtype=torch.bfloat16,
        offload=Path("/spill"),
        options={"effort": "fast", "refit_tolerance": 0.1},
    )
    back = read_back(json.loads(json.dumps(written_down(asked))))
    assert back.pop("options", None) is None
    assert {"effort", "refit_tolerance"} <= back.keys()
    assert back.keys() == asked.keys() - {"options", "out", "tokenizer", "listen", "work"} | asked["options"].keys()
    assert (back["model"], back["pattern"], back["calibration"], back["offload"]) == (
        "/a/model",
        "1:4",
        "text.txt",
        "/spill",
    )
    assert back["only_where_faster"] == WhereFaster(1.1, 8)
    assert (back["objective"], back["reconstruct"], back["dtype"]) == (
        asked["objective"],
        asked["reconstruct"],
        torch.bfloat16,
    )
    assert list(back["skip"]) == ["*q_proj*"]


def test_defaults_come_back_as_defaults():
    back = read_back(json.loads(json.dumps(written_down(arguments()))))
    assert (back["objective"], back["reconstruct"], back["dtype"], back["calibration"]) == (
        Objective(),
        None,
        None,
        None,
    )
    inspect.signature(prune).bind(**back)
    assert read_back(written_down(arguments(only_where_faster=1.5)))["only_where_faster"] == WhereFaster(1.5)


def test_objects_in_memory_cannot_be_written_down():
    for given in ({"model": torch.nn.Linear(2, 2)}, {"calibration": torch.ones(1, 2)}, {"tokenizer": object()}):
        assert written_down(arguments(**given)) is None


def test_relative_paths_are_of_the_directory_where_the_run_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    call = written_down(arguments(model="model"))
    assert read_back(call)["model"] == "model"
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match=f"the run was begun in {tmp_path}, with paths relative to it"):
        read_back(call)
    assert read_back(written_down(arguments(model="org/model")))["model"] == "org/model"


def test_what_is_no_plain_value_is_refused_or_made_one():
    assert written_down(arguments(device=torch.device("cpu")))["device"] == "cpu"
    with pytest.raises(InputError, match=r"cannot be kept for resuming the run .* give plain Python numbers"):
        written_down(arguments(seed=object()))
