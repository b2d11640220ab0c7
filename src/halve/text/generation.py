"""Text that a model writes itself, for calibration without a corpus."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from halve.device import autocast, compute_dtype, evaluation_mode, model_device, weight_dtype
from halve.errors import CalibrationError, UnsupportedModelError
from halve.transformers_internals import DynamicCache, DynamicLayer

_BATCH = 32
_CACHE_BYTES = 2**31  # bound on the keys and values held


def sample_text(model: nn.Module, first: Tensor, seq_len: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Continue texts at temperature 1, in batches as large as the key-value cache allows.

    Args:
        model: a causal language model.
        first: (samples,) int64, the first token of each text.
        seq_len: length of the texts, the first token included.
        vocabulary: only ids below are drawn: rows that pad the model's output have no text.
        generator: on the CPU; the texts do not depend on the size of the batches or on the device but for rounding.

    Returns:
        Tensor: (samples, seq_len) int64 on the CPU.

    Raises:
        CalibrationError: the model's logits are not finite.
        UnsupportedModelError: the model cannot generate with a key-value cache.
    """
    uniform = 1.0 - torch.rand(len(first), seq_len, generator=generator, dtype=torch.float64)
    batch = max(1, min(_BATCH, _CACHE_BYTES // (_cache_bytes_per_token(model) * seq_len)))
    with evaluation_mode(model), autocast(model, compute_dtype(model_device(model))):
        parts = [
            _sample(model, first[start : start + batch], uniform[start : start + batch], vocabulary)
            for start in range(0, len(first), batch)
        ]
    return torch.cat(parts)


def _sample(model: nn.Module, first: Tensor, uniform: Tensor, vocabulary: int) -> Tensor:
    """Continue ``first`` (batch,) by inverting the distribution function at ``uniform`` (batch, len)."""
    device = model_device(model)
    ids = [first.to(device)]
    cache = None
    # transformers called it past_key_values until 5.24.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    for position in range(1, uniform.shape[1]):
        output = model(input_ids=ids[-1][:, None], use_cache=True, **{name: cache})
        cache = getattr(output, name, None)
        if cache is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} returns no {name}, so it cannot write its own calibration text: "
                "give another source"
            )
        if position == 1:
            _make_room(cache, uniform.shape[1])
        cumulative = output.logits[:, -1, :vocabulary].float().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        if not bool(total.isfinite().all()):
            raise CalibrationError(f"the model's logits are not finite after {position} tokens of its own text")
        # At least the smallest float, as a token of probability 0 must never be drawn.
        point = (uniform[:, position, None].to(device, total.dtype) * total).clamp_min(torch.finfo(total.dtype).tiny)
        ids.append(torch.searchsorted(cumulative, point).squeeze(-1))
    return torch.stack(ids, dim=1).cpu()


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in memory taken once; the growing kind copies everything at each token.

    Under autocast they are kept in the dtype that attention converts them to anyway.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._filled = 0
        self._memory: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the keys and values, (batch, heads, tokens, width), and return all of them."""
        start = self._filled
        if not self._memory:
            self.lazy_initialization(key_states, value_states)
            kind = key_states.device.type
            dtype = key_states.dtype
            if dtype == torch.float32 and torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
            self._memory = [
                new.new_empty(*new.shape[:-2], self._room, new.shape[-1], dtype=dtype)
                for new in (key_states, value_states)
            ]
        self._filled = stop = start + key_states.shape[-2]
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[..., start:stop, :] = new
        keys, values = (memory[..., :stop, :] for memory in self._memory)
        self.keys, self.values = keys, values
        return keys, values


def _make_room(cache: Any, room: int) -> None:
    """Replace the plain growing layers of a cache by roomy ones with the same content; leave all others alone."""
    if not isinstance(cache, DynamicCache):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            roomy = _RoomyLayer(room)
            roomy.update(layer.keys, layer.values)
            cache.layers[index] = roomy


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's language part, None if it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _cache_bytes_per_token(model: nn.Module) -> int:
    """Bytes of keys and values that one token adds, at most: as if every attention head had its own."""
    config = text_config(model)
    layers, width = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", 1)
    return int(2 * layers * width * weight_dtype(model).itemsize)
