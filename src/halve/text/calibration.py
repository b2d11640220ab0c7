"""What a model is calibrated on: from what the user names to token ids, and to batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.checkpoint.load import LoadedModel
from halve.checks import check_count
from halve.errors import InputError
from halve.model.blocks import Batch
from halve.option_groups import option
from halve.text import tokens
from halve.text.documents import is_on_hub, open_corpus
from halve.text.generation import Listen
from halve.text.special_tokens import check_bos
from halve.text.tokens import TokenSet

DEFAULT_SAMPLES = 128
DEFAULT_SEQ_LEN = 2048
BATCH_TOKENS = 4096
"""Tokens a batch of the calibration set holds at most (at least one sequence)."""
STEP_TOKENS = 512
"""The same where blocks are reconstructed, which takes one optimiser step a batch."""

CalibrationSource = str | Path | TokenSet | Tensor | Sequence[Batch] | None
"""A file, directory, ``c4``, ``wikitext2`` or ``self`` (None); tokens (samples, seq_len); or ready batches."""


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on.

    Attributes:
        source: text: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a directory of them, ``c4``, ``wikitext2``, or
            ``self``, which lets the model write. In Python also tokens (samples, seq_len), or ready batches.
        samples: number of sequences.
        seq_len: tokens in each; 2048, or the model's maximum if that is less, where nobody says.
        seed: of the choice among documents; a ``.txt`` file is one document, and read from its start.
        text_field: name of the text in ``.jsonl`` and ``.parquet`` files.
        bos: which sequences of text begin with BOS: ``auto``, where the tokenizer itself puts it before text, or
            ``always``, every one; ``never``, none; ``once``, only the beginning of a text that perplexity is measured
            on, as for the tables in the literature.
    """

    source: CalibrationSource = option(None, name="calibration")
    samples: int = DEFAULT_SAMPLES
    seq_len: int | None = None
    seed: int = 0
    text_field: str = option("text", shared=True)
    bos: str = option("auto", shared=True)

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
        return {"source": source, **counts, "bos": self.bos}

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
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed must be a whole number, got {self.seed!r}")
        if self.source is None or isinstance(self.source, str | Path):
            check_count("samples", self.samples)
            if self.seq_len is not None:
                check_count("seq_len", self.seq_len)
        if not isinstance(self.source, str | Path) or self.is_self_written:
            return
        if isinstance(self.source, Path) or not is_on_hub(self.source):
            open_corpus(self.source, use="calibration", text_field=self.text_field)

    def data(self, loaded: LoadedModel, listen: Listen | None = None) -> TokenSet | list[Batch]:
        """Turn the source into tokens for a model; ready batches pass through.

        Args:
            loaded: the model, and its tokenizer.
            listen: told how long it takes where the model writes, as by `halve.text.generation.sample_text`.

        Raises:
            InputError: the source is not usable, or its tokens do not fit the model.
            CalibrationError: the model that writes its own text gives logits that are not finite.
        """
        if isinstance(self.source, Tensor | TokenSet):
            found = _token_set(self.source)
            tokens.check_vocabulary(found.ids, loaded.model, found.source)
            tokens.check_length(found.seq_len, loaded.model)
            return found
        if self.source is not None and not isinstance(self.source, str | Path):
            return _checked_batches(self.source)
        return self.text_tokens(loaded, listen)

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
        if loaded.tokenizer is None:
            raise InputError(
                "the model has no tokenizer, so text cannot be used: put its tokenizer files beside it, or in Python "
                "give tokenizer, or tokens as calibration"
            )
        seq_len = default_length(loaded) if self.seq_len is None else self.seq_len
        tokens.check_length(seq_len, loaded.model)
        return tokens.calibration_tokens(
            tokens.SELF if self.source is None else self.source,
            loaded.tokenizer,
            samples=self.samples,
            seq_len=seq_len,
            seed=self.seed,
            text_field=self.text_field,
            bos=self.bos,
            model=loaded.model,
            listen=listen,
        )


def _token_set(source: Tensor | TokenSet) -> TokenSet:
    if isinstance(source, TokenSet):
        return source
    if source.ndim != 2 or source.is_floating_point() or not source.numel():
        raise InputError(
            f"calibration is a tensor of shape {tuple(source.shape)} and {source.dtype}: "
            "give token ids of shape (samples, seq_len), or batches as dictionaries"
        )
    return TokenSet(source, "tokens", tokens.hash_ids(source), source.shape[0])


def default_length(loaded: LoadedModel) -> int:
    """Return the length of calibration sequences where none is asked for: 2048, or the model's maximum if less."""
    return min(DEFAULT_SEQ_LEN, tokens.longest(loaded.model) or DEFAULT_SEQ_LEN)


def token_batches(ids: Tensor, most: int = BATCH_TOKENS) -> list[Batch]:
    """Cut token ids (samples, seq_len) into batches of at most ``most`` tokens (at least one sequence)."""
    rows = max(1, most // ids.shape[1])
    return [{"input_ids": ids[start : start + rows]} for start in range(0, len(ids), rows)]


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


def calibration_record(data: TokenSet | Sequence[Batch]) -> dict[str, Any]:
    """Return what a report says of calibration data, as plain JSON values."""
    if isinstance(data, TokenSet):
        return {
            "source": data.source,
            "samples": data.samples,
            "seq_len": data.seq_len,
            "tokens": data.tokens,
            "documents": data.documents,
            "separator": data.separator,
            "revision": data.revision,
            "bos": data.bos,
            "bos_ids": data.bos_ids,
            "sha256": data.sha256,
        }
    return {"source": "batches" if data else "none", "batches": len(data)}
