import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halve.errors import InputError
from halve.evaluation.request import Evaluation
from halve.maths.pattern import Pattern
from halve.model.reconstruct import Reconstruction
from halve.planner.where_faster import WhereFaster
from halve.run.call_record import read_back, written_down
from halve.run.request import Request
from halve.solve.objective import Objective


def kept(model="org/model", **options):
    """Write a call down as JSON, and read it back."""
    return read_back(json.loads(json.dumps(written_down(model, None, Request.of(options)))))


def test_what_was_asked_comes_back_from_json(tmp_path):
    asked = {
        "pattern": Pattern("1:4"),
        "calibration": Path("text.txt"),
        "samples": 7,
        "skip": ("*q_proj*",),
        "reconstruct": Reconstruction(epochs=2),
        "objective": Objective(0.1, None, 0.5),
        "only_where_faster": WhereFaster(1.1, 8),
        "dtype": torch.bfloat16,
        "offload": tmp_path,
        "evaluation": Evaluation(["a.txt"], 16),
        "effort": "fast",
        "refit_tolerance": 0.1,
    }
    back = kept(Path("/a/model"), **asked)
    request = Request.of(asked)
    assert back.model == "/a/model"
    assert back.request.settings == request.settings
    assert back.request.settings.options == {"effort": "fast", "refit_tolerance": 0.1}
    assert back.request.settings.reconstruction == Reconstruction(epochs=2)
    assert back.request.settings.only_where_faster == WhereFaster(1.1, 8)
    assert back.request.calibration == replace(request.calibration, source="text.txt")
    assert back.request.loading == request.loading
    assert back.request.evaluation == request.evaluation
    assert str(back.request.placement.offload) == str(tmp_path)


def test_defaults_come_back_as_defaults():
    back = kept().request
    assert back == Request.of({})
    assert (back.settings.objective, back.settings.reconstruction, back.loading.dtype, back.calibration.source) == (
        Objective(),
        None,
        None,
        None,
    )
    assert kept(only_where_faster=1.5).request.settings.only_where_faster == WhereFaster(1.5)
    assert kept(effort="best").request.settings.reconstruction == Reconstruction()
    assert kept(effort="best", reconstruct="none").request.settings.reconstruction is None


def test_where_blocks_are_kept_is_left_to_the_run_that_goes_on(tmp_path):
    assert kept(work=tmp_path / "blocks").request.placement.work is None


def test_objects_in_memory_cannot_be_written_down():
    request = Request.of({})
    assert written_down(torch.nn.Linear(2, 2), None, request) is None
    assert written_down("org/model", object(), request) is None
    assert written_down("org/model", None, Request.of({"calibration": torch.ones(1, 2)})) is None


def test_relative_paths_are_of_the_directory_where_the_run_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "pictures").mkdir()
    call = written_down("model", None, Request.of({"eval_images": "pictures"}))
    assert read_back(call).model == "model"
    folder = written_down("org/model", None, Request.of({"calibration": "pictures"}))
    monkeypatch.chdir("/")
    begun = f"the run was begun in {tmp_path} with paths relative to it"
    with pytest.raises(InputError, match=rf"{begun} \(model, pictures\): resume it from there, cd {tmp_path}"):
        read_back(call)
    with pytest.raises(InputError, match=rf"{begun} \(pictures\)"):
        read_back(folder)
    assert read_back(written_down("org/model", None, Request.of({}))).model == "org/model"


def test_what_is_no_plain_value_is_refused_or_made_one():
    call = written_down("a", None, Request.of({"device": torch.device("cpu")}))
    assert call["request"]["placement"]["device"] == "cpu"
    with pytest.raises(InputError, match=r"cannot be kept for resuming the run .* give plain Python numbers"):
        written_down("a", None, Request.of({"seed": object()}))
