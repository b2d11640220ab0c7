"""The next token of a model of Llama's kind, its blocks computed in one call instead of hundreds.

In a small model what Python and PyTorch need around the products takes longer than the products. `decode_in_one_call`
replaces the ``forward`` of the inner model: where it is asked for one further token of a few sequences, on the CPU,
with a plain cache of keys and values, the compiled blocks compute it (``src/native/packed/decoder.cpp``); anything else
goes the ordinary way, through the modules. Numbers are rounded where transformers rounds them. Matrices may be packed,
quantised or dense.

What the modules hold is looked at before each token: a layer that is swapped, converted, moved or hooked is seen.
"""

import copy
from collections.abc import Iterator
from inspect import signature
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from halve.device import evaluation_mode
from halve.errors import HalveError, counted
from halve.model.layers import is_plain_linear
from halve.runtime.compiled import instruction_sets, library, quantised_instruction_sets
from halve.runtime.linear import SparseLinear
from halve.runtime.native import dense_operand, operand
from halve.runtime.packed_matrix import DTYPES
from halve.torch_internals import Holdings, hooks_of, is_recorded
from halve.transformers_internals import OUTPUT_CAPTURING, BaseModelOutputWithPast, DynamicCache, DynamicLayer

MOST_SEQUENCES = 16
"""That are decoded at once; with more, products take another way."""
_FAMILIES = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})
_LANE = 16
"""Numbers that the kernels work on at a time."""
_ROOM = 256
"""Tokens that a cache grows by, at least."""
_COMPARED = 8
"""Tokens that one call is compared with the modules on."""
_ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Share of what a block adds to its input that rounding explains, by dtype."""
_QUANTISED_ALLOWED = 0.1
"""The same where inputs are rounded to integers, of which the last bits of a sum decide now and then."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def decode_in_one_call(model: nn.Module) -> str:
    """Let the next token of a model be computed in one call, after comparing it with what the modules compute.

    Args:
        model: of transformers, in memory; its inner model is the one that is changed.

    Returns:
        str: why that is not possible, which leaves the model as it is; empty where it was done.

    Raises:
        HalveError: the two computations differ by more than rounding explains; the model is left as it was.
    """
    inner = _inner(model)
    if inner is None:
        return f"{type(model).__name__} is not of a family that is known to be computed like Llama"
    if "forward" in vars(inner):
        return "its forward has been replaced"
    step = NextToken(inner)
    if reason := step.why_not():
        return reason
    step.compare()
    vars(inner)["forward"] = step
    return ""


