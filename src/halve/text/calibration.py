"""What a model is calibrated on: from what the user names to token ids, and to batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.checkpoint.load import LoadedModel
from halve.errors import InputError
from halve.model.blocks import Batch
from halve.text import tokens
from halve.text.documents import is_on_hub, open_corpus
from halve.text.tokens import TokenSet

DEFAULT_SAMPLES = 128
DEFAULT_SEQ_LEN = 2048
BATCH_TOKENS = 4096
"""Tokens a batch of the calibration set holds at most (at least one sequence)."""
STEP_TOKENS = 512
"""The same where blocks are reconstructed, which takes one optimiser step a batch."""

Calibration = str | Path | TokenSet | Tensor | Sequence[Batch] | None
"""A file, directory, ``c4``, ``wikitext2`` or ``self`` (None); tokens (samples, seq_len); or ready batches."""


def check_source(calibration: Calibration, *, samples: int, seq_len: int | None, text_field: str) -> None:
    """Refuse what can be known to be unusable without the model, before it is loaded.

    Args:
        calibration: see `prune`, as for the others.
        samples: number of sequences.
        seq_len: tokens in each.
        text_field: field of ``.jsonl`` and ``.parquet`` files.

    Raises:
        InputError: there is no such text, or a number is not usable.
    """
    if calibration is None or isinstance(calibration, str | Path):
        tokens.check_counts(samples=samples, seq_len=1 if seq_len is None else seq_len)
    if not isinstance(calibration, str | Path) or calibration == tokens.SELF:
        return
    if isinstance(calibration, Path) or not is_on_hub(calibration):
        open_corpus(calibration, use="calibration", field=text_field)


def calibration_data(
    loaded: LoadedModel,
    calibration: Calibration,
    *,
    samples: int = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    text_field: str = "text",
) -> TokenSet | list[Batch]:
    """Turn what the user named into calibration tokens; ready batches pass through.

    Args:
        loaded: the model, and its tokenizer.
        calibration: see `prune`.
        samples: as for `prune`.
        seq_len: as for `prune`.
        seed: as for `prune`.
        text_field: as for `prune`.

    Raises:
        InputError: the source is not usable, or its tokens do not fit the model.
        CalibrationError: the model that writes its own text gives logits that are not finite.
    """
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or calibration.is_floating_point() or not calibration.numel():
            raise InputError(
                f"calibration is a tensor of shape {tuple(calibration.shape)} and {calibration.dtype}: "
                "give token ids of shape (samples, seq_len), or batches as dictionaries"
            )
        calibration = TokenSet(calibration, "tokens", tokens.hash_ids(calibration), calibration.shape[0])
    if isinstance(calibration, TokenSet):
        tokens.check_vocabulary(calibration.ids, loaded.model, calibration.source)
        tokens.check_length(calibration.seq_len, loaded.model)
        return calibration
    if calibration is not None and not isinstance(calibration, str | Path):
        return _checked_batches(calibration)
    return text_tokens(
        loaded,
        tokens.SELF if calibration is None else calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        text_field=text_field,
    )


def text_tokens(
    loaded: LoadedModel, source: str | Path, *, samples: int, seq_len: int | None, seed: int, text_field: str
) -> TokenSet:
    """Tokenise calibration text for a model.

    Args:
        loaded: the model, and its tokenizer.
        source: see `prune`; ``self`` lets the model write.
        samples: as for `prune`.
        seq_len: as for `prune`.
        seed: as for `prune`.
        text_field: as for `prune`.

    Raises:
        InputError: no tokenizer, or the source or the length is not usable.
        CalibrationError: the model that writes its own text gives logits that are not finite.
    """
    if loaded.tokenizer is None:
        raise InputError(
            "the model has no tokenizer, so text cannot be used: put its tokenizer files beside it, or in Python give "
            "tokenizer, or tokens as calibration"
        )
    if seq_len is None:
        seq_len = default_length(loaded)
    tokens.check_length(seq_len, loaded.model)
    return tokens.calibration_tokens(
        source,
        loaded.tokenizer,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        field=text_field,
        model=loaded.model,
    )


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
            "sha256": data.sha256,
        }
    return {"source": "batches" if data else "none", "batches": len(data)}
