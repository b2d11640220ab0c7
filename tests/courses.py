"""Trainings in memory, of a few steps over made-up rows, and a learner whose steps can be followed by hand."""

import torch

from halve.learning.learner import Learner
from halve.learning.methods.fixed_mask import FixedMaskLearner
from halve.learning.options import Finetuning, Machine, Schedule, Shape, TrainingText
from halve.learning.pruned_weights import find_pruned
from halve.learning.training.course import Course
from halve.learning.training.text import TrainingRows
from halve.learning.training.watching import Watch
from halve.text.rows import IGNORED, Rows
from models import tokens

LENGTH = 8


def made_rows(count=32, held=6, uneven=True):
    ids = tokens(count + held, LENGTH)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    if uneven:  # as padding makes it
        for row in range(count):
            labels[row, 2 + row % 6 :] = IGNORED
    positions = torch.arange(LENGTH).expand(count + held, -1)
    parts = [Rows(ids[at], positions[at], labels[at]) for at in (slice(count), slice(count, None))]
    return TrainingRows(parts[0], torch.arange(count), parts[1], (), {"made": ids.numel()}, apart=False)


def asked(**options):
    groups = {"text": {"seq_len": LENGTH, "tokens": 256}, "schedule": {"learning_rate": 1e-2, "evaluations": 2}}
    groups["schedule"] |= {"batch_tokens": 8 * LENGTH, "forward_tokens": 4 * LENGTH, "warmup": 0.0, "clip": 0.0}
    for name in [name for name in options if name in vars(Schedule())]:
        groups["schedule"][name] = options.pop(name)
    dtype = options.pop("forward_dtype", "float32")
    return Finetuning(
        text=TrainingText(data="made", **groups["text"]),
        schedule=Schedule(**groups["schedule"]),
        machine=Machine(device="cpu", forward_dtype=dtype),
        **options,
    )


def course(student, teacher=None, rows=None, watch=None, **options):
    request = asked(**options)
    return Course(student, teacher, rows or made_rows(), request, Shape.of(request), None, watch)


def learner(model, kind=FixedMaskLearner):
    return kind(find_pruned(model)) if kind is FixedMaskLearner else kind()


class Plain(Learner):
    """SGD on all parameters, so that steps can be followed by hand."""

    def attach(self, model):
        return list(model.parameters())

    def optimiser(self, parameters, rate, decay):
        return torch.optim.SGD(parameters, lr=rate)

    def finish(self):
        pass


class Heard(Watch):
    """Keeps what it hears of a training."""

    def __init__(self):
        self.trials, self.points = {}, []

    def trial(self, rate, loss):
        self.trials[rate] = loss

    def point(self, point):
        self.points.append(point)
