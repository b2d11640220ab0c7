import math

import pytest
import torch
from torch import nn

from halve.errors import CalibrationError, InputError
from halve.model.calls import Call
from halve.model.reconstruct import (
    RATES,
    Example,
    Reconstruction,
    parse_reconstruction,
    reconstruct,
    trainable,
)


class Block(nn.Module):
    """Two matrices with a norm between, a bias, and a matrix that is nobody's business."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.second = nn.Linear(32, 16, bias=False)
        self.router = nn.Linear(16, 4, bias=False)

    def forward(self, hidden, scale=1.0):
        return hidden + scale * self.second(self.norm(torch.relu(self.first(hidden)))), None


def problem(count=8, seed=1):
    dense, block = Block(), Block()
    masks = {}
    with torch.no_grad():
        for name in ("first.weight", "second.weight"):
            parameter = block.get_parameter(name)
            masks[name] = torch.zeros_like(parameter, dtype=torch.bool)
            masks[name][:, ::2] = True
            parameter.mul_(masks[name])
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(2, 12, 16, generator=generator) for _ in range(count)]
        examples = [Example(x, Call((), {"scale": 0.5}), dense(x, 0.5)[0], None) for x in inputs]
    return block, masks, examples


def relative_error(block, examples):
    with torch.no_grad():
        lost = sum(float((block(e.hidden, 0.5)[0] - e.target).double().square().sum()) for e in examples)
    return lost / sum(float(e.target.double().square().sum()) for e in examples)


def tune(block, masks, examples, precision=torch.float32, dtype=torch.float32, **options):
    stored = dict.fromkeys(trainable(block, masks), dtype)
    return reconstruct(block, masks, examples.__getitem__, len(examples), Reconstruction(**options), precision, stored)


def test_error_on_held_out_batches_falls_and_is_reported_truly():
    block, masks, examples = problem()
    before = relative_error(block, examples[-1:])
    tuned = tune(block, masks, examples, epochs=20, learning_rate=1e-2)
    assert tuned.before == pytest.approx(before, rel=1e-5)
    assert tuned.after == pytest.approx(relative_error(block, examples[-1:]), rel=1e-5)
    assert tuned.after < 0.8 * before
    assert tuned.steps == 20 * 7
    assert 1 <= tuned.epoch <= 20


def test_pruned_weights_stay_zero_and_foreign_matrices_stay():
    block, masks, examples = problem()
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    tune(block, masks, examples, epochs=3, learning_rate=1e-2)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name]) == (name == "router.weight"), name
        assert parameter.requires_grad
        assert parameter.grad is None
    for name, mask in masks.items():
        assert not bool(block.get_parameter(name)[~mask].any())
    assert set(trainable(block, masks)) == {"first.weight", "first.bias", "norm.weight", "norm.bias", "second.weight"}


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_reconstruction_that_gains_nothing_is_undone(rate):
    block, masks, examples = problem()
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    tuned = tune(block, masks, examples, epochs=2, learning_rate=rate)
    assert (tuned.epoch, tuned.learning_rate, tuned.after) == (0, None, tuned.before)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


def test_the_best_epoch_stays_not_the_last():
    block, masks, examples = problem(count=4)
    noisy = [
        Example(e.hidden[:, :1], e.call, e.target[:, :1] + torch.randn_like(e.target[:, :1]), None)
        for e in examples[:3]
    ]
    tuned = tune(block, masks, [*noisy, examples[3]], epochs=60, learning_rate=3e-3, held_out=0.25)
    assert tuned.epoch < 60
    assert tuned.after == pytest.approx(relative_error(block, examples[3:]), rel=1e-5)


def test_of_several_learning_rates_the_one_with_the_lowest_held_out_error_stays():
    alone = {}
    for rate in RATES:
        block, masks, examples = problem()
        alone[rate] = tune(block, masks, examples, epochs=3, learning_rate=rate)
    assert len({tuned.after for tuned in alone.values()}) == len(RATES)
    best = min(alone.values(), key=lambda tuned: tuned.after)
    block, masks, examples = problem()
    tuned = tune(block, masks, examples, epochs=3)
    assert (tuned.learning_rate, tuned.epoch, tuned.after) == (best.learning_rate, best.epoch, best.after)
    assert tuned.steps == len(RATES) * best.steps
    assert tuned.after == pytest.approx(relative_error(block, examples[-1:]), rel=1e-5)


def test_no_learning_rate_is_tried_that_nothing_could_judge():
    block, masks, examples = problem(count=3)
    tuned = tune(block, masks, examples, epochs=2)
    assert (tuned.learning_rate, tuned.steps) == (RATES[0], 6)


def test_masked_positions_do_not_count():
    block, masks, examples = problem()
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[:, 6:] = False
    spoiled = [Example(e.hidden, e.call, torch.where(valid[..., None], e.target, 1e6), valid) for e in examples]
    plain = [Example(e.hidden[:, :6], e.call, e.target[:, :6], None) for e in examples]
    other, _, _ = problem()
    first, second = tune(block, masks, spoiled, epochs=2), tune(other, masks, plain, epochs=2)
    assert first.before == pytest.approx(second.before, rel=1e-5)
    assert first.after == pytest.approx(second.after, rel=1e-3)


def test_few_batches_are_all_trained_on():
    block, masks, examples = problem(count=3)
    tuned = tune(block, masks, examples, epochs=2, learning_rate=1e-3)
    assert (tuned.steps, tuned.held_out) == (6, 0)
    block, masks, examples = problem(count=4)
    tuned = tune(block, masks, examples, epochs=2, learning_rate=1e-3)
    assert (tuned.steps, tuned.held_out) == (6, 1)


def test_the_error_is_that_of_the_weights_as_the_model_keeps_them():
    block, masks, examples = problem()
    tuned = tune(block, masks, examples, dtype=torch.bfloat16, epochs=10, learning_rate=1e-2)
    assert torch.equal(block.first.weight, block.first.weight.bfloat16().float())
    assert tuned.after == pytest.approx(relative_error(block, examples[-1:]), rel=1e-5)
    block, masks, examples = problem()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(parameter.to(torch.float8_e5m2))
    before = block.first.weight.clone()
    tuned = tune(block, masks, examples, dtype=torch.float8_e5m2, epochs=1, learning_rate=1e-7)
    assert (tuned.epoch, tuned.after) == (0, tuned.before)
    assert torch.equal(block.first.weight, before)


def test_vectors_beside_dense_matrices_and_frozen_ones_are_left_alone():
    block, masks, _ = problem()
    block.router.bias = nn.Parameter(torch.zeros(4))
    assert "router.bias" not in trainable(block, masks)
    assert "norm.bias" in trainable(block, masks)
    assert "norm.bias" not in trainable(block, masks, frozen={"norm.bias"})


def test_bfloat16_products_keep_float32_weights():
    block, masks, examples = problem()
    tuned = tune(block, masks, examples, precision=torch.bfloat16, epochs=10, learning_rate=1e-2)
    assert tuned.after < 0.9 * tuned.before
    weight = block.first.weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_an_error_that_is_not_finite_is_named():
    block, masks, examples = problem()
    with torch.no_grad():
        block.first.bias[0] = math.nan
    with pytest.raises(CalibrationError, match="not finite"):
        tune(block, masks, examples)


@pytest.mark.parametrize(
    ("option", "value"), [("epochs", 0), ("epochs", 1.5), ("learning_rate", 0.0), ("held_out", 0.6), ("held_out", "x")]
)
def test_bad_options_are_refused(option, value):
    with pytest.raises(InputError, match=rf"{option} of the reconstruction \(--reconstruct-[a-z-]+\) must"):
        Reconstruction(**{option: value})


def test_what_users_write():
    assert parse_reconstruction(None) is None
    assert parse_reconstruction("none") is None
    assert parse_reconstruction("block", epochs=2) == Reconstruction(epochs=2)
    assert parse_reconstruction(Reconstruction(epochs=3)) == Reconstruction(epochs=3)
    with pytest.raises(InputError, match="reconstruct 'blocks' is not understood"):
        parse_reconstruction("blocks")
    for other in (None, "none", Reconstruction()):
        with pytest.raises(InputError, match="'epochs' is an option of the reconstruction"):
            parse_reconstruction(other, epochs=2)
