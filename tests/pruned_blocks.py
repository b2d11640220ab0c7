"""What the tests of the block loop share: settings, batches, and what a pruned model must be."""

import torch

from halve.maths.pattern import Pattern
from halve.run.settings import Settings
from models import tokens

CPU = torch.device("cpu")


def settings(method="wanda", refit="none", pattern="2:4", **changes):
    return Settings(pattern=Pattern(pattern), method=method, refit=refit, **changes)


def batches(count=2, rows=4):
    return [{"input_ids": tokens(rows, seed=seed)} for seed in range(count)]


def assert_pruned(model, report):
    """Every reported matrix is in the pattern, every other parameter is exactly as before."""
    reported = {matrix.parameter for matrix in report.matrices}
    for matrix in report.matrices:
        parameter = model.get_parameter(matrix.parameter).data
        weight = parameter if matrix.layout == "out_in" else parameter.mT
        assert Pattern("2:4").satisfied_by(weight), matrix.name
        assert weight.isfinite().all()
        assert 0.2 < (weight == 0).float().mean() < 0.8
    return reported
