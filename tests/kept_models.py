"""Small pruned models, and trainings of them, for the tests of kept masks."""

import torch

from halve.maths.pattern import Pattern
from halve.model.layers import is_linear, layer_matrix
from models import decoder, tokens


def pruned_decoder(family="llama", pattern="2:4", **changes):
    """A tiny decoder in training mode whose matrices in blocks have the pattern; one group has a single non-zero."""
    model = decoder(family, **changes)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if is_linear(layer) and "head" not in name:
                matrix = layer_matrix(layer)
                matrix.copy_(Pattern(pattern).project(matrix))
                if ":" in pattern:
                    matrix[0, :4] = torch.tensor([0.0, 0.5, 0.0, 0.0])  # fewer than it may keep
    return model.train().requires_grad_(True)


def zeros(model):
    """Where each matrix of the blocks is zero, by name: an oracle that knows names instead of structure."""
    return {
        name: parameter.detach() == 0
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and "embed" not in name and "head" not in name and "wte" not in name and "wpe" not in name
    }


def assert_kept(model, before):
    """Pruned weights are +0.0, and at least some other weight of every matrix has moved from where it was."""
    for name, parameter in model.named_parameters():
        if name in before:
            pruned = parameter.detach()[before[name]]
            assert torch.equal(pruned, torch.zeros_like(pruned)), name
            assert not bool(torch.signbit(pruned).any()), name


def loss_of(model, seed=0, rows=4):
    ids = tokens(rows=rows, length=12, seed=seed)
    return model(input_ids=ids, labels=ids).loss


def train(model, optimiser, steps=3, accumulate=1):
    for step in range(steps):
        optimiser.zero_grad()
        for part in range(accumulate):
            (loss_of(model, seed=step * accumulate + part) / accumulate).backward()
        optimiser.step()
