"""T5's denoising objective: spans of a text are masked, and the decoder says what was under each mask.

Raffel et al. 2020, arXiv 1910.10683, section 3.1.4, with its own numbers: 15 % of the tokens in spans of 3 on average.
As in their code, a sequence begins with text that stays and ends with a span that is masked.
"""

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halve.errors import InputError
from halve.text.halves import Frames

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE = 0.15
"""Share of the tokens that are masked."""
SPAN = 3.0
"""Mean length of a masked span, in tokens."""


@dataclass(frozen=True)
class Spans:
    """The text without its masked spans to the encoder, the spans to the decoder, each after its sentinel.

    Attributes:
        frames: what stands around both.
        sentinels: ids of ``<extra_id_0>``, ``<extra_id_1>``, …, one for each span of a sequence.
        seq_len: tokens on both sides together, at most.
        text: tokens of text in a sequence.
        seed: of the places of the spans.
    """

    frames: Frames
    sentinels: tuple[int, ...]
    seq_len: int
    text: int
    seed: int
    how: str = "span corruption"

    @classmethod
    def of(cls, frames: Frames, tokenizer: "PreTrainedTokenizerBase", seq_len: int, seed: int) -> "Spans":
        """Find out how much text makes sequences of at most ``seq_len`` tokens on both sides together.

        Raises:
            InputError: the tokenizer has no sentinels, or fewer than the spans of such a sequence, or there is no room
                for a span.
        """
        vocabulary = tokenizer.get_vocab()
        if (first := "<extra_id_0>") not in vocabulary:
            raise InputError(
                f"span corruption needs a tokenizer with sentinels, and this one has no {first}: it is for T5 and its "
                "like, so leave span_corruption out"
            )
        around = frames.encoder.size + frames.labels.size
        fitting = (text for text in range(seq_len, 1, -1) if text + 2 * counts(text)[1] + around <= seq_len)
        text = next(fitting, None)
        if text is None:
            raise InputError(f"seq_len = {seq_len} leaves no room for a masked span: raise seq_len")
        spans = counts(text)[1]
        names = [f"<extra_id_{index}>" for index in range(spans)]
        if absent := next((name for name in names if name not in vocabulary), None):
            raise InputError(
                f"seq_len = {seq_len} has {spans} masked spans, and the tokenizer has no sentinel {absent} for them: "
                "lower seq_len"
            )
        return cls(frames, tuple(vocabulary[name] for name in names), seq_len, text, seed)

    @property
    def others(self) -> int:
        """See `halve.text.halves.Recipe`."""
        return self.seq_len - self.text - len(self.frames.encoder.before)

    @property
    def sides(self) -> tuple[int, int]:
        """See `halve.text.halves.Recipe`."""
        noise, spans = counts(self.text)
        return (
            self.text - noise + spans + self.frames.encoder.size,
            noise + spans + self.frames.labels.size,
        )

    def share(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """See `halve.text.halves.Recipe`; the same seed masks the same places."""
        rng = random.Random(self.seed)  # noqa: S311 - reproducible places, not secrets
        pairs = [self._masked(row, rng) for row in text.tolist()]
        read, said = (torch.tensor(side, dtype=text.dtype) for side in zip(*pairs, strict=True))
        return self.frames.encoder.around(read), self.frames.labels.around(said)

    def _masked(self, ids: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
        noise, spans = counts(len(ids))
        read: list[int] = []
        said: list[int] = []
        start = 0
        lengths = zip(_parts(len(ids) - noise, spans, rng), _parts(noise, spans, rng), self.sentinels, strict=True)
        for kept, masked, sentinel in lengths:
            read += [*ids[start : start + kept], sentinel]
            said += [sentinel, *ids[start + kept : start + kept + masked]]
            start += kept + masked
        return read, said


def counts(text: int) -> tuple[int, int]:
    """Return how many tokens of a text of at least 2 are masked, and in how many spans."""
    noise = min(max(round(text * NOISE), 1), text - 1)
    return noise, min(max(round(noise / SPAN), 1), text - noise)


def _parts(total: int, parts: int, rng: random.Random) -> list[int]:
    """Cut a number into positive parts, each way of doing so equally likely."""
    bounds = [0, *sorted(rng.sample(range(1, total), parts - 1)), total]
    return [end - start for start, end in pairwise(bounds)]
