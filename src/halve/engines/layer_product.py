"""``halve::layer_product``: what a layer of an engine computes, as one operator that compilers do not look into.

What multiplies, a packed matrix or a dense one, is looked up by a number that is read from a tensor while running. So a
compiled graph, which engines keep on disk for the next start, depends on shapes alone: not on which layers of which
checkpoint were packed. Beside a product of some microseconds `halve::sparse_linear`, which takes a matrix in parts and
checks them, would cost as much again.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor | None], Tensor]
"""Of x, (..., d_in), and a bias, (d_out,): y, (..., d_out), of the dtype of x."""
_products: dict[int, Product] = {}
_numbers = itertools.count()
_LIBRARY = torch.library.Library("halve", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("layer_product(Tensor x, Tensor? bias, Tensor number, int d_out) -> Tensor")  # type: ignore[no-untyped-call]


def hold(layer: nn.Module, product: Product) -> Tensor:
    """Keep the product of a layer for as long as the layer is there.

    Returns:
        Tensor: its number, int64, (), on the CPU: what `multiply` is given.
    """
    number = next(_numbers)
    _products[number] = product
    weakref.finalize(layer, _products.pop, number, None)
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def multiply(x: Tensor, bias: Tensor | None, number: Tensor, d_out: int) -> Tensor:
    """Return what the product of this number makes of x, (..., d_in): (..., d_out)."""
    return cast("Tensor", torch.ops.halve.layer_product(x, bias, number, d_out))


def _multiply(x: Tensor, bias: Tensor | None, number: Tensor, d_out: int) -> Tensor:
    del d_out
    return _products[int(number)](x, bias)


def _shape_alone(x: Tensor, bias: Tensor | None, number: Tensor, d_out: int) -> Any:
    del bias, number
    return x.new_empty(*x.shape[:-1], d_out)


_LIBRARY.impl("layer_product", _multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("halve::layer_product", _shape_alone, lib=_LIBRARY)
