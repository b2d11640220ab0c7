"""Pruned weights for a look at what pruning costs: Wanda's choice, from one forward pass over a few sequences.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024: weights stay by ``|W| ‖x‖₂``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halve.maths.pattern import Pattern, apply_mask
from halve.model.blocks import Batch
from halve.model.plan import Matrix
from halve.sensitivity.logits import logits_of
from halve.sensitivity.units import Unit


def input_norms(model: nn.Module, matrices: Sequence[Matrix], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return ``‖x_j‖₂`` over all positions, padded ones too, of the inputs of each matrix.

    Args:
        model: dense, where it is run.
        matrices: of it. Experts fused into one parameter have no layer that could be watched, and get no entry.
        batches: to run.

    Returns:
        dict[str, Tensor]: (d_in,) float32 by the matrix's name.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        squares = x.detach().float().flatten(0, -2).square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    with ExitStack() as stack, torch.no_grad():
        for matrix in matrices:
            if matrix.expert is None:
                layer = model.get_submodule(matrix.parameter.rpartition(".")[0])
                handle = layer.register_forward_pre_hook(partial(add, matrix.name), with_kwargs=True)
                stack.callback(handle.remove)
        for batch in batches:
            logits_of(model, batch)
    return {name: total.sqrt() for name, total in sums.items()}


def quickly_pruned(
    parameter: Tensor, matrices: Sequence[Matrix], norms: Mapping[str, Tensor], pattern: Pattern
) -> Tensor:
    """Return a parameter with its matrices pruned, in a tensor of its own.

    Args:
        parameter: dense, of any layout.
        matrices: that it holds.
        norms: of their inputs (`input_norms`); a matrix without goes by magnitude.
        pattern: to prune to.
    """
    pruned = parameter.clone()
    for matrix in matrices:
        weight = matrix.view(pruned)
        scores = weight.abs()
        if matrix.name in norms:
            scores = scores * norms[matrix.name]
        weight.copy_(apply_mask(weight, pattern.keep_mask(scores)))
    return pruned


@contextmanager
def pruned_in(model: nn.Module, units: Sequence[Unit], norms: Mapping[str, Tensor], pattern: Pattern) -> Iterator[None]:
    """Let a model have quickly pruned weights in some units; the dense ones, never written to, are put back after."""
    dense: dict[str, Tensor] = {}
    try:
        for unit in units:
            for name, matrices in unit.parameters.items():
                parameter = model.get_parameter(name)
                dense[name] = parameter.data
                parameter.data = quickly_pruned(parameter.data, matrices, norms, pattern)
        yield
    finally:
        for name, weight in dense.items():
            model.get_parameter(name).data = weight
