"""Pictures for calibration: chosen from a folder and made into tensors by the model's own image processor, or given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from halve.checkpoint.load import LoadedModel
from halve.checkpoint.shards import hash_tensors
from halve.errors import InputError
from halve.images.pictures import chosen, folder_pictures
from halve.images.positions import positions
from halve.images.processor import check_sees, input_name, prepared, processor_of, stacked
from halve.model.blocks import Batch

TENSOR = "tensor"
"""Source of a tensor of pictures that was given."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures as a model gets them, and where they come from. Equal when source and content are.

    Attributes:
        rows: of each picture, keyword arguments of the model's forward, as a batch of one.
        source: the folder that the user named.
        sha256: hexadecimal hash of the rows: of what is fed.
        processor: class of the image processor; empty for tensors that were given.
    """

    rows: tuple[Mapping[str, Tensor], ...] = field(compare=False, repr=False)
    source: str
    sha256: str
    processor: str = ""

    @property
    def samples(self) -> int:
        """Number of pictures."""
        return len(self.rows)

    @property
    def sizes(self) -> list[str]:
        """Channels, height and width of the pictures, such as ``3 x 224 x 224``, each once."""
        shapes = (next(tensor.shape[1:] for tensor in row.values() if tensor.ndim == 4) for row in self.rows)
        return list(dict.fromkeys(" x ".join(map(str, shape)) for shape in shapes))

    def batches(self, model: nn.Module, most: int) -> list[Batch]:
        """Put pictures of one size into batches.

        Args:
            model: the model.
            most: positions of its first hidden state that a batch holds at most (at least one picture).
        """
        name = next(name for name, tensor in self.rows[0].items() if tensor.ndim == 4)
        largest = max(positions(model, *row[name].shape[-2:]) for row in self.rows)
        return list(stacked(self.rows, max(1, most // largest)))


def calibration_pictures(source: str | Path, loaded: LoadedModel, *, samples: int, seed: int) -> PictureSet:
    """Choose pictures of a folder, and turn them into what a model takes.

    Args:
        source: the folder; those below are searched too.
        loaded: the model, with its image processor beside it or given in the place of a tokenizer.
        samples: how many, at least 1.
        seed: of the choice.

    Raises:
        InputError: the model takes something else, there is no image processor, a picture is not readable, or there
            are fewer than ``samples``.
    """
    check_sees(loaded.model, f"{source} is a folder of pictures")
    processor = processor_of(loaded)
    pictures = chosen(folder_pictures(source), samples, seed, source)
    rows = tuple(prepared(picture, processor, loaded.model)[0] for picture in pictures)
    for row, picture in zip(rows, pictures, strict=True):
        if row[input_name(loaded.model)].ndim != 4:
            shape = tuple(row[input_name(loaded.model)].shape)
            raise InputError(
                f"the image processor makes a tensor of shape {shape} of {picture.where}, and not one picture (1, "
                f"channels, height, width): give ready batches, {{{input_name(loaded.model)!r}: …}}"
            )
    return PictureSet(rows, str(source), _digest(rows), type(processor).__name__)


def given_pictures(pictures: Tensor, model: nn.Module) -> PictureSet:
    """Take ready pictures (n, channels, height, width), floating point, normalised as the model wants them.

    Raises:
        InputError: the model takes something else.
    """
    check_sees(model, f"calibration is a tensor of pictures of shape {tuple(pictures.shape)}")
    rows = tuple({input_name(model): row} for row in torch.split(pictures.detach().cpu(), 1))
    return PictureSet(rows, TENSOR, _digest(rows))


def _digest(rows: tuple[Mapping[str, Tensor], ...]) -> str:
    return hash_tensors(named for row in rows for named in sorted(row.items()))
