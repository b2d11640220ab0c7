import hashlib
import json
import math

import torch
from safetensors.torch import load_file

from halve.provenance import environment
from halve.pruning import prune
from halve.report.record import finite, mask_sha256, settings_json, to_json
from halve.run.events import RunReport
from halve.run.settings import Settings
from halve.solve.objective import Objective
from models import decoder, tokens
from reported import matrix_report


def record(facts, objective):
    matrix = matrix_report("a", facts)
    asked = Settings(method="wanda", refit="cg", objective=objective)
    report = RunReport(matrices=(matrix,), excluded=(), blocks=1, seconds={"solve": 1.0})
    return to_json(report, asked, {}, {}, {}, source={}, notes=(), calibration={}, device="cpu", precision="float32")


def test_what_is_not_finite_is_null_and_no_time_is_told():
    assert (finite(0.5), finite(math.nan), finite(-math.inf)) == (0.5, None, None)
    assert (finite(9e17), finite(1e18), finite(-1e300)) == (9e17, None, None)  # what readers take, and what they refuse
    found = record({"relative_loss": math.nan, "seconds": 3.0, "tokens": 5.0}, Objective())
    assert found["mean_relative_loss"] is None
    assert found["matrices"][0]["facts"] == {"relative_loss": None, "tokens": 5.0}
    assert "seconds" not in json.dumps(found, allow_nan=False)


def test_the_objective_is_told_as_it_was_followed():
    asked = Objective(match_dense=0.5)
    assert record({"match_dense": 0.5}, asked)["objective"] == {
        "shrinkage": 0.0,
        "match_dense": 0.5,
        "match_ridge": 0.1,
    }
    assert record({}, asked)["objective"]["match_dense"] == 0.0  # nothing could be paired
    assert settings_json(Settings())["objective"]["shrinkage"] == "auto"


def test_the_environment_names_what_can_change_a_result():
    assert {"halve", "torch", "cpu_capability", "threads", "prox_kernel"} <= environment().keys()


def test_the_hash_of_a_mask_depends_on_nothing_else():
    weight = torch.tensor([[1.0, 0.0, -2.0, 0.0, 0.0, 3.0, 4.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, -0.0]])
    expected = hashlib.sha256(bytes([0b10100110, 0b00111000])).hexdigest()
    for same in (weight, 5 * weight, weight.bfloat16(), weight.mT.contiguous().mT):
        assert mask_sha256(same) == expected
    assert mask_sha256(weight.roll(1, dims=1)) != expected


def test_masks_are_recorded_as_they_lie_on_the_disk(tmp_path):
    for family in ("gpt2", "mixtral"):
        out = tmp_path / family
        pruned = prune(decoder(family), out, calibration=tokens(8), method="magnitude", refit="none")
        tensors = load_file(out / "model.safetensors")
        for matrix in json.loads((out / "halve.json").read_text())["matrices"]:
            if len(matrix["tensors"]) == 1 and tensors[matrix["tensors"][0]].ndim == 2:
                tensor = tensors[matrix["tensors"][0]]
                assert matrix["mask_sha256"] == mask_sha256(tensor if matrix["layout"] == "out_in" else tensor.mT)
        assert len({matrix["mask_sha256"] for matrix in pruned.record["matrices"]}) > 10
