"""lm-eval's adaptor of causal language models, with what the tokenizer puts before every text there exactly once."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

_LOG = logging.getLogger("lm_eval.models.huggingface")


class Causal(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """As lm-eval has it, but prompts keep their beginning-of-sequence token (BOS).

    lm-eval cuts prompts that are too long from the left, BOS first; and it puts a BOS before texts whose likelihood is
    asked for as a whole though the tokenizer has put one, and none before the later windows of long ones. Models that
    were trained with a BOS before every text are off their ground without it.

    Args:
        opening: ids of the tokens that the tokenizer puts before every text; empty if it puts none, and then all is as
            lm-eval has it.
    """

    def __init__(self, *, opening: Sequence[int], **settings: Any) -> None:
        super().__init__(**settings)
        self._opening = list(opening)
        self._bare = False

    @property
    def opening(self) -> str:
        """What is before every text, as the tokenizer writes it."""
        return " ".join(self.tokenizer.convert_ids_to_tokens(self._opening))

    def tok_encode(
        self, string: str, *, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **more: Any
    ) -> list[int]:
        """Return the tokens of a text, the opening before them unless ``add_special_tokens`` is false."""
        if add_special_tokens is None and self._bare:
            add_special_tokens = False
        ids: list[int] = super().tok_encode(string, add_special_tokens=add_special_tokens, **more)
        if add_special_tokens is None and not self._opens(ids):
            ids = [*self._opening, *ids]
        if left_truncate_len is not None and len(ids) > left_truncate_len:
            ids = self._cut(ids, left_truncate_len) if self._opens(ids) else ids[-left_truncate_len:]
        return ids

    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of texts, padded; all begin with the opening, those that had to be cut too."""
        if self.tokenizer.bos_token_id in self._opening:  # lm-eval looks for it in the first text alone
            strings = [text.removeprefix(self.tokenizer.bos_token) for text in strings]
        ids, mask = super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **more)
        if self._opening and left_truncate_len is not None:
            opening = ids.new_tensor(self._opening)
            full = mask[:, 0].bool()  # no padding: as long as may be, and so perhaps cut
            ids[full, : len(opening)] = opening
        return ids, mask

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts; lm-eval puts a BOS before each, so the tokenizer must not."""
        self._bare = True
        try:
            sums: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._bare = False
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *args: Any, **more: Any
    ) -> Any:
        return super()._loglikelihood_tokens([self._fitting(*request) for request in requests], *args, **more)

    def _fitting(self, texts: Any, context: list[int], continuation: list[int]) -> tuple[Any, list[int], list[int]]:
        """Return a request whose context opens as it should and leaves room for the continuation."""
        room = max(self.max_length + 1 - len(continuation), len(self._opening))
        if not self._opening or (self._opens(context) and len(context) <= room):
            return texts, context, continuation
        if texts is not None and len(context) > room:  # what has no texts is a window of a longer one
            _LOG.warning(
                f"Combined length of context ({len(context)}) and continuation ({len(continuation)}) exceeds model's "
                f"maximum length ({self.max_length}). Cutting {len(context) - room} tokens after the first."
            )
        return texts, self._cut(context, room), continuation

    def _opens(self, ids: list[int]) -> bool:
        return ids[: len(self._opening)] == self._opening

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """Return the opening and the last tokens, ``length`` in all."""
        rest = ids[len(self._opening) :] if self._opens(ids) else ids
        kept = max(0, length - len(self._opening))
        return [*self._opening, *rest[max(0, len(rest) - kept) :]]
