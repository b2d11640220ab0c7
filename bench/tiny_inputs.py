"""Random inputs for tiny models of every kind: what `sweep.py` calibrates them on."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tiny_models import FIRST_ORDINARY, FIRST_SPECIAL, Case

Batch = dict[str, Tensor]

SHAPES = ((1, 17), (4, 24), (4, 24), (2, 20))
"""Rows and length of each batch. The first is what a method may probe a model with, as it is: one row of at most 32."""


def batches(case: Case, model: Any, seed: int = 0) -> list[Batch]:
    """Return random inputs of unequal sizes for a model."""
    random = torch.Generator().manual_seed(seed)
    maker = INPUTS.get(case.name) or INPUTS.get(case.family) or INPUTS.get(case.kind, _text)
    return [maker(model, rows, length, random) for rows, length in SHAPES]


Maker = Callable[[Any, int, int, torch.Generator], Batch]


def _ids(rows: int, length: int, random: torch.Generator) -> Tensor:
    return torch.randint(FIRST_ORDINARY, FIRST_SPECIAL, (rows, length), generator=random)


def _text(_model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"input_ids": _ids(rows, length, random)}


def _pairs(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    """Return text for the encoder and other text for the decoder; text alone where there is one stack."""
    batch = _text(model, rows, length, random)
    if "decoder_input_ids" in signature(model.forward).parameters:
        batch["decoder_input_ids"] = _ids(rows, length - 5, random)
    return batch


def _pixels(model: Any, rows: int, random: torch.Generator) -> Tensor:
    """Return images of the size that a model, or the tower in it, is built for."""
    inside = [getattr(model.config, name, None) for name in ("vision_config", "encoder")]
    configs = [each for each in (model.config, *inside) if each is not None]
    size = next((each.image_size for each in configs if getattr(each, "image_size", None)), 32)
    channels = next((each.num_channels for each in configs if getattr(each, "num_channels", None)), 3)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(rows, channels, height, width, generator=random)


def _image(model: Any, rows: int, _length: int, random: torch.Generator) -> Batch:
    return {"pixel_values": _pixels(model, rows, random)}


def _image_and_text(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"pixel_values": _pixels(model, rows, random), "input_ids": _ids(rows, length, random)}


def _image_to_text(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"pixel_values": _pixels(model, rows, random), "decoder_input_ids": _ids(rows, length, random)}


def _queried(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    """Return text that begins with the places of an image's queries, and the text that the queries see, if any."""
    batch = _image_and_text(model, rows, length, random)
    batch["input_ids"][:, : model.config.num_query_tokens] = model.config.image_token_index
    if "qformer_input_ids" in signature(model.forward).parameters:
        batch["qformer_input_ids"] = _ids(rows, 8, random)
    return batch


def _queried_video(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    batch = _queried(model, rows, length, random)
    frames = torch.stack([batch["pixel_values"], _pixels(model, rows, random)], dim=1)
    batch["input_ids"][:, : 2 * model.config.num_query_tokens] = model.config.video_token_index
    return {**batch, "pixel_values": frames}


def _one_of_many_images(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {
        "input_ids": _ids(rows, length, random),
        "pixel_values": _pixels(model, rows, random)[:, None],
        "image_attention_mask": torch.ones(rows, length, 1, dtype=torch.int64),
    }


def _image_in_places(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    places = torch.zeros(rows, length, dtype=torch.int64)
    places[:, 1 : 1 + model.config.latent_query_num] = 1
    return {**_image_and_text(model, rows, length, random), "image_embeds_position_mask": places}


def _patches(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    width = model.config.vision_config.patch_embed_hidden_size
    patches = torch.randn(rows, 16, 2 + width, generator=random)
    patches[..., 0], patches[..., 1] = torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1
    return {"flattened_patches": patches, "decoder_input_ids": _ids(rows, length, random)}


def _page(_model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    corners = torch.rand(rows, length, 2, generator=random) * 0.5
    boxes = torch.cat([corners, corners + 0.25], dim=-1)
    return {"input_ids": _ids(rows, length, random), "bbox": boxes, "decoder_input_ids": _ids(rows, length - 5, random)}


def _image_as_inputs(model: Any, rows: int, _length: int, random: torch.Generator) -> Batch:
    return {"inputs": _pixels(model, rows, random)}


def _text_as_inputs(_model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"inputs": _ids(rows, length, random)}


def _text_of_pixels(model: Any, rows: int, _length: int, random: torch.Generator) -> Batch:
    return _text(model, rows, 16, random)


def _image_patches(model: Any, rows: int, _length: int, random: torch.Generator) -> Batch:
    config = model.config.vision_config
    return {
        "pixel_values": torch.randn(rows, 16, config.num_channels * config.patch_size**2, generator=random),
        "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.int64),
        "spatial_shapes": torch.full((rows, 2), 4),
    }


def _sound(_model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"input_values": torch.randn(rows, 400 + 100 * length, generator=random)}


def _codes(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"input_ids": _ids(rows * model.config.num_codebooks, length, random)}


INPUTS: dict[str, Maker] = {
    "causal:musicgen:MusicgenForCausalLM": _codes,
    "causal:musicgen_melody:MusicgenMelodyForCausalLM": _codes,
    "blip": _image_and_text,
    "blip-2": _queried,
    "instructblip": _queried,
    "instructblipvideo": _queried_video,
    "idefics": _one_of_many_images,
    "kosmos-2": _image_in_places,
    "pix2struct": _patches,
    "udop": _page,
    "pp_formulanet": _image_to_text,
    "vision-encoder-decoder": _image_to_text,
    "t5gemma2": _pairs,
    "imagegpt": _text_of_pixels,
    "siglip2": _image_patches,
    "vision:perceiver:PerceiverForImageClassificationLearned": _image_as_inputs,
    "vision:perceiver:PerceiverForImageClassificationFourier": _image_as_inputs,
    "vision:perceiver:PerceiverForImageClassificationConvProcessing": _image_as_inputs,
    "masked:perceiver:PerceiverForMaskedLM": _text_as_inputs,
    "seq2seq": _pairs,
    "vision": _image,
    "audio": _sound,
}
"""What makes the inputs of a family or, where it has no row, of a kind; text where that has none either."""
