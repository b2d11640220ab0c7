"""The layers that hold matrices: ``Linear``, ``Conv1D``, ``Conv2d``, and experts fused into one parameter."""

from collections.abc import Iterator
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from halve.torch_internals import children_with_repeats

Layout = Literal["out_in", "in_out", "conv"]
"""How a matrix lies in its parameter: (d_out, d_in) as in ``Linear``; transposed as in GPT-2's ``Conv1D``; or
(d_out, channels, height, width) as in ``Conv2d``, whose matrix is (d_out, height * width * channels): the channels of
one tap of the kernel after the other, so that every group of a pattern is of channels at one tap."""


def matrix_view(parameter: Tensor, expert: int | None, layout: Layout, rows: int = 0) -> Tensor:
    """Return a matrix as (d_out, d_in): a view of the parameter that holds it, but for a convolution's a copy.

    Args:
        parameter: of two dimensions, of three if it holds the matrices of several experts, or of a convolution.
        expert: which of them, or which group of a grouped convolution; None for a parameter that is one matrix.
        layout: how it lies there.
        rows: of each group of a grouped convolution; of others it does not matter.
    """
    if layout == "conv":
        stored = parameter if expert is None else parameter.narrow(0, expert * rows, rows)
        return inputs_last(stored, layout).flatten(1)
    stored = parameter if expert is None else parameter[expert]
    return inputs_last(stored, layout)


def write_matrix(parameter: Tensor, expert: int | None, layout: Layout, matrix: Tensor) -> None:
    """Write a matrix (d_out, d_in) to its place in a parameter, in the parameter's dtype; see `matrix_view`."""
    if layout == "conv":
        first = 0 if expert is None else expert * len(matrix)
        stored = inputs_last(parameter.narrow(0, first, len(matrix)), layout)
        stored.copy_(matrix.reshape(stored.shape))
    else:
        matrix_view(parameter, expert, layout).copy_(matrix)


def inputs_last(tensor: Tensor, layout: Layout) -> Tensor:
    """Return a view of a tensor that lies as a parameter does, with the inputs that groups are of as last dimension.

    Returns:
        Tensor: (…, d_out, d_in), or (d_out, height, width, channels) of a convolution; `as_stored` is the inverse.
    """
    if layout == "conv":
        return tensor.movedim(1, -1)
    return tensor if layout == "out_in" else tensor.mT


def as_stored(tensor: Tensor, layout: Layout) -> Tensor:
    """Return a view of a tensor with the inputs last, as `inputs_last` has made it, that lies as the parameter does."""
    return tensor.movedim(-1, 1) if layout == "conv" else inputs_last(tensor, layout)


EXPERTS_IN_ONE = "experts in one parameter, which the model's own code multiplies"
"""Why fused experts cannot run sparse."""
CONVOLUTION = "a convolution, for which there is no sparse product"
"""Why convolutions cannot run sparse."""


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


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is a two-dimensional convolution that multiplies by its weight as it is.

    Classes derived from ``Conv2d`` with code of their own may pad as they like, or standardise the weight beforehand,
    which leaves no zeros.
    """
    if not isinstance(module, nn.Conv2d):
        return False
    return all(getattr(type(module), name) is getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward"))


def channels_of(layer: nn.Conv2d) -> int:
    """Return how many input channels each output of a convolution sees: those of its group."""
    return layer.in_channels // layer.groups


def positions_of(layer: nn.Module, x: Tensor) -> int:
    """Return at how many positions an input of a linear layer or a convolution has features."""
    features = layer.in_channels if is_convolution(layer) else layer_matrix(layer).shape[1]
    return x.numel() // features


def channel_parameters(module: nn.Module) -> dict[str, int]:
    """Return the tensors in which a module has a number or a kernel of its own for each channel, a norm or a scale.

    Returns:
        dict[str, int]: the dimension of the channels, by the name of the parameter or buffer in the module; nothing if
            it is no such module, or has layers within.
    """
    own = [
        (name, tensor)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.numel() > 1
    ]
    if is_convolution(module):
        return dict.fromkeys((name for name, _ in own), 0) if is_depthwise(module) else {}
    lengths = {tensor.numel() for _, tensor in own}
    along = {name: tuple(tensor.shape).index(max(tensor.shape)) for name, tensor in own}
    lean = all(tensor.is_floating_point() and max(tensor.shape) == tensor.numel() for _, tensor in own)
    within = any(True for child in module.children() for _ in child.parameters())
    return along if lean and len(lengths) == 1 and not within and not is_linear(module) else {}


def has_own_weight(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution with a weight of its own, none that is computed."""
    own = dict(module.named_parameters(recurse=False))
    return (is_linear(module) or is_convolution(module)) and "weight" in own


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether every output of a convolution sees one channel, and every channel has one output."""
    return layer.in_channels == layer.out_channels == layer.groups > 1


def parameter_or_buffer(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or the buffer of a module that has a name."""
    path, _, leaf = name.rpartition(".")
    found = getattr(module.get_submodule(path), leaf)
    assert isinstance(found, Tensor)  # noqa: S101 - the name is of one
    return found