def decode_by_modules(model: nn.Module) -> None:
    """Undo `decode_in_one_call`; nothing happens where it was not done."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), NextToken):
            del vars(module)["forward"]


def computes_in_one_call(model: nn.Module) -> bool:
    """Return whether next tokens of a model are computed in one call."""
    return any(isinstance(vars(module).get("forward"), NextToken) for module in model.modules())


def _inner(model: nn.Module) -> nn.Module | None:
    """Return the stack of blocks of a model of one of the families."""
    found = [module for module in model.modules() if type(module).__name__ in _FAMILIES]
    ours = [module for module in found if type(module).__module__.startswith("transformers.models.")]
    return ours[0] if len(ours) == 1 else None


def _dtype(inner: nn.Module) -> torch.dtype:
    return cast("Tensor", inner.get_parameter("norm.weight")).dtype


class NextToken:
    """The ``forward`` of an inner model that computes one further token in one call, and all else as before.

    Args:
        inner: of one of the families.
    """

    def __init__(self, inner: nn.Module) -> None:
        self._inner = inner
        self._ordinary = type(inner).forward
        self.__signature__ = signature(self._ordinary).replace(
            parameters=list(signature(self._ordinary).parameters.values())[1:]
        )
        # transformers called it past_key_values until 5.24.
        self._cache_name = "cache" if "cache" in self.__signature__.parameters else "past_key_values"
        self._compiled: _Compiled | None = None
        self._rooms: WeakKeyDictionary[Any, _Room] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> "NextToken":
        """Return that of the copied model."""
        return NextToken(copy.deepcopy(self._inner, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it is made of: addresses mean nothing elsewhere."""
        return NextToken, (self._inner,)

    def why_not(self) -> str:
        """Return why the blocks cannot be computed in one call; empty if they can."""
        return _why_not(self._inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the inner model's ``forward``."""
        asked = self._asked(args, kwargs)
        if asked is None:
            return self._ordinary(self._inner, *args, **kwargs)
        return self.compute(*asked)

    def compute(self, x: Tensor, cache: Any, position: Tensor | None, mask: Tensor | None) -> Any:
        """Compute one token.

        Args:
            x: its embeddings, (batch, 1, hidden); left as they are.
            cache: of all tokens before; it gets this one's keys and values.
            position: (batch or 1, 1); None where it follows from the cache.
            mask: (batch, tokens), 0 where one is padding; None where none is.
        """
        compiled = self._compiled
        assert compiled is not None  # noqa: S101 - _asked has seen to it
        room = self._rooms.get(cache)
        if room is None or not room.holds(cache.layers):
            self._rooms[cache] = room = _Room(cache.layers)
        if position is None:
            position = torch.full((1, 1), room.length, dtype=torch.long)
        x = compiled.run(x, room, *self._rotary(x, position), mask)
        room.show(cache.layers, room.length + 1)
        return BaseModelOutputWithPast(**{"last_hidden_state": x, self._cache_name: cache})

    def compare(self) -> None:
        """Hold every block, computed for one token in one call, to its module.

        Block by block, since what rounding changes in one can grow to anything in those that follow.

        Raises:
            HalveError: one differs by more than rounding explains.
        """
        inner, config = self._inner, cast("Any", self._inner).config
        with evaluation_mode(inner), torch.no_grad(), torch.autocast("cpu", enabled=False):
            ids = torch.arange(_COMPARED).mul(config.vocab_size).floor_divide(_COMPARED).unsqueeze(0)
            cache = DynamicCache(config=config)
            self._ordinary(inner, **{"input_ids": ids[:, 1:], self._cache_name: cache})
            x = inner.get_submodule("embed_tokens")(ids[:, :1])
            position = torch.full((1, 1), _COMPARED - 1)
            cosines, sines = self._rotary(x, position)
            for number, block in enumerate(_blocks(inner)):
                room = _Room([cache.layers[number]])
                got = _Compiled([block], None).run(x, room, cosines, sines, None)
                asked = {"position_embeddings": (cosines, sines), "position_ids": position, self._cache_name: cache}
                expected = block(x, **asked)
                if (off := _off(x, expected, got, block)) > 1:
                    raise HalveError(
                        f"block {number} computed in one call differs from the modules' by {off:.2g} times what "
                        "rounding explains"
                    )
                x = expected

    def _rotary(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", self._inner.get_submodule("rotary_emb")(x, position))

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return the arguments of `compute`, None where the modules have to do what is asked for."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or self._inner.training:
            return None
        if torch.compiler.is_compiling() or is_recorded():
            return None
        given = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        ids, x = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        cache = given.pop(self._cache_name, None)
        position, mask = given.pop("position_ids", None), given.pop("attention_mask", None)
        given.pop("cache_position", None)
        wanted = given.pop("use_cache", None), given.pop("return_dict", None)
        new = ids if ids is not None else x
        if any(value is False for value in wanted) or any(value not in {None, False} for value in given.values()):
            return None
        if new is None or (ids is not None and x is not None) or new.shape[1] != 1 or len(new) > MOST_SEQUENCES:
            return None
        layers = getattr(cache, "layers", ())
        if not layers or any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in layers):
            return None
        before = layers[0].keys.shape
        if len(before) != 4 or before[0] != len(new) or before[2] == 0:
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (len(new), before[2] + 1)):
            return None
        if not self._ready(layers):
            return None
        x = self._inner.get_submodule("embed_tokens")(ids) if x is None else x
        compiled = self._compiled
        if compiled is None or x.dtype != compiled.dtype or x.device.type != "cpu":
            return None
        return x, cache, position, mask

    def _ready(self, layers: Any) -> bool:
        """Compile the blocks unless that has been done and still holds; return whether they are."""
        if self._compiled is None or not self._compiled.holds():
            self._compiled = None if self.why_not() else _Compiled(list(_blocks(self._inner)), self._inner)
        compiled = self._compiled
        return (
            compiled is not None
            and len(layers) == compiled.blocks
            and all(layer.keys.dtype == layer.values.dtype == compiled.dtype for layer in layers)
        )


