"""Whether what is to be pruned is plain floating point on disk.

transformers dequantises by ``quantization_config`` in ``config.json``. Where that entry is lost, integers and float8
values are taken for weights as they are, without their scales, and the tensors that hold the scales are ignored.
"""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from halve.checkpoint.disk_layout import targets_on_loading
from halve.checkpoint.shards import TensorEntry, read_shard
from halve.errors import UnsupportedModelError, first_few

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BESIDE = re.compile(
    r"(?P<stem>.+?)(?:_scale_inv|_scale(?:_\d)?|_global_scale|_packed|_shape|_zero_point|_blocks|_scales|[._](?:SCB|"
    r"weight_format|qweight|qzeros|scales|biases|g_idx|absmax|quant_map|nested_absmax|nested_quant_map)|"
    r"\.quant_state\..+)"
)
"""Names of the tensors that quantised weights come with, after the name of the weight or of its layer."""
_REMEDIES = (
    (
        re.compile(r".*(_scale_inv|float8\w*)"),
        "load it with FineGrainedFP8Config(dequantize=True), and prune what save_pretrained writes",
    ),
    (
        re.compile(r".*(SCB|weight_format|absmax|quant_map|\.quant_state\..+)"),
        "load it with bitsandbytes installed, call model.dequantize(), and prune what save_pretrained writes",
    ),
    (re.compile(r".*"), "load it dequantised, as its method allows, and prune what save_pretrained writes"),
)


def refuse_quantised(name: str, shards: Sequence[Path], skeleton: Callable[[], "PreTrainedModel"]) -> None:
    """Refuse weights that are not plain floating point on disk; of the files, only headers are read.

    Integers and float8 values that are no matrix weights of the model, such as buffers, are nobody's business here.

    Args:
        name: of the checkpoint, for the message.
        shards: its weight files.
        skeleton: builds the model without its weights; called only where there is something to ask it.

    Raises:
        UnsupportedModelError: a weight of two or more dimensions is an integer or float8, or scales lie beside one.
    """
    entries = {entry.name: entry for path in shards for entry in read_shard(path).tensors}
    if not any(_not_plain(entry) or _BESIDE.fullmatch(tensor) for tensor, entry in entries.items()):
        return
    weights, beside = _found(skeleton(), entries.values())
    if not weights and not beside:
        return
    dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in weights})
    said = f"tensor {first_few([repr(entry.name) for entry in weights])} is {', '.join(dtypes)}" if weights else ""
    scales = f"{first_few([repr(name) for name in beside])} belongs to quantised weights" if beside else ""
    remedy = next(text for names, text in _REMEDIES if any(names.fullmatch(name) for name in (*beside, *dtypes)))
    raise UnsupportedModelError(
        f"{name} is not in plain floating point, and its config.json has no quantization_config that says how to "
        f"read it: {' and '.join(filter(None, (said, scales)))}; prune the unquantised original, or put that entry "
        f"back, {remedy}"
    )


def is_plain(dtype: torch.dtype) -> bool:
    """Whether values of a dtype are weights as they are: floating point of 16 bits or more."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _not_plain(entry: TensorEntry) -> bool:
    return len(entry.shape) > 1 and not is_plain(entry.dtype)


def _found(model: "PreTrainedModel", entries: Collection[TensorEntry]) -> tuple[list[TensorEntry], list[str]]:
    """Return the weights of a model that are not plain on disk, and the names of tensors beside its weights."""
    weights = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim > 1 and parameter.is_floating_point()
    }
    names = {entry.name for entry in entries}
    stems = {name: found["stem"] for name in names if (found := _BESIDE.fullmatch(name))}
    owners = {name: (stem, f"{stem}.weight") for name, stem in stems.items()}
    target = targets_on_loading(model, names.union(*owners.values()))
    state = model.state_dict().keys()
    beside = [
        name
        for name, owner in sorted(owners.items())
        if target[name] not in state and any(target[each] in weights for each in owner)
    ]
    return [entry for entry in entries if _not_plain(entry) and target[entry.name] in weights], beside
