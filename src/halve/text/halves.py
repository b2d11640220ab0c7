"""Text for encoder-decoders: what of each sequence the encoder reads, and what the decoder is taught to say.

Either a sequence is cut in two (`Halves`), or spans of it are masked (`halve.text.span_corruption.Spans`). Both sides
get what the tokenizer puts before and after a text there: T5 reads and says ``… </s>``, BART ``<s> … </s>``, mBART ends
with ``</s>`` and the language.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from halve.errors import InputError, one_line
from halve.text.documents import open_corpus
from halve.text.limits import DECODER, ENCODER, check_side, check_vocabulary
from halve.text.packing import WINDOW_SEPARATOR, Surroundings, packed, separator_of, surrounded, windows
from halve.text.special_tokens import EACH, NONE, check_bos, put_around_text
from halve.text.tokens import Cut, TokenSet, evaluation_corpus, hash_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_LABELS = 64
"""Tokens that the decoder is given in every calibration sequence at least: what it does with fewer says little."""


@dataclass(frozen=True)
class Frame:
    """What stands around the text on one side.

    Attributes:
        before: ids.
        after: likewise.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.before) + len(self.after)

    def around(self, text: Tensor) -> Tensor:
        """Put it around every row of text, (rows, tokens)."""
        return surrounded(text, self.before, self.after)


@dataclass(frozen=True)
class Frames:
    """What stands around the text on both sides.

    Attributes:
        encoder: around what the encoder reads.
        labels: around what the decoder is to say.
    """

    encoder: Frame
    labels: Frame

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", model: nn.Module, bos: str) -> "Frames":
        """Ask the tokenizer.

        Args:
            tokenizer: of the model.
            model: an encoder-decoder.
            bos: ``auto``: what the tokenizer puts around text there; ``always``: likewise, and where it puts nothing
                before what the encoder reads, its BOS token; ``never``: nothing before it on either side.

        Raises:
            InputError: ``bos`` is none of these, or is ``always`` and there is no BOS token; or it cannot be told what
                the tokenizer puts around text.
        """
        check_bos(bos)
        if bos == "once":
            raise InputError(
                "bos = 'once' is how tables of decoder-only models cut a text, and this model is an encoder-decoder: "
                "leave bos out, or give 'always' or 'never'"
            )
        read, said = Frame(*put_around_text(tokenizer)), Frame(*put_around_text(tokenizer, target=True))
        if bos == "never":
            return cls(Frame(after=read.after), Frame(after=said.after))
        if bos == "always" and not read.before:
            if tokenizer.bos_token_id is None:
                raise InputError(
                    "bos = 'always', but the tokenizer has no BOS token: leave bos out, or set bos_token in it"
                )
            read = Frame((tokenizer.bos_token_id,), read.after)
        return cls(read, Frame(without_start(said.before, model), said.after))


