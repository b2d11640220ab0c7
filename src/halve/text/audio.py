"""Audio with transcripts, for models that hear: wave files to features, by the model's own feature extractor."""

import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halve.errors import InputError, one_line
from halve.text.documents import Pair
from halve.text.limits import DECODER
from halve.text.pairs import FED, PairSet, chosen_pairs, fed_to_decoder, pair_set, side_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTES = 2  # of a 16-bit sample


def audio_pairs(
    source: str | Path,
    fields: tuple[str, str],
    extractor: Any,
    tokenizer: "PreTrainedTokenizerBase",
    model: nn.Module,
    *,
    samples: int,
    seq_len: int | None,
    seed: int,
) -> PairSet:
    """Make features of wave files, and what the decoder is fed of their transcripts.

    The transcripts are tokenised as for fine-tuning, with the tokenizer's own prefix (Whisper's task and language). All
    positions of the encoder count, those of the silence that Whisper's extractor fills up 30 seconds with too: the
    model hears them wherever it is used.

    Args:
        source: see `halve.text.documents.read_pairs`.
        fields: of the path of a wave file, relative to the file that names it, and of its transcript.
        extractor: the model's feature extractor.
        tokenizer: of the model.
        model: an encoder-decoder that takes ``input_features`` or ``input_values``.
        samples: pairs, chosen at random.
        seq_len: tokens of a transcript at most; None is as many as the model was built for, and 2048 at most.
        seed: of the choice.

    Raises:
        InputError: a file is not 16-bit PCM, of another sampling rate than the model's, or longer than it hears; or
            there are fewer than ``samples`` pairs.
    """
    pairs = chosen_pairs(source, fields, samples, seed)
    length = side_length(seq_len, model, (DECODER,))
    name = str(model.main_input_name)
    rows = [
        {name: _features(pair, extractor, name), FED: fed}
        for pair, fed in zip(pairs, fed_to_decoder(pairs, tokenizer, model, length), strict=True)
    ]
    return pair_set(rows, source, fields, length, tokenizer, seed)


def _features(pair: Pair, extractor: Any, name: str) -> Tensor:
    path = pair.folder / pair.first
    rate = int(extractor.sampling_rate)
    sound = read_wave(path, rate, pair.where)
    most = getattr(extractor, "n_samples", None)
    if most is not None and len(sound) > most:
        raise InputError(
            f"{path} is {len(sound) / rate:.1f} s long, and the model hears {most / rate:.1f} s at most: cut it, and "
            "its transcript"
        )
    try:
        found: Tensor = extractor(sound.numpy(), sampling_rate=rate, return_tensors="pt")[name]
    except Exception as error:  # a foreign extractor can raise anything
        raise InputError(f"the model's feature extractor cannot make {name} of {path}: {one_line(error)}") from error
    return found


def read_wave(path: Path, rate: int, where: str) -> Tensor:
    """Read a wave file of 16-bit PCM, its channels mixed down to one.

    Args:
        path: of the file.
        rate: samples a second that it must have.
        where: it is named, for messages.

    Returns:
        Tensor: (samples,) float32, from -1 to 1.

    Raises:
        InputError: there is no such file, or it is another kind of audio.
    """
    convert = f"convert it, for example with `ffmpeg -i IN -ar {rate} -ac 1 -c:a pcm_s16le OUT.wav`"
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, found = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except FileNotFoundError as error:
        raise InputError(f"{where} names {path}, which does not exist: give its path relative to that file") from error
    except (wave.Error, EOFError, OSError) as error:
        raise InputError(f"{path} is not a readable .wav file ({one_line(error)}): {convert}") from error
    if width != _BYTES:
        raise InputError(f"{path} has {8 * width} bits a sample, and 16-bit PCM is needed: {convert}")
    if found != rate:
        raise InputError(f"{path} has {found} samples a second, and the model's feature extractor {rate}: {convert}")
    content = content[: len(content) // (_BYTES * channels) * _BYTES * channels]  # a cut file ends within a sample
    if not content:
        raise InputError(f"{path} holds no audio: remove it from the file of pairs")
    return _mixed(content, channels)


def _mixed(content: bytes, channels: int) -> Tensor:
    sound = torch.frombuffer(bytearray(content), dtype=torch.int16)
    return sound.reshape(-1, channels).float().mean(dim=1) / 2**15
