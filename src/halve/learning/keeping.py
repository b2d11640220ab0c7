"""Keeping the mask of a pruned model through any training: whatever the optimiser, the schedule and the loop.

Gradients of pruned weights are zeroed as they accumulate, so that clipping sees what is used; and before and after each
step of any optimiser that has the parameters, which is noticed by a hook that PyTorch calls for all optimisers. So an
elementwise optimiser never moves a pruned weight, and one that mixes entries (Muon, Shampoo) has it put back.
"""

import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from halve.errors import HalveError, InputError, counted, first_few
from halve.learning.pruned_weights import find_pruned
from halve.maths.pattern import Pattern
from halve.model.masked import FixedMasks, PrunedParameter

_PLACE = "_halve_kept_masks"
"""The attribute of a model that holds its `KeptMasks`, so that they live as long as it does."""


def keep_masks(
    model: nn.Module, pattern: str | Pattern | None = None, *, record: str | Path | None = None
) -> "KeptMasks":
    """Keep the pruned weights of a model at zero from now on, through any training.

    The masks are fixed now: an entry that is zero now stays zero, and one that is not may pass through zero and come
    back. What is held are the parameters on record as pruned where the model was loaded from (masks that a training
    has saved there, or ``halve.json``), else the matrices in its blocks that are pruned to the pattern; never biases,
    norms, embeddings or adapters. Call it once the weights are loaded, before or after an optimiser is made, and
    before or after `DistributedDataParallel`, `torch.compile` or ``fully_shard``; of a model that is sharded already
    in all processes at once. An optimiser that has moments already has them masked at its next step.

    Args:
        model: pruned; wrapped or not.
        pattern: that its matrices have; None takes that on record, or 2:4.
        record: the directory of a pruned checkpoint, or its ``halve.json``; None looks where the model was loaded from.

    Returns:
        KeptMasks: the handle. If the model's masks are kept already, the one that keeps them.

    Raises:
        InputError: nothing is pruned; the weights are not as recorded; the model is wrapped by FSDP of the first
            version or by DeepSpeed, whose optimisers step copies.
    """
    _refuse_flattened(model)
    kept = getattr(_unwrapped(model), _PLACE, None)
    return kept if isinstance(kept, KeptMasks) else keep_these(model, lambda inner: find_pruned(inner, pattern, record))


def keep_these(model: nn.Module, find: Callable[[nn.Module], FixedMasks]) -> "KeptMasks":
    """Keep masks that are made for a model without its wrappers, instead of those that were kept before.

    Raises:
        InputError: as `keep_masks`.
    """
    _refuse_flattened(model)
    inner = _unwrapped(model)
    _refuse_empty(inner)
    masks = find(inner)
    if isinstance(before := getattr(inner, _PLACE, None), KeptMasks):
        before.remove()
    return KeptMasks(inner, masks)