def replace_buffer(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a buffer, such as statistics of a batch norm; what is there may lie in a file, and stays as it is."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    before = owner.get_buffer(leaf)
    setattr(owner, leaf, tensor.to(device=before.device, dtype=before.dtype, copy=True))


def geometry_of(layer: nn.Conv2d) -> tuple[object, ...]:
    """Return what decides, beside the input, which patches a convolution multiplies with its weight."""
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode


def patches(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return what a convolution multiplies with its weight at every position of its output.

    Args:
        x: (batch, channels, height, width), the convolution's input, not padded yet; or without the batch.
        layer: the convolution.

    Returns:
        Tensor: (groups, batch, out_height, out_width, d_in), d_in in the order of `Layout`'s ``conv``: times the
        transposed matrix of a group it gives that group's outputs, but for the bias.
    """
    x = x if x.ndim == 4 else x.unsqueeze(0)
    x = functional.pad(x, _padding(layer), _MODES.get(layer.padding_mode, layer.padding_mode))
    for dim, (size, step, apart) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    grouped = x.reshape(len(x), layer.groups, -1, *x.shape[2:])
    return grouped.permute(1, 0, 3, 4, 5, 6, 2).flatten(4)


_MODES = {"zeros": "constant"}
"""What ``torch.nn.functional.pad`` calls a padding, where a convolution has another name for it."""
_PATCHES = 1 << 24
"""Numbers in the patches that are made at once, at most, if they are not those of a single sample."""


def patches_in_parts(x: Tensor, layer: nn.Conv2d) -> Iterator[Tensor]:
    """Yield `patches` of as many samples at a time as take little memory: patches overlap, and repeat their inputs."""
    x = x if x.ndim == 4 else x.unsqueeze(0)
    each = layer.kernel_size[0] * layer.kernel_size[1] * x[:1].numel() // (layer.stride[0] * layer.stride[1])
    for part in torch.split(x, max(1, _PATCHES // max(each, 1))):
        yield patches(part, layer)


def _padding(layer: nn.Conv2d) -> list[int]:
    """Return the padding left, right, above and below: as ``torch.nn.functional.pad`` has it, the last first."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        whole = [apart * (size - 1) for size, apart in zip(layer.kernel_size, layer.dilation, strict=True)]
        return [side for size in reversed(whole) for side in (size // 2, size - size // 2)]
    assert not isinstance(layer.padding, str)  # noqa: S101 - it has two words alone
    return [size for size in reversed(layer.padding) for _ in range(2)]


def block_weight_count(block: nn.Module) -> int:
    """Count the weights of linear layers, fused experts, and convolutions but for depthwise ones below ``block``."""
    return sum(
        parameter.numel()
        for module in block.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if (holds_matrix(module) and leaf == "weight") or is_fused(module, parameter)
    )


def holds_matrix(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer, or a convolution whose outputs see more than one channel."""
    return is_linear(module) or (is_convolution(module) and channels_of(module) > 1)


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
