"""On what the perplexity of a model is to be measured, and how: what users ask for, checked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from halve.checkpoint.load import LoadedModel
from halve.checkpoint.mapped import Weights
from halve.errors import InputError
from halve.evaluation.figure import Perplexity
from halve.evaluation.in_step import Measuring
from halve.evaluation.perplexity import evaluation_texts, perplexity
from halve.option_groups import option
from halve.text.calibration import default_length
from halve.text.documents import is_on_hub
from halve.text.tokens import TokenSet, check_texts


@dataclass(frozen=True)
class Evaluation(Measuring):
    """What to measure perplexity on, before and after, and how.

    Attributes:
        data: texts to measure perplexity on: ``wikitext2``, ``c4``, or files.
        seq_len: tokens in a window: perplexities at other lengths cannot be compared. Where a run measures, and nobody
            says, as many as the calibration sequences have.
        max_windows: only the first windows of each text.
        text_field: name of the text in ``.jsonl`` and ``.parquet`` files.
        bos: which windows begin with BOS: ``auto``, where the tokenizer itself puts it before text, or ``always``,
            every one; ``never``, none; ``once``, the first alone, as for the tables in the literature.
        forward_dtype: products of forward passes: ``auto``, ``float32`` or ``bfloat16``.
    """

    data: Sequence[str | Path]
    seq_len: int | None = None
    max_windows: int | None = None
    text_field: str = option("text", shared=True)
    bos: str = option("auto", shared=True)
    forward_dtype: str = option("auto", shared=True)

    def check(self, device: torch.device) -> None:
        """Look for the texts, before anything is loaded.

        Raises:
            InputError: a text or a setting is not usable.
        """
        self.precision(device)
        if isinstance(self.data, str) or not self.data:
            raise InputError(
                f"the evaluation's data = {self.data!r} is not a list of texts: give at least one, in a list"
            )
        check_texts(
            self.data,
            seq_len=self.seq_len,
            max_windows=self.max_windows,
            text_field=self.text_field,
            bos=self.bos,
        )

    def texts(self, loaded: LoadedModel, calibrated_with: int | None) -> list[TokenSet]:
        """Tokenise the texts for a model.

        Args:
            loaded: the model.
            calibrated_with: tokens in a calibration sequence, None where that is not known.

        Raises:
            InputError: no tokenizer, or a text or the length is not usable.
        """
        length = self.seq_len or calibrated_with or default_length(loaded)
        return evaluation_texts(
            loaded,
            self.data,
            seq_len=length,
            max_windows=self.max_windows,
            text_field=self.text_field,
            bos=self.bos,
        )

    def measure(
        self, model: nn.Module, texts: Sequence[TokenSet], device: torch.device, weights: Weights | None = None
    ) -> tuple[Perplexity, ...]:
        """Return the perplexity of a model on every text; ``weights`` are where they lie, None is memory."""
        return tuple(
            perplexity(model, text, device=device, forward_dtype=self.forward_dtype, weights=weights) for text in texts
        )


def overlap(
    calibrated_on: str | None, evaluated_on: Iterable[str], *, used: str = "calibrated", figures: str = "perplexities"
) -> str:
    """Say that a model is measured on the very data that it was calibrated on; empty where it is not.

    Files and folders on disk are the same however they are named, and one that lies in the other is part of it.

    Args:
        calibrated_on: source of the calibration text (`halve.text.tokens.TokenSet`) or pictures, None where that is
            not known.
        evaluated_on: sources of the texts or pictures that the model is measured on.
        used: what the text was used for, if not for that: ``trained``.
        figures: what is measured on it.
    """
    if calibrated_on is None:
        return ""
    first = _place(calibrated_on)
    for source in evaluated_on:
        second = _place(source)
        if source == calibrated_on or (first is not None and first == second):
            return f"{source} is both {used} on and evaluated on: {figures} on it flatter"
        if first is None or second is None:
            continue
        if first in second.parents:
            return f"{source}, evaluated on, lies in {calibrated_on}, {used} on: {figures} on it flatter"
        if second in first.parents:
            return f"{source}, evaluated on, holds {calibrated_on}, {used} on: {figures} on it flatter"
    return ""


def _place(source: str) -> Path | None:
    """Return where a source lies on disk; None for what does not, such as a name on the hub or one split of a set."""
    path = Path(source).expanduser()
    return path.resolve() if not is_on_hub(source) and path.exists() else None
