"""What fits a model: its vocabulary and the lengths that it was built for, of each side of an encoder-decoder."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from halve.errors import InputError
from halve.text.generation import text_config

if TYPE_CHECKING:
    from halve.text.tokens import TokenSet

ENCODER, DECODER = "encoder", "decoder"
AUDIO = ("input_features", "input_values")
"""What models call the audio that they hear."""


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder, and a decoder that is fed tokens of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def refuse_unread(model: nn.Module, what: str, *, usable: bool = True) -> None:
    """Refuse an encoder-decoder whose encoder reads no tokens.

    Args:
        model: an encoder-decoder.
        what: cannot be done with text, a clause.
        usable: whether something else than text would do.

    Raises:
        InputError: its encoder takes audio, images or something else.
    """
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        return
    instead = f"batches with {name} and decoder_input_ids"
    if name in AUDIO:
        instead = "a .jsonl file of audio files with transcripts, and its two fields as pair_fields ('audio,text')"
    remedy = f": give {instead}" if usable else ""
    raise InputError(f"the encoder of {type(model).__name__} takes {name}, not text, so {what}{remedy}")


def check_fits(tokens: "TokenSet", model: nn.Module) -> None:
    """Refuse tokens that do not fit a model, or are cut for one of another kind.

    Raises:
        InputError: sequences are too long or cut for another kind of model, or an id has no row in the embedding.
    """
    name = type(model).__name__
    if tokens.cut is None:
        if is_encoder_decoder(model):
            raise InputError(
                f"{tokens.source!r} is tokens of one sequence each, and {name} is an encoder-decoder: give a text, or "
                "batches with input_ids and decoder_input_ids"
            )
        check_length(tokens.seq_len, model)
        check_vocabulary(tokens.ids, model, tokens.source)
        return
    if not is_encoder_decoder(model):
        raise InputError(
            f"{tokens.source!r} is cut for an encoder-decoder, and {name} is none: give tokens of one sequence each"
        )
    for side, ids in ((ENCODER, tokens.encoder_ids), (DECODER, tokens.labels)):
        check_side(side, ids.shape[1], tokens.seq_len, model)
        check_vocabulary(ids, model, tokens.source, side)


def check_vocabulary(ids: Tensor, model: nn.Module, source: str, side: str = ENCODER) -> None:
    """Refuse token ids that have no row in the model's input embedding, which would crash or read garbage.

    Args:
        ids: any shape.
        model: the model.
        source: of the ids, for messages.
        side: of an encoder-decoder, whose decoder may have a vocabulary of its own.

    Raises:
        InputError: an id is negative or too large.
    """
    part: Any = model
    if side == DECODER and is_encoder_decoder(model) and hasattr(model, "get_decoder"):
        part = part.get_decoder()
    get_embedding: Any = getattr(part, "get_input_embeddings", None)
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


def longest_side(model: nn.Module, side: str) -> int | None:
    """Return how many tokens a side of an encoder-decoder was built for; None where its config names no limit.

    Args:
        model: an encoder-decoder.
        side: `ENCODER` or `DECODER`.
    """
    config = getattr(model, "config", None)
    named = f"max_{side}_position_embeddings", "max_target_positions" if side == DECODER else "max_source_positions"
    places = [(config, name) for name in named]
    places += [(part, "max_position_embeddings") for part in (getattr(config, side, None), config)]
    limits = (getattr(place, name, None) for place, name in places)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def check_side(side: str, length: int, seq_len: int, model: nn.Module) -> None:
    """Refuse a part of a sequence that is longer than its side of an encoder-decoder was built for.

    Args:
        side: `ENCODER` or `DECODER`.
        length: its tokens.
        seq_len: what was asked for, of which they are a part.
        model: an encoder-decoder.

    Raises:
        InputError: it is too long.
    """
    limit = longest_side(model, side)
    if limit is not None and length > limit:
        raise InputError(
            f"seq_len = {seq_len} gives the {side} {length} tokens, and it was built for {limit} at most: lower seq_len"
        )
