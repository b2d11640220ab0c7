"""Blocks of tiny models on short samples, for the tests of orders of channels."""

import copy

import torch
from torch import nn

from halve.maths.pattern import Pattern
from halve.model.survey import plan_model
from halve.order.finding import find_folds
from halve.order.trial import Trial

CPU = torch.device("cpu")


def trials(model, batches):
    """Yield the name of every block, a trial of a copy of it, and the names of its prunable weights within it."""
    plan, runs = plan_model(model, batches, Pattern("2:4"), least=0.0, tower=None)
    names = iter(enumerate(plan.blocks))
    for run in runs:
        stream = run.capture(model, run.short)
        for place, block in enumerate(run.blocks):
            index, name = next(names)
            work = copy.deepcopy(block)
            trial = Trial(work, stream, place, CPU, torch.Generator().manual_seed(index))
            yield name, trial, [matrix.parameter.removeprefix(f"{name}.") for matrix in plan.of_block(index)]
            for sample in range(len(stream.hidden)):
                stream.run(place, sample, work, CPU, keep=True)


def first(model, batches):
    """Return the trial of a model's first block, and its folds by the consumer's name."""
    _, trial, consumers = next(trials(model, batches))
    return trial, {fold.consumer: fold for fold in find_folds(trial, consumers, (), seed=0)}


class Scaled(nn.Module):
    """An activation that treats every channel otherwise, by numbers of its own."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, width))

    def forward(self, hidden):
        return torch.relu(hidden) * self.scale
