"""What a run takes, of a model whose numbers can be added up by hand."""

import math
from dataclasses import replace

import pytest
import torch

from halve.errors import InputError
from halve.forecast.needs import _LIBRARIES as LIBRARIES
from halve.forecast.needs import Plan, needs, sums_of
from halve.forecast.shapes import BlockShape, Bundle, Shapes

BLOCK = BlockShape((Bundle((100, 100), 50), Bundle((50,), 200)), 0, 20_500, 41_000)
SHAPES = Shapes((BLOCK, BLOCK), 7_000, 50)
PLAN = Plan(
    tokens=1000,
    batch=100,
    state=2,
    method="wanda",
    refit="none",
    statistics=1,
    cross=False,
    paired=False,
    tuned=False,
    streamed=False,
    offloaded=False,
    device=torch.device("cpu"),
)


def test_the_parts_are_those_of_the_moment_that_takes_most():
    found = needs(SHAPES, PLAN, 1_000_000, 89_000)
    assert found.memory["this process"] == 1_000_000 + LIBRARIES
    assert found.memory["the weights"] == SHAPES.size == 89_000
    assert found.memory["hidden states"] == 1000 * 50 * 2
    assert found.memory["a block in float32"] == 82_000
    assert found.memory["statistics"] >= (50**2 + 200**2) * 4
    assert found.disk == {"the checkpoint": 89_000, "finished blocks, until it is written": 82_000}


@pytest.mark.parametrize(
    ("change", "part", "less"),
    [
        ({"streamed": True}, "the weights", True),
        ({"offloaded": True}, "hidden states", True),
        ({"statistics": 3}, "statistics", False),
        ({"paired": True}, "hidden states", False),
        ({"batch": 1000}, "a forward pass", False),
        ({"refit": "cg", "batch": 1}, "the solver", False),
        ({"method": "auto", "refit": "cg"}, "the solver", False),
    ],
)
def test_every_choice_counts(change, part, less):
    before, after = (needs(SHAPES, plan, 0, 0).memory.get(part, 0) for plan in (PLAN, replace(PLAN, **change)))
    assert after < before if less else after > before


def test_a_reconstruction_needs_its_optimiser():
    assert needs(SHAPES, replace(PLAN, tuned=True), 0, 0).memory["a block and what trains it"] == 7 * 82_000


def test_on_a_gpu_are_one_block_and_its_statistics():
    found = needs(SHAPES, replace(PLAN, device=torch.device("cuda")), 0, 0)
    assert set(found.memory) == {"this process", "the weights", "hidden states"}
    assert "a block in float32" in found.on_device


def test_statistics_that_a_gpu_has_no_room_for_are_in_the_memory_of_the_machine_but_for_those_being_solved():
    plan = replace(PLAN, device=torch.device("cuda"))
    there, here = (needs(SHAPES, replace(plan, sums_on_host=on_host), 0, 0) for on_host in (False, True))
    assert here.memory == {**there.memory, "statistics": (50**2 + 200**2) * 4}
    assert here.on_device["statistics"] == 200**2 * 4
    assert "the solver" in here.on_device
    solving = replace(plan, sums_on_host=True, statistics=3, method="alps", refit="cg", batch=1, shards=4)
    here = needs(SHAPES, solving, 0, 0)
    assert here.memory["statistics"] == 2 * 2 * (50**2 + 200**2) * 4  # both halves, of two parts
    assert here.on_device["statistics"] == 3 * 200**2 * 4
    there = needs(SHAPES, replace(solving, sums_on_host=False), 0, 0)
    assert here.on_device["the solver"] == there.on_device["the solver"]


def test_a_block_in_which_nothing_is_pruned_needs_no_statistics():
    shapes = replace(SHAPES, blocks=(BLOCK, replace(BLOCK, bundles=())))
    for plan in (PLAN, replace(PLAN, device=torch.device("cuda"), sums_on_host=True)):
        assert needs(shapes, plan, 0, 0).memory["statistics"] > 0


def test_the_sums_over_inputs_are_of_every_expert():
    mixture = replace(BLOCK, bundles=(Bundle((100, 100), 50, 0.5, 4), Bundle((50,), 200)))
    one = 4 * 50**2 + 200**2
    assert sums_of(mixture, PLAN) == 4 * one
    assert sums_of(mixture, replace(PLAN, statistics=3, cross=True)) == 12 * one
    assert sums_of(mixture, replace(PLAN, statistics=0)) == 0


def test_what_cannot_fit_is_refused_with_what_would_help():
    found = needs(SHAPES, PLAN, 0, 0)
    enough = math.ceil(sum(found.memory.values()) / 1.25)  # what is foreseen may be too much by that
    found.check(enough, 0)
    with pytest.raises(InputError, match=r"needs about .* GB of memory \(.*\) and 0\.2 GB are free: give fewer"):
        found.check(enough - 2, 0)
    on_gpu = needs(SHAPES, replace(PLAN, device=torch.device("cuda")), 0, 0)
    with pytest.raises(InputError, match="GB of GPU memory"):
        on_gpu.check(10**12, 10)


def test_measuring_damage_counts_where_it_takes_more_than_what_follows():
    shapes = replace(SHAPES, count=44_500, classes=1_000_000)
    plan = replace(PLAN, judged=80, judged_batch=40)
    found = needs(shapes, plan, 0, 0).memory
    assert found["the model in float32"] == 4 * 44_500
    assert found["what blocks return"] == 4 * 40 * 50 * 2
    assert found["probabilities"] == 4 * 4 * 40 * 1_000_000
    assert "hidden states" not in found
    assert needs(shapes, replace(plan, logits=0.0), 0, 0).memory == needs(shapes, PLAN, 0, 0).memory
    in_float32 = replace(shapes, blocks=(replace(BLOCK, size=4 * 20_500),) * 2, outside=14_000)
    assert needs(in_float32, plan, 0, 0).memory["the model in float32"] == 0  # it is run as it is
    on_gpu = needs(in_float32, replace(plan, device=torch.device("cuda")), 0, 0)
    assert on_gpu.on_device["the model in float32"] == 4 * 44_500


def test_orders_and_batch_norms_need_memory_of_their_own():
    few = replace(PLAN, batch=1, method="magnitude")
    found = needs(SHAPES, replace(few, ordered=True), 0, 0).memory
    assert found["an order of channels"] == 4 * (5 * 50 * 200 + 4 * 200**2)
    block = replace(BLOCK, norms=(10, 1_000_000))
    found = needs(replace(SHAPES, blocks=(block, BLOCK)), replace(PLAN, normed=True), 0, 0).memory
    assert found["inputs of a batch norm"] == 3 * 8 * 100 * 1_000_000
