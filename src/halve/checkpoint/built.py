"""Whether a model in memory is what its config builds: else nothing that is written of it could be loaded."""

from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from halve.checkpoint.disk_layout import DiskLayout
from halve.errors import InputError, UnsupportedModelError, first_few, one_line
from halve.transformers_internals import build

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_unlike_config(model: "PreTrainedModel") -> None:
    """Refuse a model whose tensors, as ``save_pretrained`` writes them, are not those that its config builds.

    Tied weights count once, buffers where they are saved.

    Raises:
        InputError: a tensor is missing, is one too many, or has another shape.
        UnsupportedModelError: transformers cannot build the config at all, or a parameter cannot be traced to its
            tensors.
    """
    name = type(model).__name__
    try:
        with torch.device("meta"):
            built = build(type(model), deepcopy(model.config))
    except Exception as error:  # a config can provoke any error in there
        raise UnsupportedModelError(
            f"transformers could not build {name} from its config, so that what is written could not be loaded: "
            f"{one_line(error)}"
        ) from error
    ours = {tensor.name: tensor.shape for tensor in DiskLayout(model).tensors.values()}
    theirs = {tensor.name: tensor.shape for tensor in DiskLayout(built).tensors.values()}
    if lacking := [tensor for tensor in theirs if tensor not in ours]:
        what = f"lacks {len(lacking)} of the tensors that its config builds, {first_few(lacking)}"
    elif beyond := [tensor for tensor in ours if tensor not in theirs]:
        what = f"has {len(beyond)} tensors that its config does not build, {first_few(beyond)}"
    elif others := [tensor for tensor, shape in theirs.items() if ours[tensor] != shape]:
        first = others[0]
        what = f"has {first} of shape {ours[first]}, and its config builds shape {theirs[first]}"
    else:
        return
    raise InputError(
        f"the {name} {what}: what is written of it could not be loaded; make its config say what the model is "
        "(num_hidden_layers, vocab_size, ...), or give no output directory"
    )
