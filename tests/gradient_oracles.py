"""Gradients of single samples in plain float64 loops, for layers and for models."""

import copy

import torch


def double(model):
    """A float64 copy, which shares nothing."""
    return copy.deepcopy(model).double()


def root_of_squares(model, names, samples, value):
    """``√Σ g²`` of parameters by name: ``value(model, sample)`` is differentiated for one sample after the other."""
    parameters = [model.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_()
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for sample in samples:
        with torch.enable_grad():
            found = torch.autograd.grad(value(model, sample), parameters, allow_unused=True)
        totals = [
            total if gradient is None else total + gradient**2 for total, gradient in zip(totals, found, strict=True)
        ]
    return {name: total.sqrt() for name, total in zip(names, totals, strict=True)}


def next_token_loss(model, ids, **others):
    """The mean negative log-likelihood of the tokens of one row, each given those before."""
    logits = model(input_ids=ids[None], **others).logits[0]
    log_shares = logits.log_softmax(-1)
    return -sum(log_shares[place, ids[place + 1]] for place in range(len(ids) - 1)) / (len(ids) - 1)


def regression(d_out, d_in, samples, tokens, seed=0):
    """A layer with its inputs, and per-sample gradients of ``½ Σ |x w - y|²`` over a sample's tokens, by hand."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(d_in, generator=generator, dtype=torch.float64))
    x = torch.randn(samples, tokens, d_in, generator=generator, dtype=torch.float64) * scales
    weight = 0.05 * torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    noise = 0.01 * torch.randn(samples, tokens, d_out, generator=generator, dtype=torch.float64)
    gradients = [torch.einsum("to,ti->oi", noise[s], x[s]) for s in range(samples)]
    return weight, x, gradients


def kept(scores, keep, group):
    """The mask of the largest scores of every group, one group at a time."""
    scores = scores.detach()
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], group):
            part = scores[row, start : start + group]
            for place in sorted(range(len(part)), key=lambda j: (-float(part[j]), j))[:keep]:
                mask[row, start + place] = True
    return mask
