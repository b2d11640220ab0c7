"""How well the decoder of an encoder-decoder predicts the second half of a window, the encoder having read the first.

Teacher-forced: the decoder is fed the true tokens, shifted as the model itself does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import InputError
from halve.evaluation.in_step import Passes
from halve.evaluation.losses import LOGITS_AT_ONCE, finite_sums, token_losses
from halve.text.halves import shift_right
from halve.text.tokens import TokenSet


def labels_of_text(tokens: TokenSet) -> int:
    """Return how many labels of each window are text: those that the tokenizer puts around it are not scored.

    Raises:
        InputError: there is none, or the tokens are not cut in halves.
    """
    if tokens.cut is None or tokens.cut.how != "halves":
        raise InputError(f"{tokens.source!r} is not cut in halves, of which the second could be scored: give a text")
    count = tokens.labels.shape[1] - tokens.cut.before - tokens.cut.after
    if count < 1:
        raise InputError(f"windows of seq_len = {tokens.seq_len} leave the decoder no text to predict: raise seq_len")
    return count


def decoder_sums(
    model: nn.Module,
    tokens: TokenSet,
    device: torch.device,
    batch_size: int | None,
    progress: Callable[[int, int], None] | None,
    passes: Passes,
) -> list[float]:
    """Sum the negative log-likelihood over the text that the decoder says in each window.

    Args:
        model: an encoder-decoder with a language-model head, on ``device``, in evaluation mode.
        tokens: windows that are cut in halves.
        device: where to run.
        batch_size: windows in one forward; None is as many as keep the logits below `LOGITS_AT_ONCE`, at least one.
        progress: called with the windows done and the windows in all, after each batch.
        passes: of the model.

    Raises:
        InputError: the model returns no logits of its decoder, or a loss is not finite.
    """
    first = 0 if tokens.cut is None else tokens.cut.before
    scored = slice(first, first + labels_of_text(tokens))
    sizes: list[int] = []  # of a window's logits

    def sums(start: int, rows: int) -> list[float]:
        labels = tokens.labels[start : start + rows].to(device)
        logits = _logits(model, tokens.encoder_ids[start : start + rows].to(device), labels)
        sizes.append(logits[0].numel())
        losses = torch.stack(
            [token_losses(*window) for window in zip(logits[:, scored], labels[:, scored], strict=True)]
        )
        found = finite_sums(losses, start, tokens.source)
        if progress is not None:
            progress(start + len(labels), tokens.samples)
        return found

    found = passes.run([partial(sums, 0, batch_size or 1)])
    rows = batch_size or max(1, LOGITS_AT_ONCE // sizes[0])  # known after the first window
    found += passes.run([partial(sums, start, rows) for start in range(len(found[0]), tokens.samples, rows)])
    return [total for batch in found for total in batch]


def _logits(model: Any, read: Tensor, labels: Tensor) -> Tensor:
    output = model(input_ids=read, decoder_input_ids=shift_right(model, labels), use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != labels.shape:
        raise InputError(f"{type(model).__name__} has no language-model head on its decoder, so it has no perplexity")
    found: Tensor = logits
    return found
