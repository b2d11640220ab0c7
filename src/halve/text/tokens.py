"""Calibration and evaluation text to tokens: packed samples, evaluation windows, text the model itself writes."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halve.checks import check_count
from halve.errors import InputError
from halve.text.documents import Corpus, Document, open_corpus, pieces, shuffled
from halve.text.generation import Listen, sample_text, text_config

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
    """

    ids: Tensor = field(compare=False, repr=False)
    source: str
    sha256: str
    documents: int
    separator: str = ""
    revision: str = ""

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
        """Number of tokens in all."""
        return self.ids.numel()


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
    model: nn.Module | None = None,
    listen: Listen | None = None,
) -> TokenSet:
    """Pack text into ``samples`` sequences of ``seq_len`` tokens, without padding.

    Documents are shuffled, tokenised without special tokens, joined by the tokenizer's EOS token (by nothing if it has
    none: see ``separator`` of the result) and cut; reading stops when there are enough tokens. A local source of at
    most 200 000 documents and 2^28 characters is shuffled as a whole; of a longer one, documents are drawn from a
    buffer of that size (10 000 documents for text from the hub). ``.txt`` files are never held as a whole, and of a
    long document only the beginning may be needed. The same arguments give the same bytes; no global random state is
    used.

    ``"self"`` samples the sequences from the model at temperature 1, each from BOS (or a random token, if the
    tokenizer has no BOS) to the full length, EOS or not.

    Args:
        source: see `halve.text.documents.open_corpus`, or ``"self"``.
        tokenizer: of the model to calibrate.
        samples: sequences, at least 1.
        seq_len: tokens in each, at least 1.
        seed: of the shuffling or sampling.
        text_field: key or column of the text in ``.jsonl`` and ``.parquet`` files.
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
        first = _first_tokens(tokenizer, samples, generator)
        check_vocabulary(first, model, SELF)
        ids = sample_text(model, first, seq_len, vocabulary, generator, listen)
        return TokenSet(ids, SELF, hash_ids(ids), samples)
    corpus = open_corpus(source, use="calibration", text_field=text_field)
    ids, documents = _pack(corpus, tokenizer, samples, seq_len, seed)
    if model is not None:
        check_vocabulary(ids, model, corpus.name)
    separator = "" if tokenizer.eos_token_id is None else str(tokenizer.eos_token)
    return TokenSet(ids, corpus.name, hash_ids(ids), documents, separator, corpus.revision)


def evaluation_tokens(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_len: int,
    max_windows: int | None = None,
    text_field: str = "text",
) -> TokenSet:
    """Cut text into consecutive windows of ``seq_len`` tokens, as perplexities are usually measured.

    A single ``.txt`` is taken as it is; the documents of any other source are joined by blank lines, in order. The
    whole text is tokenised at once, with the special tokens that the tokenizer adds by default; a last partial window
    is dropped. With ``max_windows``, only as much text is read and tokenised as these windows need, and they are the
    first windows of the unbounded result: the text tokenised goes at least 1024 tokens beyond those used.

    Args:
        source: see `halve.text.documents.open_corpus`.
        tokenizer: of the model to evaluate.
        seq_len: tokens in a window, at least 2. Perplexities at different lengths are not comparable.
        max_windows: upper bound on the windows, at least 1; None means all, but 256 for ``"c4"``.
        text_field: key or column of the text in ``.jsonl`` and ``.parquet`` files.

    Raises:
        InputError: an argument or a file is not usable, or the text is shorter than one window.
    """
    corpus = evaluation_corpus(source, seq_len=seq_len, max_windows=max_windows, text_field=text_field)
    if max_windows is None and source == "c4":
        max_windows = C4_WINDOWS
    reading = _Joined(corpus.documents(), "\n\n")
    found = _encode_start(tokenizer, reading, max_windows and max_windows * seq_len, add_special_tokens=True)
    windows = len(found) // seq_len
    if not windows:
        _refuse_empty(reading.characters, corpus.name)
        raise InputError(
            f"source {corpus.name!r} has {len(found)} tokens, fewer than one window of seq_len = {seq_len}: "
            "give more text or a smaller seq_len"
        )
    windows = min(windows, max_windows or windows)
    ids = torch.tensor(found[: windows * seq_len]).reshape(windows, seq_len)
    return TokenSet(
        ids, corpus.name, hash_ids(ids), reading.documents, "\n\n" if corpus.joined else "", corpus.revision
    )


def evaluation_corpus(source: str | Path, *, seq_len: int, max_windows: int | None, text_field: str) -> Corpus:
    """Check the arguments of `evaluation_tokens` that can be checked without a tokenizer, and find its text.

    Raises:
        InputError: an argument is not usable; the message names it.
    """
    check_count("seq_len", seq_len)
    if max_windows is not None:
        check_count("max_windows", max_windows)
    if seq_len == 1:
        raise InputError("seq_len = 1 leaves no token to predict: give at least 2")
    if source == SELF:
        raise InputError("source 'self' is for calibration: a model's own text says nothing about its perplexity")
    return open_corpus(source, use="evaluation", text_field=text_field)


def check_texts(
    sources: Iterable[str | Path], *, seq_len: int | None, max_windows: int | None, text_field: str
) -> None:
    """Look for evaluation texts, before a model is loaded.

    Args:
        sources: of the texts, as for `evaluation_tokens`.
        seq_len: tokens in a window, None where that is not known yet.
        max_windows: see `evaluation_tokens`.
        text_field: of ``.jsonl`` and ``.parquet`` files.

    Raises:
        InputError: a text cannot be found, or a number is not usable.
    """
    if seq_len is not None:
        check_count("seq_len", seq_len)
    for source in sources:
        evaluation_corpus(source, seq_len=seq_len or 2, max_windows=max_windows, text_field=text_field)


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


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: long text is the point here, and no sequence of this length reaches the model.
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, truncation=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _encode_start(
    tokenizer: "PreTrainedTokenizerBase", text: Iterable[str], needed: int | None, *, add_special_tokens: bool
) -> list[int]:
    """Tokenise a text given in pieces: all of it, or its first ``needed`` tokens or more without reading further."""
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
        (ids,) = _encode(tokenizer, [start], add_special_tokens=add_special_tokens)
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
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", samples: int, seq_len: int, seed: int
) -> tuple[Tensor, int]:
    """Return ids (samples, seq_len) and the number of documents they come from."""
    needed = samples * seq_len
    ids: list[int] = []
    used = 0
    shuffle = shuffled(corpus.documents(), seed, max_documents=_LOCAL_SHUFFLE if corpus.local else _HUB_SHUFFLE)
    for document in _encode_documents(shuffle, tokenizer, needed):
        if not document:
            continue
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += document
        used += 1
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).reshape(samples, seq_len), used
    _refuse_empty(len(ids), corpus.name)
    fit = len(ids) // seq_len
    remedy = (
        f"samples = {fit} is the most that fits" if fit else f"not even one sample fits; seq_len <= {len(ids)} would"
    )
    raise InputError(
        f"source {corpus.name!r} has {len(ids)} tokens, but samples = {samples} of seq_len = {seq_len} need {needed}: "
        f"give more text, or fewer samples ({remedy})"
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
        yield from _encode(tokenizer, batch, add_special_tokens=False)
        batch = []
        if isinstance(document, Path) or len(document) > _LONG:
            yield _encode_start(tokenizer, pieces(document), needed, add_special_tokens=False)
    yield from _encode(tokenizer, batch, add_special_tokens=False)


def _first_tokens(tokenizer: "PreTrainedTokenizerBase", samples: int, generator: torch.Generator) -> Tensor:
    """Return what self-written texts begin with, (samples,): BOS, or a random ordinary token where there is none."""
    if tokenizer.bos_token_id is not None:
        return torch.full((samples,), tokenizer.bos_token_id)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    return ordinary[torch.randint(len(ordinary), (samples,), generator=generator)]