class Recipe(Protocol):
    """How a sequence of text is shared out between the two sides."""

    @property
    def how(self) -> str:
        """What the record calls it."""

    @property
    def others(self) -> int:
        """Tokens of a sequence that are no text, besides those before what the encoder reads."""

    @property
    def sides(self) -> tuple[int, int]:
        """Tokens that the encoder reads, and labels."""

    def share(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Share out text (samples, tokens): to what the encoder reads, and to labels, each framed."""


@dataclass(frozen=True)
class Halves:
    """The first half of each sequence to the encoder, the second to the decoder.

    Attributes:
        frames: what stands around both.
        seq_len: tokens on both sides together, those around the text among them; the decoder has the smaller half.
    """

    frames: Frames
    seq_len: int
    how: str = "halves"

    @property
    def others(self) -> int:
        """See `Recipe`."""
        return len(self.frames.encoder.after) + self.frames.labels.size

    @property
    def sides(self) -> tuple[int, int]:
        """See `Recipe`."""
        return self.seq_len - self.seq_len // 2, self.seq_len // 2

    def share(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """See `Recipe`."""
        read = self.sides[0] - self.frames.encoder.size
        return self.frames.encoder.around(text[:, :read]), self.frames.labels.around(text[:, read:])


def calibration_halves(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    model: nn.Module,
    recipe: Recipe,
    frames: Frames,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    text_field: str,
) -> TokenSet:
    """Pack text into sequences for an encoder-decoder, without padding.

    Args:
        source: as for `halve.text.tokens.calibration_tokens`, which reads it in the same way.
        tokenizer: of the model.
        model: an encoder-decoder that reads text.
        recipe: what goes where.
        frames: what stands around the text on both sides.
        samples: sequences.
        seq_len: tokens on both sides together, at most.
        seed: of the shuffling.
        text_field: key or column of the text.

    Raises:
        InputError: there is too little text; or a side is too long for the model, or the decoder's too short
            (`LEAST_LABELS`).
    """
    check_sides(recipe, seq_len, model, least=LEAST_LABELS)
    corpus = open_corpus(source, use="calibration", text_field=text_field)
    around = Surroundings(frames.encoder.before, recipe.others)
    text, documents = packed(corpus, tokenizer, samples, seq_len, seed, around)
    found = _token_set(recipe, frames, text, corpus.name, documents, separator_of(tokenizer), corpus.revision)
    _check_ids(found, model)
    return found


def evaluation_halves(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    model: nn.Module,
    *,
    seq_len: int,
    max_windows: int | None,
    text_field: str,
    bos: str,
) -> TokenSet:
    """Cut text into consecutive windows, the first half of each for the encoder, the second for the decoder to say.

    Args:
        source: as for `halve.text.tokens.evaluation_tokens`, which reads it in the same way.
        tokenizer: of the model.
        model: an encoder-decoder that reads text.
        seq_len: tokens in a window, on both sides together.
        max_windows: only the first windows.
        text_field: key or column of the text.
        bos: as for `Frames.of`.

    Raises:
        InputError: there is less than one window of text, or a side is too long for the model.
    """
    corpus = evaluation_corpus(source, seq_len=seq_len, max_windows=max_windows, text_field=text_field, bos=bos)
    frames = Frames.of(tokenizer, model, bos)
    recipe = Halves(frames, seq_len)
    check_sides(recipe, seq_len, model, least=frames.labels.size + 1)
    around = Surroundings(frames.encoder.before, recipe.others)
    text, documents = windows(corpus, tokenizer, max_windows, seq_len, around)
    separator = WINDOW_SEPARATOR if corpus.joined else ""
    found = _token_set(recipe, frames, text, corpus.name, documents, separator, corpus.revision)
    _check_ids(found, model)
    return found


def check_sides(recipe: Recipe, seq_len: int, model: nn.Module, *, least: int) -> None:
    """Refuse sequences of which a side is too long for the model, or the decoder's too short to be of use.

    Raises:
        InputError: the message names the side, its length and seq_len.
    """
    read, labels = recipe.sides
    if labels < least:
        raise InputError(
            f"seq_len = {seq_len} leaves {labels} tokens to the decoder ({recipe.how}), and it needs {least} at least: "
            "raise seq_len"
        )
    for side, length in ((ENCODER, read), (DECODER, labels)):
        check_side(side, length, seq_len, model)


def shift_right(model: nn.Module, labels: Tensor) -> Tensor:
    """Return what the decoder is fed so that it is to say the labels, as the model itself makes it of them.

    Most models put their start token first and drop the last label; mBART puts the last label, the language, first.

    Args:
        model: an encoder-decoder.
        labels: (rows, tokens), without padding.

    Raises:
        InputError: the model does not say which token its decoder begins with.
    """
    prepare: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    start = start_token(model)
    reason = ""
    if prepare is not None:
        try:
            fed: Tensor = prepare(labels=labels)
        except (TypeError, ValueError) as error:  # what it is made of is None
            reason = f" ({one_line(error)})"
        else:
            return fed
    elif start is not None:
        return torch.cat((labels.new_full((len(labels), 1), start), labels[:, :-1]), dim=1)
    raise InputError(
        f"{type(model).__name__} does not say which token its decoder begins with{reason}: set decoder_start_token_id "
        "and pad_token_id in its config"
    )


def start_token(model: nn.Module) -> int | None:
    """Return the token that a model's decoder begins with; None where neither config says."""
    configs = (getattr(model, name, None) for name in ("config", "generation_config"))
    found = (getattr(config, "decoder_start_token_id", None) for config in configs)
    return next((token for token in found if isinstance(token, int)), None)


def without_start(ids: Sequence[int], model: nn.Module) -> tuple[int, ...]:
    """Drop the token that the decoder begins with from the beginning of labels: it is put there by the shift.

    Whisper's tokenizer puts it before every transcript.
    """
    return tuple(ids[1:] if ids and ids[0] == start_token(model) else ids)


def _token_set(
    recipe: Recipe, frames: Frames, text: Tensor, source: str, documents: int, separator: str, revision: str
) -> TokenSet:
    read, labels = recipe.share(text)
    lead = len(frames.encoder.before)
    return TokenSet(
        ids=torch.cat((read, labels), dim=1),
        source=source,
        sha256=hashlib.sha256(f"{hash_ids(read)} {hash_ids(labels)}".encode()).hexdigest(),
        documents=documents,
        separator=separator,
        revision=revision,
        bos=EACH if lead else NONE,
        lead=lead,
        cut=Cut(recipe.how, read.shape[1], len(frames.labels.before), len(frames.labels.after)),
    )


def _check_ids(found: TokenSet, model: nn.Module) -> None:
    check_vocabulary(found.encoder_ids, model, found.source, ENCODER)
    check_vocabulary(found.labels, model, found.source, DECODER)
