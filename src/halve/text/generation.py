"""Text that a model writes itself, for calibration without a corpus."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from halve.device import autocast, compute_dtype, evaluation_mode, model_device
from halve.errors import CalibrationError, UnsupportedModelError
from halve.memory import whole_memory
from halve.transformers_internals import DynamicCache, DynamicLayer, cache_keyword, queries_packed

Listen = Callable[[int, int, float], None]
"""Called with the tokens written, the tokens wanted, and the seconds that the rest takes at the mean speed so far."""

_BATCH = 128
_CACHE_BYTES = 2**33  # bound on the keys and values held, as is a quarter of the memory
_CHUNK = 256  # tokens summed up together, to find the one drawn without running sums over the whole vocabulary
_FIRST_WORD = 2.0  # seconds until the first estimate
_NEXT_WORD = 15.0


def sample_text(
    model: nn.Module,
    first: Tensor,
    seq_len: int,
    vocabulary: int,
    generator: torch.Generator,
    listen: Listen | None = None,
    batch: int | None = None,
) -> Tensor:
    """Continue texts at temperature 1, in batches as large as the key-value cache allows.

    Args:
        model: a causal language model.
        first: (samples, n) int64, what each text begins with, n at least 1 and at most ``seq_len``.
        seq_len: length of the texts, what they begin with included.
        vocabulary: only ids below are drawn: rows that pad the model's output have no text.
        generator: on the CPU; the texts do not depend on the size of the batches or on the device but for rounding.
        listen: told of the progress after the first seconds, a few times a minute, and at the end.
        batch: texts that are written at once, at most; 128 where nobody says.

    Returns:
        Tensor: (samples, seq_len) int64 on the CPU.

    Raises:
        CalibrationError: the model's logits are not finite.
        UnsupportedModelError: the model cannot generate with a key-value cache.
    """
    uniform = 1.0 - torch.rand(len(first), seq_len, generator=generator, dtype=torch.float64)
    progress = _Progress(len(first) * (seq_len - first.shape[1]), listen)
    device = model_device(model)
    with evaluation_mode(model), autocast(model, compute_dtype(device)) as dtype, ExitStack() as stack:
        if device.type == "cpu" and dtype == torch.float32:  # in bfloat16 it takes as long, and rounds otherwise
            stack.enter_context(queries_packed())
        size = _batch_size(len(first), _cache_bytes_per_token(model, dtype) * seq_len, device, batch or _BATCH)
        parts = [
            _sample(model, first[start : start + size], uniform[start : start + size], vocabulary, progress)
            for start in range(0, len(first), size)
        ]
    return torch.cat(parts)


def _batch_size(samples: int, cache_bytes: int, device: torch.device, batch: int) -> int:
    """Return how many texts are written at once: as many as may be, in batches of the same size but for the last.

    It follows the memory there is, not what is free of it, so that the same machine always writes the same text.
    """
    most = max(1, min(batch, min(_CACHE_BYTES, whole_memory(device) // 4) // max(1, cache_bytes)))
    batches = -(-samples // most)
    return -(-samples // batches)


class _Progress:
    """Tells a listener how much is written, and how long the rest will take."""

    def __init__(self, total: int, listen: Listen | None) -> None:
        self._total = total
        self._listen = listen
        self._done = 0
        self._begin = time.monotonic()
        self._next = self._begin + _FIRST_WORD

    def add(self, tokens: int) -> None:
        """Count tokens that have been written."""
        self._done += tokens
        if self._listen is None:
            return
        now = time.monotonic()
        if now >= self._next or self._done == self._total:
            self._next = now + _NEXT_WORD
            self._listen(self._done, self._total, (now - self._begin) * (self._total - self._done) / self._done)


def _sample(model: nn.Module, first: Tensor, uniform: Tensor, vocabulary: int, progress: _Progress) -> Tensor:
    """Continue ``first`` (batch, n) by inverting the distribution function at ``uniform`` (batch, len)."""
    device = model_device(model)
    ids = list(first.to(device).unbind(1))
    points = uniform.to(device)
    cache = None
    name = cache_keyword(model.forward)
    for position in range(first.shape[1], uniform.shape[1]):
        new = torch.stack(ids, dim=1) if cache is None else ids[-1][:, None]
        output = model(input_ids=new, use_cache=True, **{name: cache})
        cache = getattr(output, name, None)
        if cache is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} returns no {name}, so it cannot write its own calibration text: "
                "give another source"
            )
        if position == first.shape[1]:
            _make_room(cache, uniform.shape[1])
        probabilities = output.logits[:, -1, :vocabulary].softmax(-1, dtype=torch.float32)
        drawn = _draw(probabilities, points[:, position, None])
        if drawn is None:
            raise CalibrationError(f"the model's logits are not finite after {position} tokens of its own text")
        ids.append(drawn)
        progress.add(len(first))
    return torch.stack(ids, dim=1).cpu()


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor | None:
    """Return where the distribution functions pass ``uniform`` (batch, 1), (batch,); None if one is not finite.

    ``probabilities``, (batch, vocabulary), are summed up by chunks, and then token by token in one chunk of each row. A
    token of probability 0 is never drawn.
    """
    vocabulary = probabilities.shape[1]
    chunks = vocabulary // _CHUNK
    whole, tail = probabilities[:, : chunks * _CHUNK], probabilities[:, chunks * _CHUNK :]
    sums = torch.cat((whole.reshape(len(whole), chunks, _CHUNK).sum(-1), tail.sum(-1, keepdim=True)), dim=1)
    upper = sums.double().cumsum(-1)
    total = upper[:, -1:]
    if not bool(total.isfinite().all()):
        return None
    point = (uniform * total).clamp_min(torch.finfo(total.dtype).tiny)  # beyond 0, so that no empty chunk is found
    chunk = torch.searchsorted(upper, point)
    before = nn.functional.pad(upper, (1, 0)).gather(1, chunk)
    ids = chunk * _CHUNK + torch.arange(_CHUNK, device=chunk.device)
    inside = probabilities.gather(1, ids.clamp_max(vocabulary - 1)).double().masked_fill_(ids >= vocabulary, 0.0)
    cumulative = inside.cumsum(-1)
    rest = torch.minimum(point - before, cumulative[:, -1:])  # the chunk's sum was rounded in another order
    return ids.gather(1, torch.searchsorted(cumulative, rest)).squeeze(1)


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


def _cache_bytes_per_token(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token adds, at most: as if every block attended to the whole text."""
    config = text_config(model)

    def known(*names: str, default: int = 1) -> int:
        values = [getattr(config, name, None) for name in names]
        return max((value for value in values if isinstance(value, int) and value > 0), default=default)

    attending = known("num_attention_heads")
    heads = known("num_key_value_heads", default=attending)
    width = known("head_dim", "qk_head_dim", "v_head_dim", default=-(-known("hidden_size") // attending))
    return 2 * known("num_hidden_layers") * heads * width * dtype.itemsize
