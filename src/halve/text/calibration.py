"""What a model is calibrated on: from what the user names to token ids, and to batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.checkpoint.load import LoadedModel, load_feature_extractor
from halve.checks import check_count
from halve.errors import InputError
from halve.images.picture_set import PictureSet, calibration_pictures, given_pictures
from halve.images.pictures import check_pillow, is_picture_folder
from halve.images.processor import sees_pictures
from halve.model.blocks import Batch
from halve.option_groups import OptionError, option
from halve.text import tokens
from halve.text.audio import audio_pairs
from halve.text.documents import has_text, is_on_hub, open_corpus, read_pairs
from halve.text.generation import Listen
from halve.text.halves import Frames, Halves, calibration_halves, shift_right
from halve.text.limits import (
    AUDIO,
    DECODER,
    ENCODER,
    check_fits,
    check_length,
    is_encoder_decoder,
    longest,
    longest_side,
    refuse_unread,
)
from halve.text.pairs import FED, IDS, PairSet, text_pairs
from halve.text.span_corruption import Spans
from halve.text.special_tokens import check_bos
from halve.text.tokens import TokenSet

DEFAULT_SAMPLES = 128
DEFAULT_SEQ_LEN = 2048
_ON_CPU, _ON_GPU, _STEP = 1024, 4096, 512
"""Tokens of a batch, or positions of pictures: what the caches of a processor hold of a block's activations, what keeps
a GPU busy, and where blocks are reconstructed, which takes one optimiser step a batch."""

SHARDS = 8
"""Parts of the calibration set that are summed by themselves."""

CalibrationSource = str | Path | TokenSet | Tensor | Sequence[Batch] | None
"""A file, directory, ``c4``, ``wikitext2`` or ``self`` (None); tokens (samples, seq_len); pictures (samples, channels,
height, width), floating point; or ready batches."""
CalibrationData = TokenSet | PairSet | PictureSet | Sequence[Batch]
"""What a source comes to, for one model."""


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on.

    Attributes:
        source: text: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a directory of them, ``c4``, ``wikitext2``, or
            ``self``, which lets the model write. For a model that sees, a folder of pictures. In Python also tokens
            (samples, seq_len), pictures (samples, channels, height, width), or ready batches.
        samples: number of sequences, or of pictures.
        seq_len: tokens in each; 2048, or the model's maximum if that is less, where nobody says. For an
            encoder-decoder, those on both sides together, or with pair_fields on each side at most.
        seed: of the choice among documents or pictures; a ``.txt`` file is one document, and read from its start.
        text_field: name of the text in ``.jsonl`` and ``.parquet`` files.
        bos: which sequences of text begin with BOS: ``auto``, where the tokenizer itself puts it before text, or
            ``always``, every one; ``never``, none; ``once``, only the beginning of a text that perplexity is measured
            on, as for the tables in the literature.
        pair_fields: for encoder-decoders, the two fields of ``.jsonl`` and ``.parquet`` files that hold what is read
            and what is to be said of it: ``source,target``, or ``audio,text`` with paths of ``.wav`` files. Without
            it, text is cut: the first half of each sequence is read, the second is to be said.
        span_corruption: for T5 and its like, mask spans of the text instead of cutting it in halves, as in their
            training.
        shards: parts that the set is cut into, each summed by itself, so that workers can share them; no more than it
            has batches. Another number gives other last bits; 1 needs the least memory.

    Raises:
        InputError: ``shards`` is not a number of at least 1.
    """

    source: CalibrationSource = option(None, name="calibration")
    samples: int = DEFAULT_SAMPLES
    seq_len: int | None = None
    seed: int = 0
    text_field: str = option("text", shared=True)
    bos: str = option("auto", shared=True)
    pair_fields: str | Sequence[str] | None = None
    span_corruption: bool = False
    shards: int = SHARDS

    def __post_init__(self) -> None:
        check_count("shards", self.shards)

    @property
    def fields(self) -> tuple[str, str] | None:
        """The two fields of pairs; None where text is cut.

        Raises:
            InputError: they are not two names.
        """
        if self.pair_fields is None:
            return None
        given = self.pair_fields.split(",") if isinstance(self.pair_fields, str) else list(self.pair_fields)
        names = [name.strip() for name in given if isinstance(name, str)]
        if len(given) != 2 or len(set(names)) != 2 or not all(names):
            raise InputError(
                f"pair_fields = {self.pair_fields!r} does not name two fields: give the one that is read and the one "
                "that is to be said, such as 'source,target'"
            )
        return names[0], names[1]

    @property
    def is_self_written(self) -> bool:
        """Whether the model is to write its own text."""
        return self.source is None or (isinstance(self.source, str) and self.source == tokens.SELF)

    @property
    def is_far(self) -> bool:
        """Whether it costs much to get the tokens again: the model writes them, or the hub is asked."""
        return self.is_self_written or (isinstance(self.source, str) and is_on_hub(self.source))

    @property
    def asked(self) -> dict[str, Any]:
        """How the tokens are asked for, as plain JSON values: the same words name the same tokens."""
        source = str(self.source) if isinstance(self.source, str | Path) else None
        counts = {"samples": self.samples, "seq_len": self.seq_len, "seed": self.seed}
        return {"source": source, **counts, "bos": self.bos, "span_corruption": self.span_corruption}

    @property
    def length(self) -> int | None:
        """Tokens in a sequence, None where the model decides or batches have their own."""
        if isinstance(self.source, Tensor) and self.source.ndim == 2:
            return self.source.shape[1]
        return self.source.seq_len if isinstance(self.source, TokenSet) else self.seq_len

    def check(self) -> None:
        """Refuse what can be known to be unusable without the model, before it is loaded.

        Raises:
            InputError: there is no such text, or a setting is not usable.
        """
        check_bos(self.bos)
        self._check_pairs()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed must be a whole number, got {self.seed!r}")
        if self.source is None or isinstance(self.source, str | Path):
            check_count("samples", self.samples)
            if self.seq_len is not None:
                check_count("seq_len", self.seq_len)
        if not isinstance(self.source, str | Path) or self.is_self_written:
            return
        if self.fields is not None:
            next(read_pairs(self.source, self.fields), None)
        elif is_picture_folder(self.source) and not has_text(self.source):
            check_pillow()
        elif isinstance(self.source, Path) or not is_on_hub(self.source):
            open_corpus(self.source, use="calibration", text_field=self.text_field)

    def _check_pairs(self) -> None:
        fields = self.fields
        named = isinstance(self.source, str | Path) and not self.is_self_written
        if self.span_corruption and fields is not None:
            raise OptionError("{} is for pairs, {} for plain text: give one of them", "pair_fields", "span_corruption")
        if self.span_corruption and not named:
            raise OptionError("{} masks text, and {} names none: give a text", "span_corruption", "calibration")
        if fields is None:
            return
        if not named or (isinstance(self.source, str) and is_on_hub(self.source)):
            raise OptionError(
                "{} are of a .jsonl or .parquet file, and {} names none: give one", "pair_fields", "calibration"
            )
        if self.bos != "auto":
            raise OptionError(
                "{} is for text that is cut into sequences, and {} has each side as its tokenizer puts it: leave one "
                "out",
                "bos",
                "pair_fields",
            )

    def refuse_own_text(self, name: str) -> None:
        """Refuse an encoder-decoder that is to write its own text: what it writes is an answer to something.

        Args:
            name: of the model.

        Raises:
            InputError: nothing else is to be its calibration data.
        """
        if self.is_self_written:
            raise InputError(
                f"{name} is an encoder-decoder, which cannot write its own calibration text: give calibration, a text "
                "that is cut in two, or a .jsonl file of pairs with its two fields as pair_fields"
            )

    def data(self, loaded: LoadedModel, listen: Listen | None = None) -> TokenSet | PairSet | PictureSet | list[Batch]:
        """Turn the source into tokens, pairs or pictures for a model; ready batches pass through.

        Args:
            loaded: the model, and its tokenizer or image processor.
            listen: told how long it takes where the model writes, as by `halve.text.generation.sample_text`.

        Raises:
            InputError: the source is not usable, or its tokens do not fit the model.
            CalibrationError: the model that writes its own text gives logits that are not finite.
        """
        if isinstance(self.source, Tensor) and self.source.ndim == 4 and self.source.is_floating_point():
            return given_pictures(self.source, loaded.model)
        if isinstance(self.source, Tensor | TokenSet):
            found = _token_set(self.source)
            check_fits(found, loaded.model)
            return found
        if self.source is not None and not isinstance(self.source, str | Path):
            return _checked_batches(self.source)
        if self.fields is not None:
            return self._pairs(loaded, self.fields)
        if is_picture_folder(self.source) and (sees_pictures(loaded.model) or not has_text(self.source or "")):
            return self._pictures(loaded)
        return self.text_tokens(loaded, listen)

    def _pictures(self, loaded: LoadedModel) -> PictureSet:
        """Choose pictures of a folder for a model that sees."""
        if not isinstance(self.source, str | Path):
            raise InputError("calibration names no folder of pictures: give one")
        of_text = {
            "seq_len": self.seq_len is not None,
            "bos": self.bos != "auto",
            "span_corruption": self.span_corruption,
        }
        if idle := next((name for name, given in of_text.items() if given), None):
            raise OptionError("{} is for text, and {} is a folder of pictures: leave it out", idle, "calibration")
        return calibration_pictures(self.source, loaded, samples=self.samples, seed=self.seed)

    def text_tokens(self, loaded: LoadedModel, listen: Listen | None = None) -> TokenSet:
        """Tokenise text for a model, or let it write.

        Args:
            loaded: the model, and its tokenizer.
            listen: told how long it takes where the model writes, as by `halve.text.generation.sample_text`.

        Raises:
            InputError: no tokenizer, or the source or the length is not usable.
            CalibrationError: the model that writes its own text gives logits that are not finite.
        """
        if self.source is not None and not isinstance(self.source, str | Path):
            raise InputError("calibration must name a text here, not hand over tokens or batches")
        refuse_text(loaded.model)
        tokenizer = _tokenizer(loaded)
        seq_len = default_length(loaded) if self.seq_len is None else self.seq_len
        if is_encoder_decoder(loaded.model):
            return self._cut(loaded.model, tokenizer, seq_len)
        if self.span_corruption:
            raise _no_encoder_decoder("span_corruption", loaded)
        check_length(seq_len, loaded.model)
        return tokens.calibration_tokens(
            tokens.SELF if self.source is None else self.source,
            tokenizer,
            samples=self.samples,
            seq_len=seq_len,
            seed=self.seed,
            text_field=self.text_field,
            bos=self.bos,
            model=loaded.model,
            listen=listen,
        )

    def _cut(self, model: nn.Module, tokenizer: Any, seq_len: int) -> TokenSet:
        """Share out text between the two sides of an encoder-decoder."""
        self.refuse_own_text(type(model).__name__)
        if self.source is None or not isinstance(self.source, str | Path):
            raise InputError("calibration must name a text here, not hand over tokens or batches")
        refuse_unread(model, "a text cannot calibrate it")
        frames = Frames.of(tokenizer, model, self.bos)
        recipe = Spans.of(frames, tokenizer, seq_len, self.seed) if self.span_corruption else Halves(frames, seq_len)
        return calibration_halves(
            self.source,
            tokenizer,
            model,
            recipe,
            frames,
            samples=self.samples,
            seq_len=seq_len,
            seed=self.seed,
            text_field=self.text_field,
        )

    def _pairs(self, loaded: LoadedModel, fields: tuple[str, str]) -> PairSet:
        """Read pairs for an encoder-decoder: of texts, or of audio and text."""
        model, tokenizer = loaded.model, _tokenizer(loaded)
        if not is_encoder_decoder(model):
            raise _no_encoder_decoder("pair_fields", loaded)
        if not isinstance(self.source, str | Path):
            raise InputError("pair_fields are of a file, and calibration names none: give one")
        counts: dict[str, Any] = {"samples": self.samples, "seq_len": self.seq_len, "seed": self.seed}
        if model.main_input_name not in AUDIO:
            refuse_unread(model, "pairs of texts cannot calibrate it")
            return text_pairs(self.source, fields, tokenizer, model, **counts)
        if loaded.source is None:
            raise InputError(
                "a model in memory has no feature extractor, so wave files cannot be used: give the checkpoint's "
                f"directory, or batches with {model.main_input_name} and decoder_input_ids"
            )
        extractor = load_feature_extractor(loaded.source)
        return audio_pairs(self.source, fields, extractor, tokenizer, model, **counts)