class _Room:
    """Keys and values of a cache's layers in memory taken ahead; the cache's own are views of it.

    Both are (blocks, sequences, heads, capacity, width), of which the first ``length`` tokens are there.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.keys = torch.stack([layer.keys for layer in layers])
        self.values = torch.stack([layer.values for layer in layers])
        self.length = self.capacity = self.keys.shape[3]
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
        self.capacity = self.length + max(_ROOM, self.length // 2)
        self.keys, self.values = (self._larger(part) for part in (self.keys, self.values))

    def _larger(self, part: Tensor) -> Tensor:
        larger = part.new_empty(*part.shape[:3], self.capacity, part.shape[4])
        larger[:, :, :, : self.length] = part[:, :, :, : self.length]
        return larger

    def show(self, layers: list[Any], length: int) -> None:
        """Let a cache's layers have so many tokens."""
        self.length = length
        views = (part[:, :, :, :length].unbind(0) for part in (self.keys, self.values))
        self._shown = list(zip(*views, strict=True))
        for layer, shown in zip(layers, self._shown, strict=True):
            layer.keys, layer.values = shown


class _Compiled:
    """Blocks of a model, compiled for the parts that their modules hold now.

    Args:
        blocks: of which `_why_not` has nothing to say.
        inner: whose blocks they are, all of them, and whose norm comes last; None for blocks alone, without it.
    """

    def __init__(self, blocks: list[Any], inner: nn.Module | None) -> None:
        norm = None if inner is None else inner.get_submodule("norm")
        attention, mlp = blocks[0].self_attn, blocks[0].mlp
        width, weight = attention.head_dim, blocks[0].input_layernorm.weight
        self.dtype, self.blocks = weight.dtype, len(blocks)
        self._decoder = library.Decoder(
            instruction_sets()[0],
            quantised_instruction_sets()[0],
            DTYPES.index(self.dtype),
            len(weight),
            attention.q_proj.out_features // width,
            attention.k_proj.out_features // width,
            width,
            mlp.gate_proj.out_features,
            blocks[0].input_layernorm.variance_epsilon,
            attention.scaling,
            0 if norm is None else cast("Tensor", norm.weight).data_ptr(),
        )
        for block in blocks:
            norms = [0 if part is None else part.weight.data_ptr() for part in _norms(block)]
            self._decoder.add(norms, [_operand(layer) for layer in _layers(block)])
        others = [] if inner is None else [inner.get_submodule("norm"), inner.get_submodule("layers")]
        self._holdings = Holdings([*others, *(module for block in blocks for module in block.modules())], _is_heard)

    def run(self, x: Tensor, room: _Room, cosines: Tensor, sines: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the blocks, and the norm, make of one token of each sequence, (sequences, 1, hidden).

        Args:
            x: (sequences, 1, hidden); left as it is.
            room: keys and values of the tokens before; this one's are written behind them.
            cosines: (1 or sequences, 1, width), of the token's position.
            sines: likewise.
            mask: (sequences, tokens), 0 where one is padding; None where none is.
        """
        room.grow()
        x = x.clone(memory_format=torch.contiguous_format)
        cosines, sines = (part.expand(len(x), 1, -1).contiguous() for part in (cosines, sines))
        shown = None if mask is None else mask.to(torch.uint8).contiguous()
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

    def holds(self) -> bool:
        """Return whether the modules still hold what was compiled, and nobody listens to them."""
        return self._holdings.last()


def _blocks(inner: nn.Module) -> Iterator[Any]:
    layers: Any = inner.get_submodule("layers")
    return iter(layers[: cast("Any", inner).config.num_hidden_layers])


def _is_heard(module: nn.Module) -> bool:
    """Return whether hooks are on a module but those of transformers, which wait for somebody to ask for its output."""
    return any(getattr(hook, "__module__", "") != OUTPUT_CAPTURING for hook in hooks_of(module))


def _layers(block: Any) -> list[Any]:
    """Return the linear layers of a block, those of `_ATTENTION` and then those of `_MLP`."""
    attention = [getattr(block.self_attn, name) for name in _ATTENTION]
    return attention + [getattr(block.mlp, name) for name in _MLP]


def _norms(block: Any) -> list[Any]:
    """Return the norms of a block: of attention, of the MLP, of queries and of keys, None where there is none."""
    attention = block.self_attn
    own = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return [block.input_layernorm, block.post_attention_layernorm, *own]


def _operand(layer: nn.Module) -> list[int]:
    """Return a layer as the compiled blocks take it."""
    bias = layer.bias
    start = bias.data_ptr() if isinstance(bias, Tensor) else 0
    if isinstance(layer, SparseLinear):
        return [*operand(layer.packed), start]
    return [*dense_operand(cast("Tensor", layer.weight)), start]


def _off(x: Tensor, expected: Tensor, got: Tensor, block: Any) -> float:
    """Return how far a block's output is from what is expected, 1 for as far as rounding explains."""
    quantised = any(isinstance(layer, SparseLinear) and layer.bits for layer in _layers(block))
    share = max(_ALLOWED[x.dtype], _QUANTISED_ALLOWED if quantised else 0.0)
    before, after = x.double(), expected.double()
    allowed = share * (after - before).norm() + 2 * torch.finfo(x.dtype).eps * after.norm()
    off = float((got.double() - after).norm() / allowed)
    return off if off == off else float("inf")  # noqa: PLR0124 - NaN is not


def _why_not(inner: nn.Module) -> str:
    """Return why the blocks of a model of one of the families cannot be computed in one call; empty if they can."""
    if not instruction_sets() or not quantised_instruction_sets():
        return "the compiled kernels are not there"
    dtype = _dtype(inner)
    if dtype not in DTYPES:
        return f"its norms are {str(dtype).removeprefix('torch.')}"
    shapes = set()
    for block in _blocks(inner):
        if reason := _why_not_block(block, dtype):
            return reason
        shapes.add((block.self_attn.head_dim, *((layer.out_features, layer.in_features) for layer in _layers(block))))
    return "" if len(shapes) == 1 else f"its blocks have {counted(len(shapes), 'shape')}, not one"


def _why_not_block(block: Any, dtype: torch.dtype) -> str:
    if not isinstance(block.mlp.act_fn, nn.SiLU) and type(block.mlp.act_fn).__name__ != "SiLUActivation":
        return f"its activation is {type(block.mlp.act_fn).__name__}, not SiLU"
    if any(_is_heard(module) or "forward" in vars(module) for module in block.modules()):
        return "hooks are on its modules"
    width, hidden, inner = block.self_attn.head_dim, len(block.input_layernorm.weight), block.mlp.gate_proj.out_features
    if width % (2 * _LANE) or hidden % _LANE or inner % _LANE:
        return f"heads of width {width} are no multiple of {2 * _LANE}, or its vectors ({hidden}, {inner}) of {_LANE}"
    for name, layer in zip((*_ATTENTION, *_MLP), _layers(block), strict=True):
        if isinstance(layer, SparseLinear):
            own = layer.empty.dtype
        elif is_plain_linear(layer) and isinstance(layer, nn.Linear):
            own = layer.weight.dtype
            if layer.in_features % 64 or not layer.weight.is_contiguous():
                return f"{name} is dense, and d_in = {layer.in_features} no multiple of 64"
        else:
            return f"{name} is a {type(layer).__name__}"
        parts = [part for part in (*layer.parameters(), *layer.buffers()) if part.device.type != "cpu"]
        if own != dtype or parts:
            return f"{name} is not {str(dtype).removeprefix('torch.')} on the CPU, as its norms are"
    norms = [norm.weight for norm in _norms(block) if norm is not None]
    if any(weight.dtype != dtype or weight.device.type != "cpu" for weight in norms):
        return "its norms are of several dtypes, or not on the CPU"
    return ""
