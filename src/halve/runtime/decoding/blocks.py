"""Blocks of a model of Llama's kind, as compiled code computes them: which ones it can, and what they are made of."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from halve.model.layers import is_plain_linear
from halve.runtime.compiled import instruction_sets, library, quantised_instruction_sets
from halve.runtime.decoding.room import Room
from halve.runtime.linear import SparseLinear
from halve.runtime.native import dense_operand, few_rows, operand
from halve.runtime.packed_matrix import DTYPES
from halve.torch_internals import Holdings, hooks_of
from halve.transformers_internals import OUTPUT_CAPTURING

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Whose blocks compiled code computes: an RMSNorm before attention and before a gated MLP, rotary positions."""
MOST_SEQUENCES = 16
"""That are decoded at once, at most."""
_LANE = 16
"""Numbers that the compiled code works on at a time."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = ("SiLU", "SiLUActivation")


class Widths(NamedTuple):
    """Of a block's vectors: its input, a head, all heads together, those of keys, and inside the MLP."""

    hidden: int
    head: int
    heads: int
    keys: int
    inner: int


def family_of(inner: nn.Module) -> str | None:
    """Return the family whose own class a stack of blocks is of, None for any other class."""
    found = [name for name in FAMILIES if type(inner) is _class(name, "Model")]
    return found[0] if found else None


def blocks_of(inner: nn.Module) -> list[Any]:
    """Return the blocks that a stack computes."""
    stack: Any = inner
    return list(stack.layers[: stack.config.num_hidden_layers])


def widths_of(block: Any) -> Widths:
    """Return the widths of a block, as its first layers have them."""
    attention, mlp = block.self_attn, block.mlp
    return Widths(
        attention.q_proj.in_features,
        attention.head_dim,
        attention.q_proj.out_features,
        attention.k_proj.out_features,
        mlp.gate_proj.out_features,
    )


def is_heard(module: nn.Module) -> bool:
    """Return whether hooks are on a module but those of transformers, which wait for somebody to ask for its output."""
    return any(getattr(hook, "__module__", "") != OUTPUT_CAPTURING for hook in hooks_of(module))


def why_not(inner: nn.Module, family: str) -> str:
    """Return why compiled code cannot compute the blocks of a stack of one of the families; empty if it can."""
    if not instruction_sets() or not quantised_instruction_sets():
        return "the compiled kernels are not there"
    stack: Any = inner
    last = type(stack.norm)
    if last is not _class(family, "RMSNorm"):
        return f"its last norm is a {last.__name__}"
    if _is_replaced(stack.norm) or _is_replaced(stack.layers):
        return "hooks are on its last norm or on its list of blocks, or their forward is replaced"
    if reason := _why_not_vector("its last norm", stack.norm.weight, stack.norm.weight.dtype):
        return reason
    blocks = blocks_of(inner)
    for number, block in enumerate(blocks):
        reason = _why_not_classes(block, family) or _why_not_block(block, number, stack)
        if reason:
            return f"block {number}: {reason}"
    if not blocks:
        return "it has no blocks"
    if len({widths_of(block) for block in blocks}) > 1:
        return "its blocks differ in their widths"
    norms = [stack.norm, *(norm for block in blocks for norm in norms_of(block) if norm is not None)]
    if len({norm.variance_epsilon for norm in norms}) > 1 or len({block.self_attn.scaling for block in blocks}) > 1:
        return "its norms or its attentions are set differently"
    return ""


def _class(family: str, part: str) -> type | None:
    """Return transformers' own class for a part of a family's model."""
    module = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    found: type | None = getattr(module, f"{family}{part}", None)
    return found


def _is_replaced(module: nn.Module) -> bool:
    return is_heard(module) or "forward" in vars(module)


def _why_not_classes(block: Any, family: str) -> str:
    parts = {"": "DecoderLayer", "self_attn": "Attention", "mlp": "MLP"}
    parts |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), "RMSNorm")
    for name, part in parts.items():
        module = getattr(block, name, None) if name else block
        if type(module) is not _class(family, part):
            return f"{name or 'it'} is a {type(module).__name__}"
    for name in ("q_norm", "k_norm"):
        module = getattr(block.self_attn, name, None)
        if module is not None and type(module) is not _class(family, "RMSNorm"):
            return f"{name} is a {type(module).__name__}"
    if type(block.mlp.act_fn).__name__ not in _ACTIVATIONS:
        return f"its activation is {type(block.mlp.act_fn).__name__}, not SiLU"
    return ""