def refuse_text(model: nn.Module) -> None:
    """Refuse a model that takes no text, be it given or its own.

    Raises:
        InputError: it takes something else.
    """
    taken = getattr(model, "main_input_name", "input_ids")
    if taken != "input_ids" and not is_encoder_decoder(model):
        folder = "a folder of pictures, or " if sees_pictures(model) else ""
        raise InputError(
            f"{type(model).__name__} takes {taken}, not text: give {folder}batches in Python, "
            f"calibration=[{{{taken!r}: …}}]"
        )


def _tokenizer(loaded: LoadedModel) -> Any:
    if loaded.tokenizer is None:
        raise InputError(
            "the model has no tokenizer, so text cannot be used: put its tokenizer files beside it, or in Python "
            "give tokenizer, or tokens as calibration"
        )
    return loaded.tokenizer


def _no_encoder_decoder(option_name: str, loaded: LoadedModel) -> OptionError:
    name = type(loaded.model).__name__
    return OptionError(f"{{}} is for encoder-decoders, and {name} is none: leave it out", option_name)


def _token_set(source: Tensor | TokenSet) -> TokenSet:
    if isinstance(source, TokenSet):
        return source
    if source.ndim == 4:  # those in floating point are pictures
        raise InputError(
            f"calibration is a tensor of pictures of shape {tuple(source.shape)} and {source.dtype}: give them in "
            "floating point, normalised as the model's image processor does it"
        )
    if source.ndim != 2 or source.is_floating_point() or not source.numel():
        raise InputError(
            f"calibration is a tensor of shape {tuple(source.shape)} and {source.dtype}: "
            "give token ids of shape (samples, seq_len), pictures of shape (samples, channels, height, width), or "
            "batches as dictionaries"
        )
    return TokenSet(source, "tokens", tokens.hash_ids(source), source.shape[0])


