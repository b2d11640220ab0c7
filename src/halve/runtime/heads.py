"""A model's output layer in integers: in small models a large part of what each token reads.

The weight stays beside its integers, since input embeddings may share it, long inputs are multiplied with it, and
checkpoints are written from it.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from halve.errors import InputError
from halve.model.layers import is_plain_linear, replace_module
from halve.runtime.linear import is_watched
from halve.runtime.native import dense_integers_linear, multiplies_dense_integers
from halve.runtime.packed_matrix import DTYPES
from halve.runtime.quantised_matrix import quantise_dense
from halve.torch_internals import has_hooks, writes_to

Head = Literal["own", "int8"]
"""What a dense output layer multiplies a few rows with."""


def quantise_head(model: nn.Module) -> None:
    """Let a model's dense output layer multiply a few rows in integers, as `accelerate` does with ``head="int8"``.

    Raises:
        InputError: the model has no output layer that can.
    """
    layer = _head_of(model)
    replace_module(model, layer, IntegerHead(layer))


def _head_of(model: nn.Module) -> nn.Linear:
    """Return the output layer of a model, which can multiply in integers.

    Raises:
        InputError: it cannot, or there is none.
    """
    found = output_layer(model)
    name = type(model).__name__
    if not isinstance(found, nn.Linear) or not is_plain_linear(found) or has_hooks(found) or "forward" in vars(found):
        raise InputError(f"this {name} has no plain linear output layer that could multiply in int8: leave head out")
    if reason := _why_not(found):
        raise InputError(f"the output layer of this {name} {reason}: leave head out")
    return found


def output_layer(model: nn.Module) -> Any:
    """Return the layer that turns a model's hidden states into logits, None if it has none."""
    asked: Any = getattr(model, "get_output_embeddings", lambda: None)
    return asked()


def check_head(head: str) -> None:
    """Refuse what is no kind of head, as it depends on nothing.

    Raises:
        InputError: there is no such kind.
    """
    if head not in get_args(Head):
        raise InputError(f"head is {head!r}: give {' or '.join(get_args(Head))}")


def head_to_quantise(model: nn.Module, chosen: Mapping[str, nn.Module], head: str) -> nn.Linear | None:
    """Return the output layer that is to multiply in integers, None if none is.

    Args:
        model: in memory.
        chosen: layers of it that are to run sparse, by name.
        head: one of `Head`.

    Raises:
        InputError: there is no such kind of head, or the model has no head that can have it.
    """
    check_head(head)
    if head == "own":
        return None
    found = _head_of(model)
    if any(found is layer for layer in chosen.values()):
        raise InputError(f"the output layer of this {type(model).__name__} is pruned and runs sparse: leave head out")
    return found


def _why_not(layer: nn.Linear) -> str:
    """Return what keeps an output layer from being an `IntegerHead`; empty if nothing does."""
    if layer.bias is not None:
        return "has a bias"
    if layer.weight.dtype not in DTYPES or layer.weight.device.type != "cpu":
        held = str(layer.weight.dtype).removeprefix("torch.")
        return f"is {held} on {layer.weight.device}, not bfloat16, float16 or float32 on the CPU"
    return "" if multiplies_dense_integers(1) else "has no compiled kernels to multiply with"


class IntegerHead(nn.Linear):
    """A model's output layer whose weight is there a second time, in integers of 8 bits, for products of a few rows.

    The weight itself stays, shared with the input embeddings or not: it is what is saved, what more rows are multiplied
    with, and what is multiplied with wherever a gradient is wanted or something records what is computed. Where it is
    replaced or written to, the integers are made anew; writing through ``weight.data`` is not seen.

    Args:
        layer: the plain one, of which `_why_not` has nothing to say.

    Raises:
        InputError: the weight is not finite, or too large to be quantised.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", None)
        self._quantise()

    def _quantise(self) -> None:
        self._alias = self.weight.detach()  # which keeps its memory, so that no other weight comes to the same address
        self._made_of = self._state()
        self._integers = quantise_dense(self.weight.detach())

    def _state(self) -> tuple[int, int]:
        """Return what changes when the weight does."""
        return self.weight.data_ptr(), writes_to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x of shape (..., in_features)."""
        wanted = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        rows = x.numel() // self.in_features
        same = x.dtype == self.weight.dtype in DTYPES and x.is_cpu and self.weight.is_cpu
        if (
            wanted
            or is_watched(x)
            or torch.is_autocast_enabled("cpu")
            or not same
            or not multiplies_dense_integers(rows)
        ):
            return nn.functional.linear(x, self.weight)
        if self._state() != self._made_of:
            self._quantise()
        return dense_integers_linear(x, self._integers)

    def extra_repr(self) -> str:
        """Return what is printed between the brackets."""
        return f"{super().extra_repr()}, values=int8"