def _why_not_block(block: Any, number: int, stack: Any) -> str:
    """Return why a block, of classes that are known, cannot be computed."""
    replaced = [name for name, module in block.named_modules() if _is_replaced(module)]
    if replaced:
        return f"hooks are on {replaced[0] or 'it'}, or its forward is replaced"
    attention, config = block.self_attn, stack.config
    if attention.layer_idx != number:
        return f"it says that it is block {attention.layer_idx}"
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    if window is not None and window < config.max_position_embeddings:
        return f"its attention has a sliding window of {window} tokens"
    return _why_not_parts(block, stack.norm)


def _why_not_parts(block: Any, last_norm: Any) -> str:
    """Return why the matrices and norms of a block do not go together; empty if they do."""
    dtype, head = last_norm.weight.dtype, block.self_attn.head_dim
    if head % (2 * _LANE):
        return f"heads of width {head} are no multiple of {2 * _LANE}"
    layers = dict(zip((*_ATTENTION, *_MLP), layers_of(block), strict=True))
    for name, layer in layers.items():
        if reason := _why_not_layer(name, layer, dtype):
            return reason
    hidden, head, heads, keys, inner = widths_of(block)
    if hidden % _LANE or inner % _LANE:
        return f"vectors of {hidden} and {inner} numbers are no multiples of {_LANE}"
    shapes = [(heads, hidden), (keys, hidden), (keys, hidden), (hidden, heads), (inner, hidden), (inner, hidden)]
    for (name, layer), shape in zip(layers.items(), [*shapes, (hidden, inner)], strict=True):
        if (layer.out_features, layer.in_features) != shape:
            return f"{name} has shape {(layer.out_features, layer.in_features)}, where {shape} goes with the others"
    if heads % head or keys % head or heads % keys:
        return f"heads of {heads} and {keys} numbers do not go together"
    names = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "the last norm")
    sizes = (hidden, hidden, head, head, hidden)
    for name, norm, size in zip(names, [*norms_of(block), last_norm], sizes, strict=True):
        if norm is not None and (reason := _why_not_vector(name, norm.weight, dtype, size)):
            return reason
    return ""


def _why_not_layer(name: str, layer: nn.Module, dtype: torch.dtype) -> str:
    held = str(dtype).removeprefix("torch.")
    if isinstance(layer, SparseLinear):
        if layer.empty.dtype != dtype or any(part.device.type != "cpu" for part in layer.buffers()):
            return f"{name} is not {held} on the CPU, as its norms are"
    elif is_plain_linear(layer) and isinstance(layer, nn.Linear):
        weight = layer.weight
        if not _is_plain(weight) or weight.dtype != dtype or weight.device.type != "cpu":
            return f"the weight of {name} is no plain tensor in {held} on the CPU, as its norms are"
        if not weight.is_contiguous() or weight.shape[1] % 64:
            return f"the dense weight of {name} is not contiguous, or its {weight.shape[1]} columns no multiple of 64"
        if instruction_sets()[0] == "portable":
            return f"{name} is dense, which PyTorch multiplies faster than portable code"
    else:
        return f"{name} is a {type(layer).__name__}"
    bias = layer.bias
    return _why_not_vector(f"the bias of {name}", bias, dtype) if isinstance(bias, Tensor) else ""


def _why_not_vector(name: str, vector: Tensor, dtype: torch.dtype, size: int | None = None) -> str:
    if not _is_plain(vector) or vector.device.type != "cpu" or vector.dtype != dtype or dtype not in DTYPES:
        return f"{name} is {str(vector.dtype).removeprefix('torch.')} on {vector.device}, or no plain tensor"
    if not vector.is_contiguous() or (size is not None and vector.shape != (size,)):
        return f"{name} has shape {tuple(vector.shape)}, or is not contiguous"
    return ""


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's numbers are where its address says; a subclass may keep them elsewhere."""
    return type(tensor) in {Tensor, nn.Parameter} and type(tensor.data) is Tensor and tensor.layout == torch.strided


def layers_of(block: Any) -> list[Any]:
    """Return the linear layers of a block: query, key, value, output, gate, up and down."""
    attention = [getattr(block.self_attn, name) for name in _ATTENTION]
    return attention + [getattr(block.mlp, name) for name in _MLP]


