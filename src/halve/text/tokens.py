"""Calibration and evaluation text to tokens: packed samples, evaluation windows, text the model itself writes."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halve.checks import check_count
from halve.errors import InputError
from halve.text.documents import Corpus, Document, open_corpus, pieces, shuffled
from halve.text.generation import Listen, sample_text, text_config
from halve.text.special_tokens import EACH, NONE, begin_sequences, check_bos, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SELF = "self"
"""The source name for text sampled from the model itself."""
C4_WINDOWS = 256
"""Windows evaluated on C4 when no number is given; its validation split holds some 100 million tokens."""

_LOCAL_SHUFFLE = 200_000  # documents held for shuffling
_HUB_SHUFFLE = 10_000  # fewer, because each one is downloaded first
_BATCH = 64  # documents tokenised in one call
_LONG = 2**16  # characters from which a document is tokenised alone, and only as far as needed
_MARGIN = 1024  # tokens dropped before an artificial end of text, where they may differ
_CHARACTERS_PER_TOKEN = 5


@dataclass(frozen=True)
class TokenSet:
    """Token sequences of one length, and where they come from. Equal when source and content are.

    Attributes:
        ids: (samples, seq_len) int64, on the CPU.
        source: what the user named: a path, ``"c4"``, ``"wikitext2"`` or ``"self"``.
        sha256: hexadecimal hash of the ids' shape and bytes, see `hash_ids`.
        documents: documents read; for ``"self"``, sequences generated.
        separator: text between documents: the tokenizer's EOS or nothing in calibration, a blank line in evaluation.
        revision: commit of the data set on the hub; empty for other sources.
        bos: which sequences begin with BOS, or what the tokenizer puts before text in its place: ``each``, ``once``
            (the first alone) or ``none``; empty where that is not known, as of tokens that were given.
        lead: how many tokens stand before the text in every sequence; their losses are no part of a perplexity.
    """

    ids: Tensor = field(compare=False, repr=False)
    source: str
    sha256: str
    documents: int
    separator: str = ""
    revision: str = ""
    bos: str = ""
    lead: int = 0

    @property
    def samples(self) -> int:
        """Number of sequences."""
        return self.ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Length of every sequence, in tokens."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens in all, those before the text among them."""
        return self.ids.numel()

    @property
    def bos_ids(self) -> list[int]:
        """Ids that every sequence begins with."""
        return self.ids[0, : self.lead].tolist()


def hash_ids(ids: Tensor) -> str:
    """Return the SHA-256 of token ids (samples, seq_len): of their shape in decimal, then of their int64 bytes."""
    shape = "x".join(map(str, ids.shape))
    return hashlib.sha256(
        shape.encode() + b"\n" + ids.to("cpu", torch.int64).contiguous().numpy().tobytes()
    ).hexdigest()


def calibration_tokens(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    text_field: str = "text",
    bos: str = "auto",
    model: nn.Module | None = None,
    listen: Listen | None = None,
) -> TokenSet:
    """Pack text into ``samples`` sequences of ``seq_len`` tokens, without padding.

    Documents are shuffled, tokenised without special tokens, joined by the tokenizer's EOS token (by nothing if it has
    none: see ``separator`` of the result) and cut; reading stops when there are enough tokens. Where the tokenizer puts
    a BOS before text, every sequence begins with it, and as much less text is in it. A local source of at most 200 000
    documents and 2^28 characters is shuffled as a whole; of a longer one, documents are drawn from a buffer of that
    size (10 000 documents for text from the hub). ``.txt`` files are never held as a whole, and of a long document only
    the beginning may be needed. The same arguments give the same bytes; no global random state is used.

    ``"self"`` samples the sequences from the model at temperature 1, each from BOS (or a random token, if the
    tokenizer has no BOS) to the full length, EOS or not. A model that has a BOS token is given one to begin with even
    if its tokenizer puts none before text, except with ``bos="never"``.

    Args:
        source: see `halve.text.documents.open_corpus`, or ``"self"``.
        tokenizer: of the model to calibrate.
        samples: sequences, at least 1.
        seq_len: tokens in each, at least 1.
        seed: of the shuffling or sampling.
        text_field: key or column of the text in ``.jsonl`` and ``.parquet`` files.
        bos: as `halve.text.special_tokens.begin_sequences` has it; ``once``, like ``never``, gives sequences without,
            since they are cut out of the midst of text.
        model: needed for ``"self"``; for other sources, the ids are checked against its vocabulary if it is given.
        listen: told how long writing ``"self"`` takes, as by `halve.text.generation.sample_text`.

    Raises:
        InputError: an argument or a file is not usable; the message names it.
        CalibrationError: the model generates non-finite logits.
        UnsupportedModelError: the model cannot generate with a key-value cache.
    """
    check_count("samples", samples)
    check_count("seq_len", seq_len)
    if source == SELF:
        if model is None:
            raise InputError("source 'self' needs the model that writes the text: give model, or another source")
        check_length(seq_len, model)
        vocabulary = len(tokenizer)
        generator = torch.Generator().manual_seed(seed)
        lead = _begin_own_text(tokenizer, bos)
        _check_room(seq_len, lead)
        first = torch.tensor([lead]).expand(samples, -1) if lead else _ordinary(tokenizer, samples, generator)
        check_vocabulary(first, model, SELF)
        ids = sample_text(model, first, seq_len, vocabulary, generator, listen)
        return TokenSet(ids, SELF, hash_ids(ids), samples, bos=EACH if lead else NONE, lead=len(lead))
    corpus = open_corpus(source, use="calibration", text_field=text_field)
    lead = begin_sequences(tokenizer, bos).of_each
    _check_room(seq_len, lead)
    ids, documents = _pack(corpus, tokenizer, samples, seq_len, seed, lead)
    if model is not None:
        check_vocabulary(ids, model, corpus.name)
    separator = "" if tokenizer.eos_token_id is None else str(tokenizer.eos_token)
    where = EACH if lead else NONE
    return TokenSet(ids, corpus.name, hash_ids(ids), documents, separator, corpus.revision, where, len(lead))


