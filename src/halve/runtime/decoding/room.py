"""Keys and values of a cache in memory that is taken ahead, so that a further token need not copy those before it."""

from typing import Any

import torch
from torch import Tensor

AHEAD = 256
"""Tokens that there is memory for beyond those there are, at least."""


class Room:
    """Keys and values of a cache's layers; the cache's own become views of them.

    Both are (blocks, sequences, heads, capacity, width), of which the first ``length`` tokens are there.

    Args:
        layers: of transformers' kind ``DynamicLayer``, with keys and values of one shape and dtype.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.length = layers[0].keys.shape[2]
        self.capacity = self.length + max(AHEAD, self.length // 2)
        self.keys, self.values = (self._taken(len(layers), part) for part in (layers[0].keys, layers[0].values))
        for number, layer in enumerate(layers):
            self.keys[number, :, :, : self.length] = layer.keys
            self.values[number, :, :, : self.length] = layer.values
        self._shown: list[tuple[Tensor, Tensor]] = []

    @property
    def block_bytes(self) -> int:
        """Of the keys of one block."""
        return self.keys[0].nbytes

    def holds(self, layers: list[Any]) -> bool:
        """Return whether a cache's layers still have the views that they were given last."""
        shown = self._shown
        return len(shown) == len(layers) and all(
            layer.keys is keys and layer.values is values for layer, (keys, values) in zip(layers, shown, strict=True)
        )

    def grow(self) -> None:
        """See that there is memory for one token more."""
        if self.length < self.capacity:
            return
        self.capacity = self.length + max(AHEAD, self.length // 2)
        for name in ("keys", "values"):
            part = getattr(self, name)
            larger = self._taken(len(part), part[0])
            larger[:, :, :, : self.length] = part[:, :, :, : self.length]
            setattr(self, name, larger)

    def show(self, layers: list[Any], length: int) -> None:
        """Let a cache's layers have so many tokens."""
        self.length = length
        views = (part[:, :, :, :length].unbind(0) for part in (self.keys, self.values))
        self._shown = list(zip(*views, strict=True))
        for layer, shown in zip(layers, self._shown, strict=True):
            layer.keys, layer.values = shown

    def _taken(self, blocks: int, one: Tensor) -> Tensor:
        """Return memory for blocks of keys or values like those of one, (sequences, heads, tokens, width)."""
        sequences, heads, _, width = one.shape
        return torch.empty(blocks, sequences, heads, self.capacity, width, dtype=one.dtype)
