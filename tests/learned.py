"""A tiny model with every layout of a parameter, and a training loop that keeps the contract of a learner."""

import copy
import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from halve.learning.learner import Step
from halve.model.masked import pruned_parameters

LAYOUTS = {"first.weight": "out_in", "second.weight": "in_out", "experts": "out_in"}


class Mixed(nn.Module):
    """A linear layer, a norm, a `Conv1D`, experts in one parameter, and matrices that are nobody's business."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(8, 16)
        self.first = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.second = Conv1D(16, 32)
        self.experts = nn.Parameter(torch.randn(2, 8, 16) / 4)
        self.head = nn.Linear(8, 4, bias=False)
        nn.init.normal_(self.second.weight, std=0.2)
        self.to(dtype)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        hidden = hidden + self.second(torch.tanh(self.norm(self.first(hidden))))
        return self.head(torch.relu(torch.einsum("edi,...i->...ed", self.experts, hidden)).sum(-2))


def targets(model, layouts=LAYOUTS):
    return list(pruned_parameters(model, layouts))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, (4, 6), generator=generator) for _ in range(count)]


def diagonals(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    linear = [each for each in targets(model) if each.tensor.ndim == 2]
    return {each.name: torch.rand(each.inputs_last(each.tensor).shape[1], generator=generator) + 0.1 for each in linear}


def rate_at(step, peak):
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step.share)))


def train(model, learner, optimiser, total, *, first=0, last=None, rate=0.01, teacher=None, watch=None):
    """Distil from ``teacher`` (None: another random model) for the steps from ``first`` to before ``last``."""
    teacher = Mixed(next(model.parameters()).dtype, seed=7) if teacher is None else teacher
    data = batches(total)
    for number in range(first, total if last is None else last):
        step = Step(number, total)
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, rate)
        learner.begin_step(step)
        with torch.no_grad():
            wanted = teacher(data[number])
        loss = (model(data[number]) - wanted).square().mean()
        extra = learner.penalty()
        optimiser.zero_grad()
        (loss if extra is None else loss + extra).backward()
        learner.before_update(step)
        optimiser.step()
        learner.after_update(step, optimiser)
        if watch is not None:
            watch(step)


def attached(learner, model, rate=0.01, decay=0.0):
    """Attach a learner and return its optimiser."""
    return learner.optimiser(learner.attach(model), rate, decay)


def saved(model, learner, optimiser):
    return copy.deepcopy((model.state_dict(), optimiser.state_dict(), dict(learner.state())))


def bits(model):
    return {name: each.detach().clone().contiguous().view(torch.uint8) for name, each in model.state_dict().items()}


def kept_by_hand(scores, keep, group):
    """Return the mask of the largest scores of every group of a matrix, one entry after the other."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        for start in range(0, len(values), group):
            best = sorted(range(start, start + group), key=lambda each: (-values[each], each))[:keep]
            mask[row, best] = True
    return mask
