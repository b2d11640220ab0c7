import pytest
import torch

from halve.maths.gram import Statistics
from halve.model.plan import Matrix
from halve.run import bundles as run_bundles
from halve.run.bundles import bundles, home_of_sums, operations, prune_bundle
from halve.run.settings import Settings
from halve.solve.outcome import Status


def matrix(name, d_out=4, d_in=8):
    return Matrix(name=name, parameter=name, block=0, d_out=d_out, d_in=d_in)


def test_neighbours_with_the_same_statistics_are_solved_together():
    leaders = {"q": "q", "k": "q", "v": "q", "o": "o", "up": "q"}
    matrices = [matrix(name) for name in (*leaders, "e0", "e1")]
    names = [[each.name for each in stack] for stack in bundles(matrices, leaders)]
    assert names == [["q", "k", "v"], ["o"], ["up"], ["e0"], ["e1"]]
    assert list(bundles([], leaders)) == []
    assert [len(stack) for stack in bundles(matrices, {})] == [1] * 7


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [1, 1, 1, 1]), (63, [1, 1, 1, 1]), (64, [2, 1, 1]), (96, [2, 1, 1]), (128, [2, 2]), (10_000, [4])],
)
def test_not_too_many_weights_are_solved_together(most, expected):
    matrices = [matrix("a"), matrix("b"), matrix("c", d_out=10), matrix("d", d_out=6)]
    found = list(bundles(matrices, {each.name: "a" for each in matrices}, most))
    assert [each for stack in found for each in stack] == matrices
    assert [len(stack) for stack in found] == expected


def test_statistics_that_would_take_half_of_a_gpu_stay_in_memory(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert home_of_sums(10**18, cpu) == cpu
    monkeypatch.setattr(run_bundles, "whole_memory", lambda device: {gpu: 1000}[device])
    assert home_of_sums(250, gpu) == gpu
    assert home_of_sums(251, gpu) == cpu


def test_the_cost_grows_with_rows_and_with_the_cube_of_the_width():
    assert operations(matrix("wide", 8, 16)) == 16**2 * (60 * 8 + 15 * 16)
    assert operations(matrix("a", 8)) < operations(matrix("b", 16)) < operations(matrix("c", 16, 16))


def test_an_expert_with_a_given_mask_that_saw_too_few_tokens_stays_on_it():
    weight = torch.arange(1.0, 33.0).view(4, 8)
    mask = torch.tensor([True, True, False, False] * 2).expand(4, 8)
    settings = Settings(method="magnitude", fallback="magnitude")
    few = Statistics(torch.eye(8), 5)
    (outcome,) = prune_bundle([matrix("e")], [weight], few, settings, {}, routed=True, masks=[mask])
    assert torch.equal(outcome.weight, weight * mask)
    assert (outcome.status, outcome.method) == (Status.FELL_BACK, "given")
    assert "only 5 calibration tokens reached this expert" in outcome.reason
