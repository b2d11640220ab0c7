"""Documents to rows of tokens for training: packed, but each document on its own, and which tokens are to be learned.

Positions begin anew with every document. transformers reads from that where a row's documents end, and lets none attend
to another; a model that does not is given one document a row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not learned, as in PyTorch and transformers."""


@dataclass(frozen=True)
class Passage:
    """The tokens of one document, or of one chat.

    Attributes:
        ids: (tokens,) int32.
        learned: (tokens,) bool, which of them are to be learned; None for all but what stands before the text.
        lead: how many tokens stand before the text (BOS).
        whole: whether it means nothing if it is cut and continued in another row: a chat.
        seen: whether the model was calibrated on it.
    """

    ids: Tensor
    learned: Tensor | None = None
    lead: int = 0
    whole: bool = False
    seen: bool = False

    @property
    def labels(self) -> Tensor:
        """What is to be said at each token, (tokens,) int64; `IGNORED` where nothing is.

        The first token is said by nobody, and the first after a BOS by one that has seen no text: they are not
        learned.
        """
        labels = self.ids.long()
        if self.learned is not None:
            labels = labels.masked_fill(~self.learned, IGNORED)
        labels[: self.lead + 1] = IGNORED
        return labels

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Rows:
    """Rows of one length.

    Attributes:
        ids: (rows, seq_len) int64.
        positions: (rows, seq_len) int64, from 0 in every document.
        labels: (rows, seq_len) int64: the token itself where it is to be learned, `IGNORED` elsewhere. A label is what
            the place before it has to say.
        cut: passages that were too long, and whose ends were left out.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """Number of tokens that are to be learned."""
        return int((self.labels != IGNORED).sum())

    @classmethod
    def joined(cls, parts: "Sequence[Rows]") -> "Rows":
        """Return the rows of several, in order."""
        ids, positions, labels = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "positions", "labels")
        )
        return cls(ids, positions, labels, sum(part.cut for part in parts))


class RowBuilder:
    """Puts passages into rows, one after the other.

    Args:
        seq_len: tokens in a row.
        padding: id of the tokens that fill a row up.
        apart: one passage a row, for models that would let them attend to each other.
    """

    def __init__(self, seq_len: int, padding: int, *, apart: bool = False) -> None:
        self._seq_len = seq_len
        self._padding = padding
        self._apart = apart
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._open: list[tuple[Tensor, Tensor]] = []
        self._filled = 0
        self.cut = 0

    def add(self, passage: Passage) -> None:
        """Put a passage into the row that is being filled, and into as many more as it needs."""
        ids, labels = passage.ids.long(), passage.labels
        if passage.whole and len(ids) > self._seq_len:
            self.cut += 1
            ids, labels = ids[: self._seq_len], labels[: self._seq_len]
        if self._filled and passage.whole and len(ids) > self._seq_len - self._filled:
            self._close()
        while len(ids):
            room = self._seq_len - self._filled
            if len(ids) > 1 or self._filled:  # a row of one token has nothing to say
                self._open.append((ids[:room], labels[:room].clone()))
                self._filled += len(ids[:room])
            ids, labels = ids[room:], labels[room:].clone()
            labels[:1] = IGNORED  # what a new row begins with is said by nobody
            if self._filled == self._seq_len or (self._apart and self._filled):
                self._close()

    def finished(self) -> Rows:
        """Return all rows; the last one is filled up."""
        self._close()
        if not self._rows:
            empty = torch.zeros(0, self._seq_len, dtype=torch.int64)
            return Rows(empty, empty, empty, self.cut)
        ids, positions, labels = (torch.stack(list(each)) for each in zip(*self._rows, strict=True))
        return Rows(ids, positions, labels, self.cut)

    def _close(self) -> None:
        if not self._filled:
            return
        missing = self._seq_len - self._filled
        parts = [*self._open]
        if missing:
            padding = torch.full((missing,), self._padding)
            parts.append((padding, torch.full_like(padding, IGNORED)))
        ids, labels = (torch.cat(list(each)) for each in zip(*parts, strict=True))
        positions = torch.cat([torch.arange(len(part)) for part, _ in parts])
        if bool((labels != IGNORED).any()):
            self._rows.append((ids, positions, labels))
        self._open, self._filled = [], 0


def rows_of(passages: Iterable[Passage], seq_len: int, padding: int, *, apart: bool = False) -> Rows:
    """Put passages into rows; arguments as for `RowBuilder`."""
    builder = RowBuilder(seq_len, padding, apart=apart)
    for passage in passages:
        builder.add(passage)
    return builder.finished()
