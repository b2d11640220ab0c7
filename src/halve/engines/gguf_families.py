"""What a GGUF file says of a model besides its tokenizer: its architecture, sizes, and names of tensors.

Four families are written: those of `FAMILIES`. Their tensors are the checkpoint's, but that llama.cpp rotates
neighbours where transformers rotates halves, in the families that it calls ``llama``: there the rows of the query and
key projections are put in another order. Rows only: the pattern along d_in stays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halve.errors import UnsupportedModelError

_PLAIN_ROPE, _LINEAR, _LLAMA3 = "default", "linear", "llama3"
_ROPE_KEYS = {
    _PLAIN_ROPE: (),
    _LINEAR: ("factor",),
    _LLAMA3: ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What each kind of rotary embedding needs besides ``rope_theta``; nothing else may be set."""
FREQUENCIES = "rope_freqs.weight"
"""The tensor that has the factors of a rotary embedding that is scaled as Llama 3.1's is."""


@dataclass(frozen=True)
class Family:
    """One family of transformers.

    Attributes:
        architecture: what llama.cpp calls it.
        rotates_neighbours: whether the rows of queries and keys change their order.
    """

    architecture: str
    rotates_neighbours: bool


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", rotates_neighbours=True),
    "mistral": Family("llama", rotates_neighbours=True),
    "qwen2": Family("qwen2", rotates_neighbours=False),
    "qwen3": Family("qwen3", rotates_neighbours=False),
}
"""By the ``model_type`` of their configs."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of one of the families, as its config has them.

    Attributes:
        family: of the model.
        blocks: their number.
        width: of the residual stream.
        inner: width of the MLPs.
        heads: of queries.
        key_heads: of keys and values.
        head_width: of a head.
        context: tokens at most.
        vocabulary: rows of the embedding.
        epsilon: of the norms.
        rope: the rotary embedding's settings: ``rope_theta``, ``rope_type``, and what that needs.
        window: tokens that attention reaches back; None where it reaches all.
        tied: whether the output head is the embedding.
    """

    family: Family
    blocks: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    context: int
    vocabulary: int
    epsilon: float
    rope: Mapping[str, Any]
    window: int | None
    tied: bool

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read a config of transformers.

        Raises:
            UnsupportedModelError: it is of no family that is written, or has something that llama.cpp has not.
        """
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise UnsupportedModelError(
                f"a GGUF file is written of {', '.join(FAMILIES)}, and this is a {config.model_type}: convert it with "
                "llama.cpp's own script, which reads the pruned checkpoint as it is"
            )
        if config.hidden_act != "silu":
            raise UnsupportedModelError(f"llama.cpp has {family.architecture} with silu alone, not {config.hidden_act}")
        rope = dict(getattr(config, "rope_parameters", None) or {})
        _check_rope(rope)
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sliding = getattr(config, "use_sliding_window", True)
        return cls(
            family=family,
            blocks=config.num_hidden_layers,
            width=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_width=head_width,
            context=config.max_position_embeddings,
            vocabulary=config.vocab_size,
            epsilon=config.rms_norm_eps,
            rope=rope,
            window=getattr(config, "sliding_window", None) if sliding else None,
            tied=bool(config.tie_word_embeddings),
        )


def _check_rope(rope: dict[str, Any]) -> None:
    """Refuse rotary embeddings that the file would not have as the model has them.

    Raises:
        UnsupportedModelError: they are of another type, or have settings that are not written.
    """
    kind = rope.setdefault("rope_type", _PLAIN_ROPE)
    if kind not in _ROPE_KEYS:
        raise UnsupportedModelError(f"rotary embeddings of the type {kind!r} are not written to a GGUF file")
    given = {name for name, value in rope.items() if value is not None} - {"rope_type", "rope_theta"}
    given -= {"partial_rotary_factor"} if rope.get("partial_rotary_factor") == 1.0 else set()
    if odd := sorted(given ^ set(_ROPE_KEYS[kind])):
        raise UnsupportedModelError(
            f"rotary embeddings of the type {kind!r} are written to a GGUF file with these settings: "
            f"{', '.join(_ROPE_KEYS[kind]) or 'none'}; here {', '.join(odd)} is missing, or set as well"
        )


def write_shape(writer: Any, shape: Shape) -> None:
    """Put the sizes of a model into a file.

    Args:
        writer: a ``gguf.GGUFWriter``.
        shape: of the model.
    """
    import gguf

    writer.add_block_count(shape.blocks)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(float(shape.rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(shape.vocabulary)
    kind = shape.rope["rope_type"]
    if kind == _LINEAR:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(shape.rope["factor"]))


def frequencies(shape: Shape) -> Tensor | None:
    """Return the factors by which the rotary embedding's wavelengths are stretched, float32, (head_width / 2,).

    Returns:
        Tensor | None: None where they are not, or all by the same factor.
    """
    if shape.rope["rope_type"] != _LLAMA3:
        return None
    factor, low, high, trained = (
        float(shape.rope[name])
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    theta = float(shape.rope["rope_theta"])
    places = torch.arange(0, shape.head_width, 2, dtype=torch.float64) / shape.head_width
    wavelengths = 2 * math.pi * theta**places
    turns = trained / wavelengths  # in the context that the model was trained on
    between = (turns - low) / (high - low)
    stretched = 1 / ((1 - between) / factor + between)
    found = torch.where(turns > high, 1.0, torch.where(turns < low, factor, stretched))
    return found.to(torch.float32)


def as_rotated(name: str, tensor: Tensor, shape: Shape) -> Tensor:
    """Return a tensor of the checkpoint as llama.cpp multiplies it.

    Args:
        name: of the tensor in the checkpoint.
        tensor: (rows, …).
        shape: of the model.
    """
    heads = {"q_proj": shape.heads, "k_proj": shape.key_heads}.get(name.split(".")[-2])
    if heads is None or not shape.family.rotates_neighbours:
        return tensor
    halves = tensor.reshape(heads, 2, shape.head_width // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