def evaluation_tokens(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    max_windows: int | None = None,
    text_field: str = "text",
    bos: str = "auto",
) -> TokenSet:
    """Cut text into consecutive windows of ``seq_len`` tokens.

    A single ``.txt`` is taken as it is; the documents of any other source are joined by blank lines, in order. The
    whole text is tokenised at once, without special tokens, and cut; a last partial window is dropped. Where the
    tokenizer puts a BOS before text, every window begins with it, and ``seq_len - 1`` tokens of text follow: models
    that have learned with a BOS are off their ground without it. ``bos="once"`` is the protocol of the tables in the
    literature: what the tokenizer puts before text stands before the whole of it, so in the first window alone. With
    ``max_windows``, only as much text is read and tokenised as these windows need, and they are the first windows of
    the unbounded result: the text tokenised goes at least 1024 tokens beyond those used.

    Args:
        source: see `halve.text.documents.open_corpus`.
        tokenizer: of the model to evaluate.
        seq_len: tokens in a window, at least 2. Perplexities at different lengths are not comparable.
        max_windows: upper bound on the windows, at least 1; None means all, but 256 for ``"c4"``.
        text_field: key or column of the text in ``.jsonl`` and ``.parquet`` files.
        bos: as `halve.text.special_tokens.begin_sequences` has it.

    Raises:
        InputError: an argument or a file is not usable, or the text is shorter than one window.
    """
    corpus = evaluation_corpus(source, seq_len=seq_len, max_windows=max_windows, text_field=text_field, bos=bos)
    if max_windows is None and source == "c4":
        max_windows = C4_WINDOWS
    begin = begin_sequences(tokenizer, bos)
    lead = begin.of_each
    _check_room(seq_len, lead)
    reading = _Joined(corpus.documents(), "\n\n")
    room = seq_len - len(lead)  # for text
    found = _encode_start(tokenizer, reading, max_windows and max_windows * room + len(lead))
    found = [*begin.of_text, *_without(lead, found)]
    windows = len(found) // room
    if not windows:
        _refuse_empty(reading.characters, corpus.name)
        raise InputError(
            f"source {corpus.name!r} has {len(found)} tokens, fewer than one window of seq_len = {seq_len}"
            f"{_beside(lead)}: give more text or a smaller seq_len"
        )
    windows = min(windows, max_windows or windows)
    ids = _rows(found, windows, seq_len, lead)
    separator = "\n\n" if corpus.joined else ""
    return TokenSet(
        ids, corpus.name, hash_ids(ids), reading.documents, separator, corpus.revision, begin.where, len(lead)
    )


def evaluation_corpus(
    source: str | Path, *, seq_len: int, max_windows: int | None, text_field: str, bos: str = "auto"
) -> Corpus:
    """Check the arguments of `evaluation_tokens` that can be checked without a tokenizer, and find its text.

    Raises:
        InputError: an argument is not usable; the message names it.
    """
    check_count("seq_len", seq_len)
    check_bos(bos)
    if max_windows is not None:
        check_count("max_windows", max_windows)
    if seq_len == 1:
        raise InputError("seq_len = 1 leaves no token to predict: give at least 2")
    if source == SELF:
        raise InputError("source 'self' is for calibration: a model's own text says nothing about its perplexity")
    return open_corpus(source, use="evaluation", text_field=text_field)


