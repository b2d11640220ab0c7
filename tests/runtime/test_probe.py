"""What is compared of a model's outputs, and whose fault it is when there is nothing to compare."""

import pytest
import torch
from torch import nn

from halve.errors import HalveError, InputError
from halve.runtime.probe import Probe, difference, noting_calls
from models import decoder


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self._make = make

    def forward(self, x):
        return self._make(x)


def fails(_x):
    raise RuntimeError("out of order")


ROWS = torch.arange(1.0, 7.0).view(2, 3)


@pytest.mark.parametrize(
    "make", [lambda y: {"first": None, "y": y}, lambda y: (None, y), lambda y: [y.long(), y], lambda y: y]
)
def test_the_first_numbers_are_taken(make):
    assert Probe.of(Returns(make), ROWS).dense_output() is ROWS
    assert Probe.of(Returns(make), {"x": ROWS}).sparse_output() is ROWS


def test_a_language_model_gets_tokens_and_gives_logits():
    model = decoder("llama").train()
    output = Probe.of(model, None).dense_output()
    assert output.shape == (1, 16, model.config.vocab_size)
    assert not output.requires_grad
    assert model.training
    with pytest.raises(InputError, match=r"Returns says of no vocabulary: give a probe"):
        Probe.of(Returns(fails), None)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (fails, r"cannot be called with the probe \(out of order\): give another"),
        (lambda _x: None, r"returns no tensor of numbers on the probe: give another"),
        (lambda x: x.long(), r"returns no tensor of numbers on the probe: give another"),
        (lambda x: x * float("nan"), r"returns no finite numbers on the probe"),
    ],
)
def test_before_the_swap_it_is_the_probe_that_is_wrong(make, says):
    with pytest.raises(InputError, match=says):
        Probe.of(Returns(make), ROWS).dense_output()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (fails, r"Returns fails with sparse layers where it ran with dense ones: out of order"),
        (lambda _x: None, r"Returns returns no tensor of numbers with sparse layers"),
    ],
)
def test_after_the_swap_it_is_the_sparse_layers_that_are_wrong(make, says):
    with pytest.raises(HalveError, match=says) as caught:
        Probe.of(Returns(make), ROWS).sparse_output()
    assert not isinstance(caught.value, InputError)


def test_layers_that_are_called_are_noted_and_left_as_they_were():
    layers = {name: nn.Linear(3, 3) for name in "ab"}
    with noting_calls(layers) as called:
        layers["b"](ROWS)
    layers["a"](ROWS)
    assert called == {"b"}
    assert not layers["b"]._forward_pre_hooks


def test_the_difference_is_relative_to_the_norm():
    assert difference(ROWS, ROWS) == 0.0
    assert difference(ROWS, 1.5 * ROWS) == pytest.approx(0.5)
    assert difference(ROWS.bfloat16(), ROWS.bfloat16() + 1) == pytest.approx(6**0.5 / float(ROWS.norm()))


@pytest.mark.parametrize("masked", [float("-inf"), float("nan"), torch.finfo(torch.float32).min])
def test_masked_numbers_hide_nothing_and_have_to_be_the_same_ones(masked):
    before, after, elsewhere = ROWS.clone(), ROWS * 1.5, ROWS.clone()
    before[0, 0] = after[0, 0] = elsewhere[1, 1] = masked
    assert difference(before, after) == pytest.approx(0.5)
    assert difference(before, elsewhere) == float("inf")
    assert difference(before, ROWS) == float("inf")


def test_another_shape_is_all_the_difference_there_can_be():
    assert difference(ROWS, ROWS[:1]) == float("inf")