class KeptMasks:
    """The handle of a model whose masks are kept. A copy of the model does not keep them.

    Args:
        model: in no wrapper.
        masks: of its parameters.

    Attributes:
        masks: what is held.
    """

    def __init__(self, model: nn.Module, masks: FixedMasks) -> None:
        self.masks = masks
        self._hooks: dict[str, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        self._model = weakref.ref(model)
        self._met: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        me = weakref.ref(self)

        def before(optimiser: Optimizer, _args: Any, _options: Any) -> None:
            if (kept := me()) is not None:
                kept._before_step(optimiser)  # noqa: SLF001 - its own

        def after(optimiser: Optimizer, _args: Any, _options: Any) -> None:
            if (kept := me()) is not None:
                kept._after_step(optimiser)  # noqa: SLF001 - its own

        steps = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
        self._forget_steps = weakref.finalize(self, _remove, steps)
        for each in masks.parameters:
            self._watch(each, _parameter(each))
        setattr(model, _PLACE, self)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _nothing, ()

    def __repr__(self) -> str:
        """Say what is held."""
        return f"KeptMasks({len(self.masks.parameters)} parameters held; .check(), .remove())"

    def remove(self) -> None:
        """Stop keeping the masks; the weights stay as they are. Twice is no error."""
        self._forget_steps()
        for _, hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        model = self._model()
        if model is not None and getattr(model, _PLACE, None) is self:
            delattr(model, _PLACE)

    def check(self) -> None:
        """Look whether every pruned weight is zero; of a sharded model in the shards of this process.

        Raises:
            HalveError: some are not.
        """
        broken = self.masks.broken()
        if broken:
            count = sum(broken.values())
            raise HalveError(
                f"{counted(count, 'pruned weight')} of {first_few(sorted(broken))} {'is' if count == 1 else 'are'} not "
                "zero: they were written outside of an optimiser's step; hold() puts the zeros back"
            )

    def hold(self) -> None:
        """Put the zeros back now: for loops that write weights by other means than an optimiser."""
        self.masks.hold()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks, eight entries in a byte, by the parameters' names, to be stored with a training's state.

        Of a sharded model every process has to ask at once.
        """
        return self.masks.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the masks that `state_dict` returned, and put their zeros into the weights.

        Raises:
            InputError: they are masks of other parameters.
        """
        self.masks.load_state_dict(state)
        self.masks.hold()
        self._met.clear()  # what optimisers remember is masked anew

    def _watch(self, each: PrunedParameter, parameter: Tensor) -> None:
        """Zero the gradient of pruned weights whenever one accumulates in a parameter."""
        me, name = weakref.ref(self), each.name  # a hook that holds the module would hold the parameter itself for ever

        def accumulated(tensor: Tensor) -> None:
            if (kept := me()) is not None:
                kept.masks.mask_gradient(name, tensor)

        if each.name in self._hooks:
            self._hooks[each.name][1].remove()
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # a frozen parameter takes no hook, and may be thawed later
        hook = parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
        parameter.requires_grad_(trained)
        self._hooks[each.name] = weakref.ref(parameter), hook

    def _stepped(self, optimiser: Optimizer) -> list[tuple[PrunedParameter, Tensor]]:
        """Return the held parameters that an optimiser has; those that were replaced are watched from now on.

        ``fully_shard`` replaces parameters, and their hooks are lost without a word. While a module computes it may
        also have a gathered copy in the parameter's place: so what counts is which of them the optimiser has.
        """
        has = {id(tensor): tensor for group in optimiser.param_groups for tensor in group["params"]}
        found = []
        for each in self.masks.parameters:
            watched = self._hooks[each.name][0]()
            if watched is not None and id(watched) in has:
                found.append((each, watched))
                continue
            now = _parameter(each)
            if id(now) in has:
                self._watch(each, now)
                self._met.discard(optimiser)
                found.append((each, now))
        return found

    def _before_step(self, optimiser: Optimizer) -> None:
        stepped = self._stepped(optimiser)
        for each, tensor in stepped:
            self.masks.mask_gradient(each.name, tensor)
        if stepped and optimiser not in self._met:
            self.masks.mask_moments(optimiser)
            self._met.add(optimiser)

    def _after_step(self, optimiser: Optimizer) -> None:
        for each, tensor in self._stepped(optimiser):
            self.masks.hold_weight(each.name, tensor)


def _remove(hooks: tuple[RemovableHandle, ...]) -> None:
    for hook in hooks:
        hook.remove()


def _nothing() -> None:
    """What a handle becomes in a copy of the model, or in a pickled one."""


def _parameter(each: PrunedParameter) -> Tensor:
    """Return a parameter as it is registered now.

    Raises:
        InputError: it is none any more.
    """
    found = getattr(each.owner, each.leaf, None)
    if not isinstance(found, nn.Parameter):
        raise InputError(
            f"{each.name} is no parameter of its module any more, so its mask cannot be kept: FSDP of the first "
            "version flattens parameters (use FSDP2), and a parametrisation replaces them (merge it first)"
        )
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel

    found: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return found


def _refuse_flattened(model: nn.Module) -> None:
    """Refuse wrappers that train flattened copies, in which weight and mask would lie at different places."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise InputError(
                "the model is wrapped by FSDP of the first version, which flattens parameters and cuts them anywhere, "
                "so that masks would hit other weights: use FSDP2 (fully_shard, or fsdp_version 2 of accelerate)"
            )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise InputError(
            "the model is sharded by DeepSpeed ZeRO-3, whose optimiser steps flattened copies of the weights, which no "
            "mask reaches: use FSDP2 or DistributedDataParallel"
        )


def _refuse_empty(model: nn.Module) -> None:
    """Refuse a model of which only the first process has the weights, before accelerate has sharded it."""
    spared = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in {"true", "1", "yes"}
    used = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in {"true", "1", "yes"}
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if used and spared and several and torch.distributed.get_world_size() > 1 and not _sharded(model):
        raise InputError(
            "with fsdp_cpu_ram_efficient_loading only the first process has weights before accelerate prepares the "
            "model: call keep_masks after accelerator.prepare"
        )


def _sharded(model: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
