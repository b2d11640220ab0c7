"""Documents to rows of tokens, without padding: packed for calibration, or cut into consecutive windows."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halve.errors import InputError
from halve.text.documents import Corpus, Document, pieces, shuffled
from halve.text.special_tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C4_WINDOWS = 256
"""Windows evaluated on C4 when no number is given; its validation split holds some 100 million tokens."""
WINDOW_SEPARATOR = "\n\n"
"""What joins the documents of a text that is cut into windows."""
LOCAL_SHUFFLE = 200_000
"""Documents, or pairs, held for shuffling."""

_HUB_SHUFFLE = 10_000  # fewer, because each one is downloaded first
_BATCH = 64  # documents tokenised in one call
_LONG = 2**16  # characters from which a document is tokenised alone, and only as far as needed
_MARGIN = 1024  # tokens dropped before an artificial end of text, where they may differ
_CHARACTERS_PER_TOKEN = 5


@dataclass(frozen=True)
class Surroundings:
    """What takes room beside the text in every sequence.

    Attributes:
        lead: tokens that a sequence begins with.
        others: how much else is put into a sequence, in tokens.
    """

    lead: tuple[int, ...] = ()
    others: int = 0

    @property
    def size(self) -> int:
        """Number of tokens in a sequence that are no text."""
        return len(self.lead) + self.others

    @property
    def name(self) -> str:
        """How messages call them; empty where there are none."""
        return "special tokens" if self.others else "BOS" if self.lead else ""


def check_room(seq_len: int, around: Surroundings) -> None:
    """Refuse sequences that nothing but special tokens would fit into.

    Raises:
        InputError: they are so short.
    """
    if seq_len <= around.size:
        remedy = f"give at least {around.size + 1}" + ("" if around.others else ", or bos = 'never'")
        raise InputError(f"seq_len = {seq_len} leaves no room for text beside {around.name}: {remedy}")


def surrounded(text: Tensor, before: Sequence[int] = (), after: Sequence[int] = ()) -> Tensor:
    """Put the same tokens before and after every row of text, (rows, tokens)."""
    parts = [torch.tensor(ids, dtype=text.dtype).expand(len(text), -1) for ids in (before, after)]
    return torch.cat((parts[0], text, parts[1]), dim=1)


def separator_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return what stands between documents that are packed: the tokenizer's EOS, nothing if it has none."""
    return "" if tokenizer.eos_token_id is None else str(tokenizer.eos_token)


def packed(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    seq_len: int,
    seed: int,
    around: Surroundings,
) -> tuple[Tensor, int]:
    """Pack shuffled documents, as `halve.text.tokens.calibration_tokens` says.

    Args:
        corpus: where they come from.
        tokenizer: of the model.
        samples: rows.
        seq_len: tokens in a sequence, those around the text among them.
        seed: of the shuffling.
        around: what else is in every sequence.

    Returns:
        tuple[Tensor, int]: text (samples, seq_len - size of what is around it), and the number of documents in it.

    Raises:
        InputError: there is too little text, or no room for any.
    """
    check_room(seq_len, around)
    lead, room = around.lead, seq_len - around.size
    needed = samples * room
    ids: list[int] = []
    used = 0
    for document in encode_documents(shuffled_corpus(corpus, seed), tokenizer, needed + len(lead)):
        if not document:
            continue
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += document if ids else _without(lead, document)
        used += 1
        if len(ids) >= needed:
            return _rows(ids, samples, room), used
    _refuse_empty(len(ids), corpus.name)
    fit, longest_one = len(ids) // room, len(ids) + around.size
    remedy = (
        f"samples = {fit} is the most that fits" if fit else f"not even one sample fits; seq_len <= {longest_one} would"
    )
    raise InputError(
        f"source {corpus.name!r} has {len(ids)} tokens, but samples = {samples} of seq_len = {seq_len} need {needed}"
        f"{f' beside {around.name}' if around.name else ''}: give more text, or fewer samples ({remedy})"
    )


