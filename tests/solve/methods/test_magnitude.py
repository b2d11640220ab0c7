import torch

from halve.maths.pattern import Pattern
from halve.solve.methods.magnitude import MagnitudeOptions, solve
from halve.solve.outcome import Status


def test_keeps_the_largest_of_each_group_bit_for_bit():
    weight = torch.tensor([[0.1, -0.4, 0.3, 0.2, -5.0, 1.0, 7.0, 2.0]], dtype=torch.bfloat16)
    outcome = solve(weight, None, Pattern("2:4"), MagnitudeOptions())
    expected = torch.tensor([[0.0, -0.4, 0.3, 0.0, -5.0, 0.0, 7.0, 0.0]], dtype=torch.bfloat16)
    assert torch.equal(outcome.weight, expected)
    assert outcome.status is Status.OK
    assert outcome.method == "magnitude"


def test_ties_go_to_the_lowest_index():
    weight = torch.full((1, 8), -0.5)
    kept = solve(weight, None, Pattern("2:4"), MagnitudeOptions()).weight != 0
    assert kept.tolist() == [[True, True, False, False] * 2]


def test_unstructured_compares_within_a_row():
    weight = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0], [1.0, -8.0, 2.0, -7.0, 3.0, 6.0, 4.0, 5.0]])
    kept = solve(weight, None, Pattern("50%"), MagnitudeOptions()).weight
    assert kept.tolist() == [[9.0, 8.0, 7.0, 6.0, 0, 0, 0, 0], [0, -8.0, 0, -7.0, 0, 6.0, 0, 5.0]]
