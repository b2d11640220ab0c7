"""What a tokenizer puts before text by itself, and which sequences are to begin with it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halve.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS = ("auto", "always", "never", "once")
"""What can be asked for: see `begin_sequences`."""
EACH, ONCE, NONE = "each", "once", "none"
"""Which sequences begin with BOS: every one, only the first of a whole text, none."""

_WORDS = {EACH: "BOS in each", ONCE: "BOS in the first alone", NONE: "no BOS"}
_PROBES = ("The cat sat on the mat.", "a", "0")


@dataclass(frozen=True)
class Beginning:
    """What stands before text.

    Attributes:
        ids: of the tokens, mostly of a single one; empty for none.
        where: `EACH`, `ONCE` or `NONE`.
    """

    ids: tuple[int, ...] = ()
    where: str = NONE

    @property
    def of_each(self) -> tuple[int, ...]:
        """Tokens that every sequence begins with."""
        return self.ids if self.where == EACH else ()

    @property
    def of_text(self) -> tuple[int, ...]:
        """Tokens that the whole text begins with, before it is cut into sequences."""
        return self.ids if self.where == ONCE else ()


def check_bos(bos: object) -> None:
    """Refuse what is no way to begin sequences.

    Raises:
        InputError: it is not one of `BOS`.
    """
    if bos not in BOS:
        raise InputError(f"bos = {bos!r} is not known: choose one of {', '.join(BOS)}")


def begin_sequences(tokenizer: "PreTrainedTokenizerBase", bos: str) -> Beginning:
    """Return what sequences cut out of text begin with.

    Args:
        tokenizer: of the model.
        bos: ``auto`` begins every sequence with what the tokenizer itself puts before text, if it puts anything there;
            ``always`` with that, or else with the tokenizer's BOS token; ``never`` leaves it out; ``once`` puts what
            the tokenizer puts there before the whole text alone, so that it is in the first sequence.

    Raises:
        InputError: ``bos`` is unknown, or is ``always`` and there is no BOS token; or it cannot be told what the
            tokenizer puts before text.
    """
    check_bos(bos)
    if bos == "never":
        return Beginning()
    ids = put_before_text(tokenizer)
    if not ids and bos == "always":
        if tokenizer.bos_token_id is None:
            raise InputError(
                "bos = 'always', but the tokenizer has no BOS token: leave bos out, or set bos_token in it"
            )
        ids = (tokenizer.bos_token_id,)
    return Beginning(ids, ONCE if bos == "once" else EACH) if ids else Beginning()


def put_before_text(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before text where nobody says; empty if it puts none there.

    Raises:
        InputError: see `put_around_text`.
    """
    return put_around_text(tokenizer)[0]


def put_around_text(
    tokenizer: "PreTrainedTokenizerBase", *, target: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a tokenizer puts before text, and those that it puts after text, where nobody says.

    That it has a BOS token says nothing: GPT-2's and Qwen's tokenizers have one, or none, and put nothing there, and
    BERT's puts another. So a short text is tokenised with and without special tokens.

    Args:
        tokenizer: of the model.
        target: around what a decoder is to say, which translation models mark otherwise than what they read.

    Raises:
        InputError: it cannot be told, since the tokens of the text are not the same in both, or there are none.
    """
    for probe in _PROBES:
        (text,) = encode(tokenizer, [probe], target=target)
        (whole,) = encode(tokenizer, [probe], add_special_tokens=True, target=target)
        if not text:  # it drops what it does not know
            continue
        for start in range(len(whole) - len(text) + 1):
            if whole[start : start + len(text)] == text:
                return tuple(whole[:start]), tuple(whole[start + len(text) :])
        break
    raise InputError(
        f"it cannot be told what the tokenizer puts before text, since {probe!r} has no tokens, or others where "
        "special ones are added: give bos = 'never' where text is cut into sequences, or another tokenizer"
    )


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    *,
    add_special_tokens: bool = False,
    target: bool = False,
    longest: int | None = None,
) -> list[list[int]]:
    """Tokenise texts.

    Args:
        tokenizer: of the model.
        texts: as many as wanted.
        add_special_tokens: whether to put around each what the tokenizer puts there.
        target: as what a decoder is to say (`put_around_text`).
        longest: tokens to cut each down to, special ones among them; None takes all, however long.
    """
    if not texts:
        return []
    cutting: dict[str, Any] = {"truncation": False} if longest is None else {"truncation": True, "max_length": longest}
    # verbose=False: long text is the point here, and no sequence of this length reaches the model.
    encoded = tokenizer(
        **{"text_target" if target else "text": texts},
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        verbose=False,
        **cutting,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def said(where: str) -> str:
    """Return in words which sequences begin with BOS (`EACH`, `ONCE`, `NONE`); empty where that is not known."""
    return _WORDS.get(where, "")
