"""A parameter with a fixed mask: which entries may differ from zero, and how training is kept from the others."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halve.errors import InputError
from halve.model.layers import Layout, as_stored, inputs_last

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PrunedParameter:
    """A parameter of a model whose groups are pruned, or are to be.

    Attributes:
        name: its full name in the model.
        owner: the module that holds it.
        leaf: its name there.
        layout: how its matrices lie in it; a parameter of three dimensions holds several, one for each expert.
    """

    name: str
    owner: nn.Module
    leaf: str
    layout: Layout = "out_in"

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now; while it is parametrised, what the model multiplies with."""
        found = getattr(self.owner, self.leaf)
        assert isinstance(found, Tensor)  # noqa: S101 - a parameter always is
        return found

    def inputs_last(self, tensor: Tensor) -> Tensor:
        """Return a view of a tensor of the parameter's shape, groups along its last dimension; `as_stored` is back."""
        return inputs_last(tensor, self.layout)

    def as_stored(self, tensor: Tensor) -> Tensor:
        """Return a view of a tensor that has groups along its last dimension, in the parameter's shape."""
        return as_stored(tensor, self.layout)


def pruned_parameters(model: nn.Module, layouts: Mapping[str, Layout]) -> Iterator[PrunedParameter]:
    """Find parameters by name.

    Args:
        model: that has them.
        layouts: full name of each, and how its matrices lie in it.
    """
    for name, layout in layouts.items():
        path, _, leaf = name.rpartition(".")
        yield PrunedParameter(name=name, owner=model.get_submodule(path), leaf=leaf, layout=layout)


class FixedMasks:
    """Masks of parameters, taken once: where each may differ from zero, whatever it becomes.

    A parameter may move to another device, and be sharded into a `DTensor` or back, after its mask was taken: the mask
    follows it. What is masked is multiplied by the mask in place, and a sharded parameter shard by shard.

    Args:
        parameters: whose masks are fixed.
        masks: bool of each parameter's shape, by name, true where it may differ from zero. None takes the places where
            it does so now: an entry that is zero now stays zero, though its group may keep more.

    Raises:
        InputError: a mask is missing or has another shape; a parameter is on the meta device, or has no shape of its
            own.
    """

    def __init__(self, parameters: Iterable[PrunedParameter], masks: Mapping[str, Tensor] | None = None) -> None:
        self.parameters = tuple(parameters)
        self._kept: dict[str, Tensor] = {}
        for each in self.parameters:
            tensor = each.tensor.detach()
            if masks is None:
                _refuse_meta(tensor, each.name)
                self._kept[each.name] = tensor != 0
                continue
            if each.name not in masks:
                raise InputError(f"there is no mask for {each.name}: give one for each parameter")
            self._kept[each.name] = _laid_out(masks[each.name].bool(), tensor, each.name)

    def mask_for(self, name: str, tensor: Tensor) -> Tensor:
        """Return the mask of a parameter, bool, for a tensor that lies as the parameter does now.

        Args:
            name: of the parameter.
            tensor: the parameter, its gradient, or what else has its shape; sharded as it is, if it is a `DTensor`.

        Returns:
            Tensor: bool, on its device; of a `DTensor` the part of this process, as ``to_local()`` gives the tensor's.

        Raises:
            InputError: it has another shape than the mask.
        """
        kept = self._kept[name]
        if not _lies_alike(kept, tensor):
            kept = self._kept[name] = _laid_out(kept, tensor, name)
        return local_part(kept)

    @torch.no_grad()
    def mask(self, name: str, tensor: Tensor) -> None:
        """Multiply a tensor of a parameter's shape by its mask in place: what is masked out becomes +0.0 or -0.0."""
        local_part(tensor).mul_(self.mask_for(name, tensor))

    def mask_gradient(self, name: str, parameter: Tensor) -> None:
        """Mask the gradient that a parameter has, if it has one."""
        if parameter.grad is not None:
            self.mask(name, parameter.grad)

    @torch.no_grad()
    def hold_weight(self, name: str, parameter: Tensor) -> None:
        """Mask a parameter itself; what is masked out becomes +0.0."""
        local_part(parameter.detach()).mul_(self.mask_for(name, parameter)).add_(0.0)

    def mask_gradients(self) -> None:
        """Mask the gradients of all parameters that have one."""
        for each in self.parameters:
            self.mask_gradient(each.name, each.tensor)

    def hold(self) -> None:
        """Mask all parameters themselves."""
        for each in self.parameters:
            self.hold_weight(each.name, each.tensor)

    def mask_moments(self, optimiser: Optimizer) -> None:
        """Mask what an optimiser remembers of the parameters: floating-point tensors of a parameter's own shape.

        Needed where a mask is fixed in mid-training: what the gradients were before would move pruned weights on, and
        through optimisers that mix entries the kept ones too. Factored moments, of rows and columns, stay as they are.
        """
        for each in self.parameters:
            tensor = each.tensor
            for value in optimiser.state.get(tensor, {}).values():
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape == tensor.shape:
                    self.mask(each.name, value)

    @torch.no_grad()
    def broken(self) -> dict[str, int]:
        """Count the entries of each parameter that are masked out and not zero, where there are any, by name.

        Of a sharded parameter those in the shard of this process are counted.
        """
        found = {}
        for each in self.parameters:
            local = local_part(each.tensor.detach())
            # zero times infinity or NaN is no zero, and neither is NaN
            count = int(((local != 0) & ~self.mask_for(each.name, each.tensor)).sum())
            if count:
                found[each.name] = count
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return all masks whole, eight entries in a byte, by name: uint8 (…, ⌈d / 8⌉) for a parameter (…, d).

        Of sharded parameters every process has to ask at once, since the shards are gathered.
        """
        return {name: pack_mask(whole(kept)) for name, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all masks by those that `state_dict` returned. Nothing is masked by that alone.

        Raises:
            InputError: they are masks of other parameters.
        """
        if state.keys() != self._kept.keys():
            other = min(state.keys() ^ self._kept.keys())
            raise InputError(f"the saved masks are of other parameters: {other} is not among both")
        for each in self.parameters:
            tensor = each.tensor.detach()
            mask = unpack_mask(state[each.name], tuple(tensor.shape), each.name)
            self._kept[each.name] = _laid_out(mask, tensor, each.name)


