"""The proof that an order of channels changes nothing: the block is run in one, and everything compared."""

import torch

from halve.model.layers import channel_parameters, is_conv1d, parameter_or_buffer
from halve.order.folds import Fold, Move, permute, random_order
from halve.order.trial import Passed, Trial, unlike

_ROUNDING = 1e-4
"""Most that anything may differ by, relative to its norm: float32 sums in another order differ by some 1e-6."""
_EFFECT = 1e-2
"""Least that the consumer's outputs have to differ by where it is permuted alone."""


def is_proven(trial: Trial, fold: Fold, generator: torch.Generator) -> bool:
    """Whether a random order leaves everything as it is but the channels themselves, and matters to the consumer.

    Compared are the outputs of all layers that do not move their own, and all that the block returns or leaves in what
    it was given: values that a later block would take over count as well. Then the consumer is permuted alone, which
    has to change its outputs; else the sample shows nothing.

    Args:
        trial: of a block, whose parameters are left as they were.
        fold: what is to be proven.
        generator: on the CPU; draws the order.
    """
    order = random_order(fold.units, fold.width, generator)
    layer = fold.consumer.rpartition(".")[0]
    moved = {move.parameter.rpartition(".")[0] for move in fold.moves if _of_outputs(trial, move)}
    alone = Fold(fold.consumer, fold.units, fold.width, fold.moves[:1])
    for sample in trial.samples:
        before = trial.unchanged(sample)
        if before.calls[layer] != 1:
            return False
        after = _run_in(trial, fold, order, sample)
        others = [name for name in before.outputs if name not in moved]
        same = unlike([after.outputs[name] for name in others], [before.outputs[name] for name in others])
        if after.calls != before.calls or max(same, unlike(after.returned, before.returned)) > _ROUNDING:
            return False
        wrong = _run_in(trial, alone, order, sample)
        if unlike([wrong.outputs[layer]], [before.outputs[layer]]) < _EFFECT:
            return False
    return True


def _of_outputs(trial: Trial, move: Move) -> bool:
    """Whether what moves along it are channels that its layer gives, not those that it reads."""
    layer, _, leaf = move.parameter.rpartition(".")
    module = trial.layers[layer]
    outputs = 1 if is_conv1d(module) and leaf == "weight" else 0
    return bool(channel_parameters(module)) or move.dim == outputs


def _run_in(trial: Trial, fold: Fold, order: torch.Tensor, sample: int) -> Passed:
    before = permute(trial.block, fold, order)
    try:
        return trial.run(sample)
    finally:
        for name, tensor in before.items():
            parameter_or_buffer(trial.block, name).data = tensor