def check_texts(
    sources: Iterable[str | Path], *, seq_len: int | None, max_windows: int | None, text_field: str, bos: str = "auto"
) -> None:
    """Look for evaluation texts, before a model is loaded.

    Args:
        sources: of the texts, as for `evaluation_tokens`.
        seq_len: tokens in a window, None where that is not known yet.
        max_windows: see `evaluation_tokens`.
        text_field: of ``.jsonl`` and ``.parquet`` files.
        bos: see `evaluation_tokens`.

    Raises:
        InputError: a text cannot be found, or a setting is not usable.
    """
    if seq_len is not None:
        check_count("seq_len", seq_len)
    for source in sources:
        evaluation_corpus(source, seq_len=seq_len or 2, max_windows=max_windows, text_field=text_field, bos=bos)


def check_vocabulary(ids: Tensor, model: nn.Module, source: str) -> None:
    """Refuse token ids that have no row in the model's input embedding, which would crash or read garbage.

    Raises:
        InputError: an id of ``ids`` (any shape) is negative or too large.
    """
    get_embedding: Any = getattr(model, "get_input_embeddings", None)
    size = getattr(get_embedding and get_embedding(), "num_embeddings", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (isinstance(size, int) and high >= size):
        raise InputError(
            f"tokens of {source!r} hold the id {low if low < 0 else high}, but the model's vocabulary has {size} "
            "entries: use the tokenizer that belongs to the model"
        )


def longest(model: nn.Module) -> int | None:
    """Return ``max_position_embeddings`` of a model's configuration, None if it has no such limit."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_length(seq_len: int, model: nn.Module) -> None:
    """Refuse sequences longer than the model was built for.

    Raises:
        InputError: ``seq_len`` exceeds ``max_position_embeddings`` of the model's configuration, if it has one.
    """
    limit = longest(model)
    if limit is not None and seq_len > limit:
        raise InputError(f"seq_len = {seq_len} exceeds the model's max_position_embeddings = {limit}: lower seq_len")


def _refuse_empty(characters: int, name: str) -> None:
    if not characters:
        raise InputError(f"source {name!r} holds no text: give a file that is not empty")


def _check_room(seq_len: int, lead: Sequence[int]) -> None:
    if seq_len <= len(lead):
        raise InputError(
            f"seq_len = {seq_len} leaves no room for text beside BOS: give at least {len(lead) + 1}, or bos = 'never'"
        )


def _beside(lead: Sequence[int]) -> str:
    return " holds beside BOS" if lead else ""


def _without(lead: Sequence[int], ids: list[int]) -> list[int]:
    """Drop what sequences begin with where the text has it itself, as chats that were written out do: never twice."""
    return ids[len(lead) :] if ids[: len(lead)] == list(lead) else ids


def _rows(ids: list[int], rows: int, seq_len: int, lead: Sequence[int]) -> Tensor:
    """Cut the first of ids into (rows, seq_len), each row after ``lead``."""
    room = seq_len - len(lead)
    text = torch.tensor(ids[: rows * room]).reshape(rows, room)
    return torch.cat((torch.tensor(lead, dtype=text.dtype).expand(rows, -1), text), dim=1)


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


def _pack(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    seq_len: int,
    seed: int,
    lead: Sequence[int],
) -> tuple[Tensor, int]:
    """Return ids (samples, seq_len), each sequence after ``lead``, and the number of documents they come from."""
    room = seq_len - len(lead)  # for text
    needed = samples * room
    ids: list[int] = []
    used = 0
    shuffle = shuffled(corpus.documents(), seed, max_documents=_LOCAL_SHUFFLE if corpus.local else _HUB_SHUFFLE)
    for document in _encode_documents(shuffle, tokenizer, needed + len(lead)):
        if not document:
            continue
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += document if ids else _without(lead, document)
        used += 1
        if len(ids) >= needed:
            return _rows(ids, samples, seq_len, lead), used
    _refuse_empty(len(ids), corpus.name)
    fit, longest_one = len(ids) // room, len(ids) + len(lead)
    remedy = (
        f"samples = {fit} is the most that fits" if fit else f"not even one sample fits; seq_len <= {longest_one} would"
    )
    raise InputError(
        f"source {corpus.name!r} has {len(ids)} tokens, but samples = {samples} of seq_len = {seq_len} need {needed}"
        f"{' beside BOS' if lead else ''}: give more text, or fewer samples ({remedy})"
    )


def _encode_documents(
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


def _begin_own_text(tokenizer: "PreTrainedTokenizerBase", bos: str) -> tuple[int, ...]:
    """Return what texts of a model itself begin with; empty where there is no BOS, or none is wanted."""
    if bos != "never" and tokenizer.bos_token_id is not None:
        bos = "always"  # a text has to begin somewhere
    return begin_sequences(tokenizer, bos).ids


def _ordinary(tokenizer: "PreTrainedTokenizerBase", samples: int, generator: torch.Generator) -> Tensor:
    """Return a random token for each sample, (samples, 1), that is not special."""
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    return ordinary[torch.randint(len(ordinary), (samples,), generator=generator)][:, None]
