"""Random inputs for tiny models of every kind: what `sweep.py` calibrates them on."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tiny_families import IMAGE_PLACES
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


def _known(model: Any, *names: str) -> Any:
    """Return the first of these fields that a model's configuration has, or one of those inside it."""
    inside = ("vision_config", "encoder_config", "audio_config", "encoder")
    for config in (model.config, *(getattr(model.config, name, None) for name in inside)):
        for name in names:
            if getattr(config, name, None):
                return getattr(config, name)
    return None


def _pixels(model: Any, rows: int, random: torch.Generator) -> Tensor:
    """Return images of the size that a model, or the tower in it, is built for."""
    size = _known(model, "image_size") or 32
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(rows, _known(model, "num_channels") or 3, height, width, generator=random)


def _image(model: Any, rows: int, _length: int, random: torch.Generator) -> Batch:
    return {"pixel_values": _pixels(model, rows, random)}


def _image_and_text(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"pixel_values": _pixels(model, rows, random), "input_ids": _ids(rows, length, random)}


def _image_in_text(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    """Return text that begins with the places of an image's features."""
    batch = _image_and_text(model, rows, length, random)
    batch["input_ids"][:, : IMAGE_PLACES[model.config.model_type]] = _known(
        model, "image_token_id", "image_token_index"
    )
    return batch


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


def _sound(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    """Return waveforms, or what stands for them in a model that takes features; and text for a decoder."""
    parameters = signature(model.forward).parameters
    if "input_values" in parameters:
        batch = {"input_values": torch.randn(rows, 400 + 100 * length, generator=random)}
    else:
        width = _known(model, "feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel", "input_dim")
        batch = {"input_features": torch.randn(rows, 4 * length, width, generator=random)}
    if "decoder_input_ids" in parameters:
        batch["decoder_input_ids"] = _ids(rows, length, random)
    return batch


def _long_sound(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return _sound(model, rows, 4 * length, random) | {"decoder_input_ids": _ids(rows, length, random)}


def _masked_sound(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    batch = _sound(model, rows, length, random)
    return {**batch, "attention_mask": torch.ones(batch["input_features"].shape[:2], dtype=torch.int64)}


def _spectrogram(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    """Return log-mel spectrograms of the one length that an encoder takes; and text for a decoder."""
    frames = torch.randn(rows, model.config.num_mel_bins, 2 * model.config.max_source_positions, generator=random)
    text = {"decoder_input_ids": _ids(rows, length, random)}
    return {"input_features": frames, **(text if "decoder_input_ids" in signature(model.forward).parameters else {})}


def _square_spectrogram(model: Any, rows: int, _length: int, random: torch.Generator) -> Batch:
    config = model.config
    return {"input_values": torch.randn(rows, config.max_length, config.num_mel_bins, generator=random)}


def _one_channel(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"input_values": _sound(model, rows, length, random)["input_values"][:, None]}


def _stacked_frames(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"input_features": torch.randn(rows, 4 * length, 4 * _known(model, "num_mel_bins"), generator=random)}


def _melody(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {
        "input_features": torch.randn(rows, length, model.config.d_model, generator=random),
        "decoder_input_ids": _ids(rows, length, random),
    }


def _codes(model: Any, rows: int, length: int, random: torch.Generator) -> Batch:
    return {"input_ids": _ids(rows * model.config.num_codebooks, length, random)}


INPUTS: dict[str, Maker] = {
    "causal:musicgen:MusicgenForCausalLM": _codes,
    "causal:musicgen_melody:MusicgenMelodyForCausalLM": _codes,
    "images": _image_in_text,
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
    "whisper": _spectrogram,
    "causal:whisper:WhisperForCausalLM": _text,
    "audio-spectrogram-transformer": _square_spectrogram,
    "omniasr_ctc": _one_channel,
    "granite_speech5_ctc": _stacked_frames,
    "moonshine": _long_sound,
    "moonshine_streaming": _long_sound,
    "canary": _sound,
    "cohere_asr": _sound,
    "seamless_m4t": _masked_sound,
    "seamless_m4t_v2": _masked_sound,
    "seq2seq:seamless_m4t:SeamlessM4TForTextToText": _pairs,
    "seq2seq:seamless_m4t_v2:SeamlessM4Tv2ForTextToText": _pairs,
    "speech_to_text": _sound,
    "speecht5": _sound,
    "speech-encoder-decoder": _sound,
    "pop2piano": _melody,
    "seq2seq": _pairs,
    "vision": _image,
    "audio": _sound,
}
"""What makes the inputs of a family or, where it has no row, of a kind; text where that has none either."""
