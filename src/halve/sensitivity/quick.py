"""Pruned weights for a look at what pruning costs: Wanda's choice, from one forward pass over a few sequences.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024: weights stay by ``|W| ‖x‖₂``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import counted
from halve.maths.pattern import Pattern, apply_mask
from halve.model.blocks import Batch
from halve.model.layers import is_convolution, patches_in_parts, write_matrix
from halve.model.plan import Matrix
from halve.sensitivity.logits import logits_of
from halve.sensitivity.units import Unit


def input_norms(model: nn.Module, matrices: Sequence[Matrix], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return ``‖x_j‖₂`` over all positions, padded ones too, of the inputs of each matrix.

    Args:
        model: dense, where it is run.
        matrices: of it. Experts fused into one parameter have no layer that could be watched, and get no entry; nor
            does a matrix that no position reaches.
        batches: to run.

    Returns:
        dict[str, Tensor]: (d_in,) float32 by the matrix's name; of a convolution, over the patches of its group.
    """
    sums: dict[str, Tensor] = {}
    layers: dict[str, list[Matrix]] = {}  # several matrices of a grouped convolution
    for matrix in matrices:
        if not is_fused_expert(matrix):
            layers.setdefault(matrix.parameter.rpartition(".")[0], []).append(matrix)

    def add(held: Sequence[Matrix], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = (args[0] if args else next(iter(kwargs.values()))).detach().float()
        if x.numel() == 0:  # an expert called without tokens
            return
        for part in patches_in_parts(x, layer) if is_convolution(layer) else (x.unsqueeze(0),):
            for index, matrix in enumerate(held):
                squares = part[index].flatten(0, -2).square().sum(0)
                sums[matrix.name] = sums[matrix.name] + squares if matrix.name in sums else squares

    with ExitStack() as stack, torch.no_grad():
        for name, held in layers.items():
            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(partial(add, held), with_kwargs=True).remove)
        for batch in batches:
            logits_of(model, batch)
    return {name: total.sqrt() for name, total in sums.items()}


def is_fused_expert(matrix: Matrix) -> bool:
    """Whether a matrix is one of several experts in one parameter: no layer of its own is called with its inputs."""
    return matrix.expert is not None and matrix.layout != "conv"


def caution_of_unreached(matrices: Sequence[Matrix], norms: Mapping[str, Tensor]) -> str:
    """Return the sentence for matrices that no position reached, or nothing.

    Args:
        matrices: of a model.
        norms: of their inputs (`input_norms`).
    """
    unreached = [each.name for each in matrices if each.name not in norms and not is_fused_expert(each)]
    if not unreached:
        return ""
    of_all = f"{len(unreached)} of {counted(len(matrices), 'matrix', 'matrices')}"
    return (
        f"no token that damage is measured on reached {of_all} (the first is {unreached[0]}): pruning them shows no "
        "damage, so that they are pruned, and in a budget of perplexity they count as pruned by magnitude; give more "
        "keep_dense_tokens"
    )


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
        weight = matrix.view(parameter)
        scores = weight.abs()
        if matrix.name in norms:
            scores = scores * norms[matrix.name]
        write_matrix(pruned, matrix.expert, matrix.layout, apply_mask(weight, pattern.keep_mask(scores)))
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