def shuffled_corpus(corpus: Corpus, seed: int) -> Iterator[Document]:
    """Yield the documents of a corpus in the random order in which they are packed."""
    return shuffled(corpus.documents(), seed, max_documents=LOCAL_SHUFFLE if corpus.local else _HUB_SHUFFLE)


def windows(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    max_windows: int | None,
    seq_len: int,
    around: Surroundings,
    beginning: Sequence[int] = (),
) -> tuple[Tensor, int]:
    """Cut the whole text into consecutive windows, as `halve.text.tokens.evaluation_tokens` says.

    Args:
        corpus: where it comes from.
        tokenizer: of the model.
        max_windows: only the first; None takes all, but `C4_WINDOWS` of C4.
        seq_len: tokens in a window, those around the text among them.
        around: what else is in every window.
        beginning: ids that the whole text begins with.

    Returns:
        tuple[Tensor, int]: text (windows, seq_len - size of what is around it), and the number of documents read.

    Raises:
        InputError: there is less than a window of text, or no room for any.
    """
    check_room(seq_len, around)
    if max_windows is None and corpus.name == "c4" and not corpus.local:
        max_windows = C4_WINDOWS
    lead, room = around.lead, seq_len - around.size
    reading = _Joined(corpus.documents(), WINDOW_SEPARATOR)
    found = _encode_start(tokenizer, reading, max_windows and max_windows * room + len(lead))
    found = [*beginning, *_without(lead, found)]
    count = len(found) // room
    if not count:
        _refuse_empty(reading.characters, corpus.name)
        raise InputError(
            f"source {corpus.name!r} has {len(found)} tokens, fewer than one window of seq_len = {seq_len}"
            f"{f' holds beside {around.name}' if around.name else ''}: give more text or a smaller seq_len"
        )
    return _rows(found, min(count, max_windows or count), room), reading.documents


def _refuse_empty(characters: int, name: str) -> None:
    if not characters:
        raise InputError(f"source {name!r} holds no text: give a file that is not empty")


def _without(lead: Sequence[int], ids: list[int]) -> list[int]:
    """Drop what sequences begin with where the text has it itself, as chats that were written out do: never twice."""
    return ids[len(lead) :] if ids[: len(lead)] == list(lead) else ids


def _rows(ids: list[int], rows: int, room: int) -> Tensor:
    """Cut the first of ids into (rows, room)."""
    return torch.tensor(ids[: rows * room]).reshape(rows, room)


def _encode_start(tokenizer: "PreTrainedTokenizerBase", text: Iterable[str], needed: int | None) -> list[int]:
    """Tokenise text in pieces, without special tokens: all of it, or ``needed`` tokens or more and no further."""
    reading = iter(text)
    read: list[str] = []
    length = 0
    characters = math.inf if needed is None else _CHARACTERS_PER_TOKEN * (needed + _MARGIN)
    while True:
        while length <= characters and (piece := next(reading, None)) is not None:
            read.append(piece)
            length += len(piece)
        read = ["".join(read)]
        whole = length <= characters
        start = read[0] if whole else read[0][: int(characters)]
        (ids,) = encode(tokenizer, [start])
        if whole or needed is None:
            return ids
        if len(ids) >= needed + _MARGIN:
            return ids[:needed]
        characters *= 2


class _Joined:
    """The documents as one text in pieces, counting what is read."""

    def __init__(self, documents: Iterable[Document], separator: str) -> None:
        self.source = documents
        self.separator = separator
        self.documents = 0
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for document in self.source:
            if self.documents:
                yield self.separator
            self.documents += 1
            for piece in pieces(document):
                self.characters += len(piece)
                yield piece


def encode_documents(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", needed: int
) -> Iterator[list[int]]:
    """Tokenise documents without special tokens, in batches; of a long one, at least ``needed`` tokens."""
    batch: list[str] = []
    for document in documents:
        if isinstance(document, str) and len(document) <= _LONG:
            batch.append(document)
            if len(batch) < _BATCH:
                continue
        yield from encode(tokenizer, batch)
        batch = []
        if isinstance(document, Path) or len(document) > _LONG:
            yield _encode_start(tokenizer, pieces(document), needed)
    yield from encode(tokenizer, batch)