def default_length(loaded: LoadedModel) -> int:
    """Return the length of calibration sequences where none is asked for: 2048, or the model's maximum if less.

    The two sides of an encoder-decoder have half of it each, so that its maximum is twice that of the shorter one. T5
    has none, and is given no more than it was trained with.
    """
    if not is_encoder_decoder(loaded.model):
        return min(DEFAULT_SEQ_LEN, longest(loaded.model) or DEFAULT_SEQ_LEN)
    limits = [longest_side(loaded.model, side) for side in (ENCODER, DECODER)]
    trained = getattr(loaded.model.config, "n_positions", None)
    return min([DEFAULT_SEQ_LEN, *(2 * limit for limit in (*limits, trained) if isinstance(limit, int))])


def batch_tokens(device: torch.device, *, stepping: bool = False) -> int:
    """Return how many tokens a batch of the calibration set holds at most (at least one sequence).

    Args:
        device: where blocks run.
        stepping: whether an optimiser takes a step a batch.
    """
    if stepping:
        return _STEP
    return _ON_CPU if device.type == "cpu" else _ON_GPU


def token_batches(ids: Tensor, most: int) -> list[Batch]:
    """Cut token ids (samples, seq_len) into batches of at most ``most`` tokens (at least one sequence)."""
    rows = max(1, most // ids.shape[1])
    return [{"input_ids": ids[start : start + rows]} for start in range(0, len(ids), rows)]


def calibration_batches(data: CalibrationData, model: nn.Module, most: int) -> Sequence[Batch]:
    """Turn calibration data into batches for the model's forward.

    Args:
        data: tokens, pairs or pictures; ready batches pass through.
        model: the model.
        most: tokens that a batch holds at most (at least one sequence, pair or picture).
    """
    if isinstance(data, PairSet | PictureSet):
        return data.batches(model, most)
    if not isinstance(data, TokenSet):
        return data
    if data.cut is None:
        return token_batches(data.ids, most)
    rows = max(1, most // data.seq_len)
    parts = zip(torch.split(data.encoder_ids, rows), torch.split(data.labels, rows), strict=True)
    return [{IDS: read, FED: shift_right(model, labels)} for read, labels in parts]


def _checked_batches(batches: Sequence[Batch]) -> list[Batch]:
    batches = list(batches)
    if not batches:
        raise InputError("calibration is an empty list: give at least one batch, or None to let the model write")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
            raise InputError(
                f"calibration batch {index} is not a dictionary of tensors: give keyword arguments of the model, "
                "for example {'input_ids': ids} or {'pixel_values': images}"
            )
    return [dict(batch) for batch in batches]