def pack_mask(mask: Tensor) -> Tensor:
    """Put eight entries of a bool mask (…, d) in a byte: uint8 (…, ⌈d / 8⌉) on the CPU, the first in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))


def unpack_mask(packed: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Undo `pack_mask`.

    Args:
        packed: uint8 (…, ⌈d / 8⌉).
        shape: (…, d), of the mask.
        name: of the parameter, for messages.

    Raises:
        InputError: it is not the mask of a tensor of that shape.
    """
    expected = (*shape[:-1], -(-shape[-1] // 8))
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise InputError(
            f"the saved mask of {name} is {packed.dtype} {tuple(packed.shape)}, and should be uint8 {expected}: "
            "it was saved with another model"
        )
    bits = np.unpackbits(packed.cpu().numpy(), axis=-1, count=shape[-1], bitorder="little")
    return torch.from_numpy(bits).bool()


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor: the shard of a `DTensor`, which shares its memory; any other whole."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole; the shards of a `DTensor` are gathered, for which every process has to ask at once."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _lies_alike(mask: Tensor, tensor: Tensor) -> bool:
    """Whether a mask is on the device of a tensor and in the same shards."""
    if mask.shape != tensor.shape or mask.device != tensor.device:
        return False
    if _is_sharded(mask) and _is_sharded(tensor):
        return mask.device_mesh == tensor.device_mesh and mask.placements == tensor.placements
    return not _is_sharded(mask) and not _is_sharded(tensor)


def _refuse_meta(tensor: Tensor, name: str) -> None:
    if tensor.is_meta:
        raise InputError(f"{name} is on the meta device and has no zeros yet: load the weights first")


def _laid_out(mask: Tensor, tensor: Tensor, name: str) -> Tensor:
    """Return a mask on the device of a tensor, and sharded as it is."""
    _refuse_meta(tensor, name)  # a mask that went there would be lost
    if mask.shape != tensor.shape:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)} now, and its mask {tuple(mask.shape)}: the parameter was replaced "
            "by one that the mask does not fit (FSDP of the first version flattens parameters; use FSDP2)"
        )
    if not _is_sharded(tensor):
        return whole(mask).to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements
    if _is_sharded(mask) and mask.device_mesh == mesh:
        return mask.redistribute(placements=placements)
    # Each process cuts its own part from the mask that it has whole: nothing is sent.
    return distribute_tensor(whole(mask).to(tensor.device), mesh, placements, src_data_rank=None)