def norms_of(block: Any) -> list[Any]:
    """Return the norms of a block: of attention, of the MLP, of queries and of keys, None where there is none."""
    own = [getattr(block.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [block.input_layernorm, block.post_attention_layernorm, *own]


class Compiled:
    """Blocks of a model, compiled for the parts that their modules hold now.

    Args:
        blocks: of which `why_not` has nothing to say.
        inner: whose blocks they are, all of them, and whose norm comes last; None for blocks alone, without it.
    """

    def __init__(self, blocks: list[Any], inner: nn.Module | None) -> None:
        norm: Any = None if inner is None else inner.get_submodule("norm")
        weight, first = blocks[0].input_layernorm.weight, norms_of(blocks[0])
        self.dtype, self.blocks, self.widths = weight.dtype, len(blocks), widths_of(blocks[0])
        self.most = min(MOST_SEQUENCES, few_rows(self.dtype))
        hidden, head, heads, keys, inside = self.widths
        eps, scale = first[0].variance_epsilon, blocks[0].self_attn.scaling
        self._decoder = library.Decoder(
            instruction_sets()[0],
            quantised_instruction_sets()[0],
            DTYPES.index(self.dtype),
            hidden,
            heads // head,
            keys // head,
            head,
            inside,
            eps,
            scale,
            0 if norm is None else norm.weight.data_ptr(),
        )
        modules = [] if inner is None else [norm, inner.get_submodule("layers")]
        settings: list[tuple[Any, str]] = [(norm, "variance_epsilon")] if norm is not None else []
        if inner is not None:
            settings.append((inner.config, "num_hidden_layers"))
        for block in blocks:
            norms = norms_of(block)
            self._decoder.add(
                [0 if part is None else part.weight.data_ptr() for part in norms],
                [_operand(layer) for layer in layers_of(block)],
            )
            modules += block.modules()
            settings += [(part, "variance_epsilon") for part in norms if part is not None]
            settings += [(block.self_attn, name) for name in ("scaling", "layer_idx", "head_dim")]
        self._holdings = Holdings(modules, settings, is_heard)

    def holds(self) -> bool:
        """Return whether the modules still hold what was compiled, and nobody listens to them."""
        return self._holdings.still_hold()

    def takes(self, layers: list[Any], sequences: int) -> bool:
        """Return whether a cache's layers, ``DynamicLayer``, hold keys and values of these blocks."""
        _, head, _, keys, _ = self.widths
        shape = (sequences, keys // head, layers[0].keys.shape[2], head) if layers[0].keys is not None else None
        return len(layers) == self.blocks and all(
            part is not None and part.shape == shape and part.dtype == self.dtype and part.device.type == "cpu"
            for layer in layers
            for part in (layer.keys, layer.values)
        )

    def takes_room(self, room: Room, sequences: int) -> bool:
        """Return whether keys and values that were taken before are those of these blocks."""
        _, head, _, keys, _ = self.widths
        blocks, rows, heads, _, width = room.keys.shape
        shape = (self.blocks, sequences, keys // head, head)
        return (blocks, rows, heads, width) == shape and room.keys.dtype == self.dtype

    def run(self, x: Tensor, room: Room, cosines: Tensor, sines: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the blocks, and the norm, make of one token of each sequence, (sequences, 1, hidden).

        Args:
            x: (sequences, 1, hidden), of the blocks' dtype; left as it is.
            room: keys and values of the tokens before, of which `takes` says that they fit; this one's are written
                behind them.
            cosines: (1 or sequences, 1, width of a head), of the token's position, of the same dtype.
            sines: likewise.
            mask: (sequences, tokens), 0 where one is padding; None where none is.
        """
        room.grow()
        x = x.clone(memory_format=torch.contiguous_format)
        shape = (len(x), 1, self.widths.head)
        cosines, sines = (part.to(self.dtype).expand(shape).contiguous() for part in (cosines, sines))
        shown = None if mask is None else mask.to(torch.bool).to(torch.uint8).contiguous()
        self._decoder.run(
            len(x),
            x.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            room.keys.data_ptr(),
            room.values.data_ptr(),
            room.block_bytes,
            room.length,
            room.capacity,
            0 if shown is None else shown.data_ptr(),
            torch.get_num_threads(),
        )
        return x


def _operand(layer: nn.Module) -> list[int]:
    """Return a layer as the compiled blocks take it: the numbers of its matrix, and the address of its bias or 0."""
    bias = layer.bias
    start = bias.data_ptr() if isinstance(bias, Tensor) else 0
    matrix = operand(layer.packed) if isinstance(layer, SparseLinear) else dense_operand(_weight(layer))
    return [*matrix, start]


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)  # noqa: S101 - of a linear layer it is
    return layer.weight


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the stacks of blocks in a model that are of one of the families."""
    yield from (module for module in model.modules() if family_of(module) is not None)
