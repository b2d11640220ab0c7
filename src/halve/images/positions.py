"""How many positions of a hidden state a picture becomes: what bounds batches, and what a run is foreseen by."""

from pathlib import Path
from typing import Any

from torch import nn

from halve.checkpoint.shards import read_json
from halve.errors import HalveError
from halve.model.blocks import SIDE, sides_of

_PATCH = 4
"""Side of a patch where a model does not say it: what the stems of ResNet and its like leave, and of ConvNeXt."""


def positions(model: nn.Module, height: int, width: int) -> int:
    """Return the positions of the first hidden state of a picture; in hierarchies later ones have fewer.

    Args:
        model: whose config may say the side of a patch.
        height: of the picture as the model gets it, in pixels.
        width: likewise.
    """
    config = getattr(model, "config", None)
    patch = getattr(config, "patch_size", None) or getattr(getattr(config, "vision_config", None), "patch_size", None)
    sides = patch if isinstance(patch, list | tuple) else [patch, patch]
    down, across = (side if isinstance(side, int) and side > 0 else _PATCH for side in (sides[-2:] * 2)[:2])
    return max(1, height // down) * max(1, width // across)


def picture_size(model: nn.Module, directory: Path | None) -> tuple[int, int]:
    """Return height and width of the pictures that a model gets: as its image processor's settings say, or its config.

    Args:
        model: the model.
        directory: of its checkpoint; None where it has none.
    """
    settings: dict[str, Any] = {}
    path = None if directory is None else directory / "preprocessor_config.json"
    if path is not None and path.is_file():
        try:
            settings = read_json(path)
        except HalveError:  # told when the processor is loaded
            settings = {}
    named = [
        settings.get("crop_size"),
        settings.get("size"),
        getattr(getattr(model, "config", None), "image_size", None),
    ]
    return next((found for each in named if (found := sides_of(each)) is not None), (SIDE, SIDE))
