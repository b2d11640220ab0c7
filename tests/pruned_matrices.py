"""Small layers to prune, and what holds of everything that is pruned: for the tests of one matrix and of several."""

from dataclasses import replace

import pytest
import torch

import layer_oracles as oracle
from halve.maths.gram import Gradient, GramAccumulator, Statistics
from halve.solve import methods
from halve.solve.matrix import prune_weights

METHODS = list(methods.METHODS)
FAST = {"prox-gradient": {"beta": 1.15}}


WEIGHT, GRAM = oracle.layer(4, 16, seed=12)
"""For what is refused: any layer will do."""


def with_gradient(method, weights, gram, tokens=100):
    """What a method that weighs gradients is given besides: gradients in proportion to the inputs, of two samples."""
    row = methods.METHODS.get(method)
    if row is None or row.gradient is None or gram is None:
        return {}
    diagonal = (gram.gram if isinstance(gram, Statistics) else gram).diagonal().double().sqrt()
    given = {} if isinstance(gram, Statistics) else {"tokens": tokens}
    roots = [(0.01 * diagonal).float().expand(weight.shape).contiguous() for weight in weights]
    return given | {"gradients": [Gradient(root, 2) for root in roots]}


def prune(weight, gram, method="wanda", refit="cg", pattern="2:4", **options):
    extra = {**FAST.get(method, {}), **with_gradient(method, [weight], gram), **options}
    return prune_weights([weight], gram, pattern, method, refit, **extra)[0]


def check_pruned(outcome, weight, keep=2, group=4):
    pruned = outcome.weight
    assert pruned.dtype == weight.dtype
    assert pruned.shape == weight.shape
    assert bool(torch.isfinite(pruned).all())
    assert bool(((pruned.reshape(len(weight), -1, group) != 0).sum(-1) <= keep).all())
    assert not bool(torch.signbit(pruned[pruned == 0]).any())


def with_entry(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def several(d_in=32, seed=13, dtype=torch.float32):
    """Matrices of different heights, one of them much larger in its weights, and their common statistics."""
    weight, gram = oracle.layer(19, d_in, seed=seed)
    heights = (8, 2, 9)
    return [
        (factor * part).to(dtype) for factor, part in zip((1.0, 50.0, 0.3), weight.split(heights), strict=True)
    ], Statistics(gram, 77)


def two_streams(d_in=32, seed=15):
    """The dense model's inputs, those of the pruned one, and the statistics of both, by halves."""
    x = oracle.correlated_inputs(400, d_in, seed=seed).float()
    noisy = x + 0.5 * x.square().mean(0).sqrt() * torch.tanh(x.roll(3, dims=1) / x.square().mean(0).sqrt())
    accumulator = GramAccumulator(d_in, halves=True)
    accumulator.add(noisy, x)
    return x.double(), noisy.double(), accumulator.finish()


def same_up_to_rounding(weight, other):
    """The same kept places, and values that differ by no more than a refit that stops at its tolerance."""
    difference = (weight - other).float().norm(dim=1) / other.float().norm(dim=1)
    return torch.equal(weight != 0, other != 0) and float(difference.amax()) < 5e-3


def forbid_work(monkeypatch):
    """Let every method of the table fail the test that runs it."""
    for name, row in methods.METHODS.items():
        monkeypatch.setitem(methods.METHODS, name, replace(row, solve=lambda *_: pytest.fail("work began")))
