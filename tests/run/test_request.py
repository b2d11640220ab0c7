from dataclasses import fields

import pytest
import torch

from halve.errors import InputError
from halve.evaluation.request import Evaluation
from halve.model.reconstruct import Reconstruction
from halve.option_groups import known_names, options_of
from halve.planner.where_faster import WhereFaster
from halve.run.request import Placement, Request
from halve.run.settings import Settings
from halve.solve.methods import METHODS
from halve.solve.objective import Objective
from halve.solve.refit import REFITS
from halve.text.calibration import Calibration


def test_flat_names_and_groups_ask_for_the_same():
    flat = Request.of(
        {
            "calibration": "c4",
            "samples": 8,
            "device": "cpu",
            "shrinkage": 0.5,
            "only_where_faster": 1.5,
            "faster_at_batch": 4,
            "eval_data": ["a"],
            "eval_seq_len": 16,
            "reconstruct": "block",
            "reconstruct_epochs": 2,
            "beta": 1.5,
            "method": "prox-gradient",
        }
    )
    grouped = Request.of(
        {
            "calibration": Calibration("c4", samples=8),
            "placement": Placement("cpu"),
            "objective": Objective(0.5),
            "only_where_faster": WhereFaster(1.5, 4),
            "evaluation": Evaluation(["a"], 16),
            "reconstruct": Reconstruction(epochs=2),
            "beta": 1.5,
            "method": "prox-gradient",
        }
    )
    assert flat.settings == grouped.settings
    assert flat.settings.options == {"beta": 1.5}
    assert (flat.calibration, flat.placement, flat.evaluation) == (
        grouped.calibration,
        grouped.placement,
        grouped.evaluation,
    )


def test_what_groups_share_is_given_once_for_all_of_them():
    request = Request.of({"forward_dtype": "float32", "text_field": "body", "eval_data": ["a"]})
    assert (request.placement.forward_dtype, request.evaluation.forward_dtype) == ("float32", "float32")
    assert (request.calibration.text_field, request.evaluation.text_field) == ("body", "body")
    assert request.placement.precision == torch.float32


def test_no_two_options_have_one_name_and_all_have_help():
    names = [each.name for each in options_of(Request)]
    assert len(names) == len(set(names)) > 25
    assert all(each.help for each in options_of(Request))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampels": 3}, "there is no option 'sampels': did you mean 'samples'"),
        ({"effrt": "best"}, "there is no option 'effrt': did you mean 'effort'"),
        ({"calibration": Calibration("c4"), "samples": 3}, "samples is given twice, by itself and in calibration"),
        ({"placement": "cpu"}, r"placement must be a halve\.Placement, got str"),
        ({"eval_seq_len": 3}, "eval_seq_len goes with eval_data, which is not given"),
        ({"reconstruct_epochs": 3}, "'epochs' is an option of the reconstruction"),
        ({"offload": "/no/such/place"}, "offload directory /no/such/place does not exist"),
        ({"device": "abacus"}, "device 'abacus' is not understood"),
        ({"forward_dtype": "int8"}, "forward dtype 'int8' is not understood"),
        (
            {"placement": Placement(), "forward_dtype": "float32"},
            "forward_dtype is given twice, by itself",
        ),
        (
            {"calibration": Calibration("a"), "text_field": "body"},
            "text_field is given twice, by itself",
        ),
        ({"settings": Settings()}, "there is no option 'settings'"),
        ({"reconstruction": Reconstruction()}, "there is no option 'reconstruction'"),
        ({"dtype": "int8"}, "dtype 'int8' is not known"),
        ({"dtype": 3}, "dtype 3 is not known"),
        ({"trust_remote_code": "no"}, "trust_remote_code must be true or false, got 'no'"),
        ({"skip": 3}, "skip must be names of parameters, in a list, got 3"),
        ({"offload": 3}, "offload must be a directory, got 3"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Request.of(given)


def test_a_shared_option_goes_to_the_groups_that_are_not_given_ready():
    request = Request.of({"evaluation": Evaluation(["a"], 16), "forward_dtype": "float32"})
    assert (request.placement.forward_dtype, request.evaluation.forward_dtype) == ("float32", "auto")


def test_a_dtype_may_be_named():
    assert Request.of({"dtype": "bfloat16"}).loading.written_dtype == torch.bfloat16
    assert Request.of({"dtype": torch.float16}).loading.written_dtype == torch.float16
    assert Request.of({}).loading.written_dtype is None


def test_the_seed_is_a_whole_number():
    with pytest.raises(InputError, match="seed must be a whole number, got 'x'"):
        Request.of({"seed": "x"}).check()


def test_no_option_of_a_method_or_refit_has_the_name_of_one_of_ours():
    of_methods = {each.name for row in METHODS.values() for each in fields(row.options)}
    of_refits = {f"refit_{each.name}" for row in REFITS.values() for each in fields(row.options)}
    assert not (of_methods | of_refits) & set(known_names(Request))
