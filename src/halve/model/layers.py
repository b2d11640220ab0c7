"""The layers that hold matrices: ``Linear``, ``Conv1D``, and experts fused into one parameter."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from halve.torch_internals import children_with_repeats

Layout = Literal["out_in", "in_out"]
"""How a matrix lies in its parameter: (d_out, d_in) as in ``Linear``, or transposed as in GPT-2's ``Conv1D``."""


def matrix_view(parameter: Tensor, expert: int | None, layout: Layout) -> Tensor:
    """Return a matrix as a (d_out, d_in) view of the parameter that holds it, writable in place.

    Args:
        parameter: of two dimensions, or of three if it holds the matrices of several experts.
        expert: which of them, None for a parameter of two dimensions.
        layout: how it lies there.
    """
    stored = parameter if expert is None else parameter[expert]
    return stored if layout == "out_in" else stored.T


EXPERTS_IN_ONE = "experts in one parameter, which the model's own code multiplies"
"""Why fused experts cannot run sparse."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``: a linear layer whose weight is stored as (d_in, d_out)."""
    from halve.transformers_internals import Conv1D

    return isinstance(module, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` multiplies its input by one weight matrix and adds a bias."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a ``Linear`` or ``Conv1D`` itself, not a class derived from one with code of its own."""
    return type(module) is nn.Linear or (is_conv1d(module) and type(module).__mro__[1] is nn.Module)


def layer_matrix(layer: nn.Module) -> Tensor:
    """Return the weight of a ``Linear`` or ``Conv1D`` as a (d_out, d_in) view."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - of these two it always is
    return matrix_view(weight, None, "in_out" if is_conv1d(layer) else "out_in")


def plain_layer(matrix: Tensor, bias: nn.Parameter | None, layout: Layout) -> nn.Module:
    """Return the ``Linear`` or ``Conv1D`` that multiplies by ``matrix`` (d_out, d_in); no weight gets a gradient."""
    from halve.transformers_internals import Conv1D

    d_out, d_in = matrix.shape
    with torch.device("meta"):
        made = nn.Linear(d_in, d_out) if layout == "out_in" else Conv1D(d_out, d_in)
    made.weight = nn.Parameter(matrix_view(matrix, None, layout).contiguous(), requires_grad=False)
    made.register_parameter("bias", bias)
    return made


def block_weight_count(block: nn.Module) -> int:
    """Count the weights of the linear layers and fused experts below ``block``."""
    return sum(
        parameter.numel()
        for module in block.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if (is_linear(module) and leaf == "weight") or is_fused(module, parameter)
    )


def is_fused(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether ``parameter`` of ``owner`` looks like the matrices of several experts, stacked along dimension 0."""
    return parameter.ndim == 3 and not isinstance(owner, _ConvNd)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module wherever another is."""
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in children_with_repeats(parent):
            if child is old:
                setattr(parent, name, new)
