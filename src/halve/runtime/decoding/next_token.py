"""The next token of a model of Llama's kind, its blocks computed in one call instead of hundreds.

In a small model what Python and PyTorch need around the products takes longer than the products. `decode_in_one_call`
replaces the ``forward`` of the inner model: where it is asked for one further token of a few sequences, on the CPU,
with a plain cache of keys and values, the compiled blocks compute it (``src/native/packed/decoder.cpp``); anything else
goes the ordinary way, through the modules. Numbers are rounded where transformers rounds them. Matrices may be packed,
quantised or dense.

What the modules hold is looked at before each token: one that is swapped, converted, moved, hooked or set otherwise is
seen, and its block compiled anew or computed by the modules.
"""

import copy
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from halve.runtime.decoding.blocks import Compiled, blocks_of, family_of, modules_of, why_not
from halve.runtime.decoding.comparing import compare
from halve.runtime.decoding.room import Room
from halve.torch_internals import has_global_hooks, is_recorded
from halve.transformers_internals import BaseModelOutputWithPast, DynamicCache, DynamicLayer, cache_keyword


def decode_in_one_call(model: nn.Module) -> str:
    """Let the next token of a model be computed in one call, after comparing it with what the modules compute.

    Args:
        model: of transformers, in memory; its inner model is the one that is changed.

    Returns:
        str: why that is not possible, which leaves the model as it is; empty where it is done, or had been before.

    Raises:
        HalveError: the two computations differ by more than rounding explains; the model is left as it was.
    """
    found = list(modules_of(model))
    if len(found) != 1:
        what = "has several stacks of blocks" if found else "is not of a family that is known to be computed like Llama"
        return f"{type(model).__name__} {what}"
    inner = found[0]
    if isinstance(vars(inner).get("forward"), NextToken):
        return ""
    if "forward" in vars(inner):
        return "its forward has been replaced"
    step = NextToken(inner)
    if reason := step.why_not() or compare(inner):
        return reason
    vars(inner)["forward"] = step
    return ""


def decode_by_modules(model: nn.Module) -> bool:
    """Undo `decode_in_one_call`; return whether there was anything to undo."""
    found = [module for module in model.modules() if isinstance(vars(module).get("forward"), NextToken)]
    for module in found:
        del vars(module)["forward"]
    return bool(found)


def computes_in_one_call(model: nn.Module) -> bool:
    """Return whether next tokens of a model are computed in one call."""
    return any(isinstance(vars(module).get("forward"), NextToken) for module in model.modules())


class NextToken:
    """The ``forward`` of an inner model that computes one further token in one call, and all else as before.

    Args:
        inner: of one of the families; it is not kept alive by this.
    """

    def __init__(self, inner: nn.Module) -> None:
        self._held = ref(inner)
        self._ordinary = type(inner).forward
        self.__signature__ = signature(self._ordinary).replace(
            parameters=list(signature(self._ordinary).parameters.values())[1:]
        )
        self._cache_name = cache_keyword(self._ordinary)
        self._compiled: Compiled | None = None
        self._rooms: WeakKeyDictionary[Any, Room] = WeakKeyDictionary()

    @property
    def _inner(self) -> Any:
        return self._held()

    def __deepcopy__(self, memo: dict[int, Any]) -> "NextToken":
        """Return that of the copied model."""
        return NextToken(copy.deepcopy(self._inner, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it is made of: addresses mean nothing elsewhere."""
        return NextToken, (self._inner,)

    def why_not(self) -> str:
        """Return why the blocks cannot be computed in one call; empty if they can."""
        inner = self._inner
        family = family_of(inner)
        return f"it has become a {type(inner).__name__}" if family is None else why_not(inner, family)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the inner model's ``forward``."""
        asked = self._asked(args, kwargs)
        if asked is None:
            return self._ordinary(self._inner, *args, **kwargs)
        return self._compute(*asked)

    def _compute(
        self, compiled: Compiled, x: Tensor, cache: Any, position: Tensor | None, mask: Tensor | None
    ) -> BaseModelOutputWithPast:
        """Compute one token; see `Compiled.run`. The cache gets its keys and values."""
        room = self._rooms.get(cache)
        if room is None or not room.holds(cache.layers):
            self._rooms[cache] = room = Room(cache.layers)
        if position is None:
            position = torch.full((1, 1), room.length, dtype=torch.long)
        cosines, sines = self._inner.rotary_emb(x, position)
        x = compiled.run(x, room, cosines, sines, mask)
        room.show(cache.layers, room.length + 1)
        return BaseModelOutputWithPast(**{"last_hidden_state": x, self._cache_name: cache})

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return the arguments of `_compute`, None where the modules have to do what is asked for."""
        inner = self._inner
        if inner.training or _is_watched() or _asks_for_more(inner.config):
            return None
        given = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        ids, x = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        cache, position = given.pop(self._cache_name, None), given.pop("position_ids", None)
        mask = given.pop("attention_mask", None)
        new = ids if ids is not None else x
        one = new is not None and (ids is None or x is None) and new.ndim >= 2 and new.shape[1] == 1
        if not one or not _is_plain_call(given) or type(cache) is not DynamicCache or not cache.layers:
            return None
        compiled = self._ready()
        if compiled is None or len(new) > compiled.most or not self._fits(compiled, cache, len(new)):
            return None
        tokens = (len(new), cache.layers[0].keys.shape[2] + 1)
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens):
            return None
        if position is not None and position.shape not in {(1, 1), (len(new), 1)}:
            return None
        x = inner.embed_tokens(ids) if x is None else x
        if x.shape != (len(new), 1, compiled.widths.hidden) or x.dtype != compiled.dtype or x.device.type != "cpu":
            return None
        return compiled, x, cache, position, mask

    def _ready(self) -> Compiled | None:
        """Return the blocks as compiled, anew unless what was compiled still holds; None where they cannot be."""
        if self._compiled is None or not self._compiled.holds():
            self._compiled = None if self.why_not() else Compiled(blocks_of(self._inner), self._inner)
        return self._compiled

    def _fits(self, compiled: Compiled, cache: Any, sequences: int) -> bool:
        """Return whether a cache holds keys and values of these blocks, of at least one token."""
        layers, room = cache.layers, self._rooms.get(cache)
        if room is not None and room.holds(layers):
            return compiled.takes_room(room, sequences)
        plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)
        return plain and compiled.takes(layers, sequences) and layers[0].keys.shape[2] > 0


def _is_watched() -> bool:
    """Return whether something records, transforms or listens to what modules compute."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return True
    return is_recorded() or has_global_hooks()


def _is_plain_call(more: dict[str, Any]) -> bool:
    """Return whether keyword arguments but for the inputs ask for nothing that modules alone do."""
    rest = {name: value for name, value in more.items() if name != "cache_position"}
    if any(rest.pop(name, None) is False for name in ("use_cache", "return_dict")):
        return False
    return all(value is None or value is False for value in rest.values())


def _asks_for_more(config: Any) -> bool:
    """Return whether a configuration wants outputs that modules alone have, or an attention of somebody's own."""
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return True
    return getattr(config, "_attn_implementation", None) not in {None, "sdpa", "eager"}
