"""Adapters in a model in memory, told by their structure: matrices beside a layer, whose output they add to or scale.

Halve would prune the layer alone, for inputs and outputs that are not its own, and the adapters' matrices with it.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from halve.errors import InputError, first_few
from halve.model.layers import is_linear

_BASE = ("base_layer", "original_module")
"""What a wrapper calls the layer that it stands for."""
_LORA = "lora_"
"""How the names of LoRA's parts begin, whoever writes them: A, B, embedding_A, magnitude_vector, E, ..."""


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters that are not merged.

    Raises:
        InputError: it has some.
    """
    if found := sorted(set(adapter_parameters(model))):
        raise InputError(
            f"the {type(model).__name__} has adapters beside its weights, {first_few(found)}: merge them first "
            "(merge_and_unload() of peft), or give the base model without them (unload())"
        )


def adapter_parameters(model: nn.Module) -> Iterator[str]:
    """Yield the full names of the parameters of adapters that are not merged, some more than once."""
    for path, module in model.named_modules():
        base = next((name for name in _BASE if isinstance(getattr(module, name, None), nn.Module)), None)
        for name, _ in module.named_parameters(prefix=path, remove_duplicate=False):
            inner = name[len(path) + 1 if path else 0 :].split(".")
            if (base is not None and inner[0] != base) or any(part.startswith(_LORA) for part in inner):
                yield name
        yield from _low_rank_beside(path, module)


def _low_rank_beside(path: str, module: nn.Module) -> Iterator[str]:
    """Yield the parameters of a wrapper of one linear layer whose product has that layer's shape and a lower rank."""
    linear = [child for child in module.children() if is_linear(child)]
    if len(linear) != 1 or len(list(module.children())) != 1 or not isinstance(linear[0].weight, Tensor):
        return
    d_out, d_in = linear[0].weight.shape
    own = {name: set(p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim == 2}
    for one, inputs in own.items():
        for other, outputs in own.items():
            ranks = (inputs - {d_in}) & (outputs - {d_out})
            if one != other and d_in in inputs and d_out in outputs and any(r < min(d_in, d_out) for r in ranks):
                yield f"{path}.{one}" if path else one
