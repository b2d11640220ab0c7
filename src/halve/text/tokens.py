"""Calibration and evaluation text to tokens: packed samples, evaluation windows, text the model itself writes."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halve.checks import check_count
from halve.errors import InputError
from halve.text.documents import Corpus, open_corpus
from halve.text.generation import Listen, sample_text
from halve.text.limits import check_length, check_vocabulary
from halve.text.packing import (
    WINDOW_SEPARATOR,
    Surroundings,
    check_room,
    packed,
    separator_of,
    surrounded,
    windows,
)
from halve.text.special_tokens import EACH, NONE, begin_sequences, check_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SELF = "self"
"""The source name for text sampled from the model itself."""


@dataclass(frozen=True)
class Cut:
    """How each sequence is shared out between the two sides of an encoder-decoder.

    Attributes:
        how: ``halves``, or ``span corruption``.
        encoder: its first tokens, which the encoder reads; the others are the decoder's labels: what it is to say.
        before: labels before the text, that the tokenizer puts there.
        after: labels after the text, likewise.
    """

    how: str
    encoder: int
    before: int = 0
    after: int = 0


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
        cut: what of each sequence the encoder reads and what the decoder is to say; None for any other model.
    """

    ids: Tensor = field(compare=False, repr=False)
    source: str
    sha256: str
    documents: int
    separator: str = ""
    revision: str = ""
    bos: str = ""
    lead: int = 0
    cut: Cut | None = None

    @property
    def encoder_ids(self) -> Tensor:
        """What the encoder reads, (samples, tokens); all there is where nothing is cut."""
        return self.ids if self.cut is None else self.ids[:, : self.cut.encoder]

    @property
    def labels(self) -> Tensor:
        """What the decoder is to say, (samples, tokens), none where nothing is cut."""
        return self.ids[:, self.seq_len if self.cut is None else self.cut.encoder :]

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
        check_room(seq_len, Surroundings(lead))
        first = torch.tensor([lead]).expand(samples, -1) if lead else _ordinary(tokenizer, samples, generator)
        check_vocabulary(first, model, SELF)
        ids = sample_text(model, first, seq_len, vocabulary, generator, listen)
        return TokenSet(ids, SELF, hash_ids(ids), samples, bos=EACH if lead else NONE, lead=len(lead))
    corpus = open_corpus(source, use="calibration", text_field=text_field)
    lead = begin_sequences(tokenizer, bos).of_each
    text, documents = packed(corpus, tokenizer, samples, seq_len, seed, Surroundings(lead))
    ids = surrounded(text, lead)
    if model is not None:
        check_vocabulary(ids, model, corpus.name)
    where = EACH if lead else NONE
    return TokenSet(
        ids, corpus.name, hash_ids(ids), documents, separator_of(tokenizer), corpus.revision, where, len(lead)
    )


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
    begin = begin_sequences(tokenizer, bos)
    lead = begin.of_each
    text, documents = windows(corpus, tokenizer, max_windows, seq_len, Surroundings(lead), begin.of_text)
    ids = surrounded(text, lead)
    separator = WINDOW_SEPARATOR if corpus.joined else ""
    return TokenSet(ids, corpus.name, hash_ids(ids), documents, separator, corpus.revision, begin.where, len(lead))


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
