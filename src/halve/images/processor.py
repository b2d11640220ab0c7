"""The image processor that belongs to a model: found, loaded, and what it makes of pictures."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint.load import LoadedModel, Source, source_files, validated_files
from halve.errors import InputError, one_line
from halve.images.pictures import Picture, check_pillow, opened

PIXELS = "pixel_values"
_SETTINGS = ("preprocessor_config.json", "processor_config.json")


def sees_pictures(model: nn.Module) -> bool:
    """Whether pictures are all that a model takes, as far as it says what it takes."""
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "main_input_name", "") == PIXELS and not decodes


def check_sees(model: nn.Module, what: str) -> None:
    """Refuse a model that takes something else than pictures, or more.

    Args:
        model: one that does not say what it takes is believed to see.
        what: is given to it, a clause.

    Raises:
        InputError: pictures are not what it takes.
    """
    if sees_pictures(model) or not hasattr(model, "main_input_name"):
        return
    taken = str(model.main_input_name)
    instead = "give text" if taken == "input_ids" else f"give batches in Python, calibration=[{{{taken!r}: …}}]"
    needed = f"needs more than {taken}" if taken == PIXELS else f"takes {taken}"
    raise InputError(f"{what}, and {type(model).__name__} {needed}: {instead}")


def input_name(model: nn.Module) -> str:
    """Return what a model's forward calls the pictures; of one that is none of transformers', its first argument."""
    named = getattr(model, "main_input_name", None)
    return str(named) if named is not None else next(iter(signature(model.forward).parameters), PIXELS)


def processor_of(loaded: LoadedModel) -> Any:
    """Return the image processor of a model: the one that was given along with it, or that of its checkpoint.

    Raises:
        InputError: it has none, it cannot be loaded, or Pillow is missing.
    """
    check_pillow()
    given = getattr(loaded.tokenizer, "image_processor", loaded.tokenizer)
    if _is_image_processor(given):
        return given
    if loaded.source is None:
        raise InputError(
            "a model in memory has no image processor, so pictures cannot be used: give one as tokenizer "
            f"(AutoImageProcessor.from_pretrained(…)), or ready tensors {{{input_name(loaded.model)!r}: …}}"
        )
    return load_image_processor(loaded.source)


def load_image_processor(source: Source) -> Any:
    """Load the image processor of a checkpoint, in its form that works with Pillow alone.

    Raises:
        InputError: it has none, it cannot be loaded, or Pillow is missing.
    """
    check_pillow()
    if source.kind == "gguf" or not {path.name for path in source_files(source)} & set(_SETTINGS):
        raise InputError(
            f"{source.name} has no image processor, so pictures cannot be used: put its preprocessor_config.json "
            "beside the weights"
        )
    from transformers import AutoImageProcessor

    with validated_files(source) as directory:
        try:
            return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                directory, backend="pil", local_files_only=True, trust_remote_code=source.trust_remote_code
            )
        except Exception as error:  # a foreign config can provoke any error in there
            raise InputError(
                f"the image processor of {source.name} could not be loaded: {one_line(error)}; mend its "
                "preprocessor_config.json"
            ) from error


def prepared(picture: Picture, processor: Any, model: nn.Module) -> tuple[Mapping[str, Tensor], bytes]:
    """Turn a picture into what a model's forward takes, by the model's image processor.

    Args:
        picture: which.
        processor: of the model.
        model: the model.

    Returns:
        tuple[Mapping[str, Tensor], bytes]: keyword arguments of its forward, a batch of one: ``pixel_values``
        (1, channels, height, width) float32, and what else the processor makes that the forward takes; and the
        uint8 pixels that the processor was given.

    Raises:
        InputError: the picture is not readable, the processor fails, or the model takes neither 1 nor 3 channels.
    """
    channels = getattr(getattr(model, "config", None), "num_channels", 3)
    if channels not in (1, 3):
        raise InputError(
            f"{type(model).__name__} takes {channels} channels, and pictures have 1 or 3: give ready tensors, "
            f"{{{input_name(model)!r}: …}}"
        )
    image = opened(picture, channels)
    try:
        found = dict(processor(images=[image], return_tensors="pt"))
        taken = signature(model.forward).parameters
        rows = {name: value for name, value in found.items() if name in taken and isinstance(value, Tensor)}
        rows[input_name(model)] = found[PIXELS]
    except Exception as error:  # a foreign processor can raise anything
        raise InputError(f"the model's image processor fails on {picture.where}: {one_line(error)}") from error
    return rows, image.tobytes()


def stacked(rows: Sequence[Mapping[str, Tensor]], most: int) -> list[Mapping[str, Tensor]]:
    """Put batches of one together, at most ``most`` of the same shapes, in their order."""
    groups: list[list[Mapping[str, Tensor]]] = []
    for row in rows:
        alike = groups and _shapes(groups[-1][0]) == _shapes(row)
        if alike and len(groups[-1]) < most:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [{name: torch.cat([row[name] for row in group]) for name in group[0]} for group in groups]


def _shapes(row: Mapping[str, Tensor]) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape[1:]) for name, tensor in row.items()]


def _is_image_processor(given: Any) -> bool:
    if given is None:
        return False
    from transformers import ImageProcessingMixin

    return isinstance(given, ImageProcessingMixin)
