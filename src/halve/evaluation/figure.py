"""A perplexity as a figure: how it was measured, and how far it is from another, within which error."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from halve.errors import InputError, counted
from halve.text.special_tokens import said

SECOND_HALF = "the decoder's half scored, given the encoder's"
"""How a perplexity of an encoder-decoder is measured, which cannot be compared with that of a causal model."""

_DECIMALS = 6


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of one model on one set of windows.

    Attributes:
        value: exp of ``nll``; infinite if that overflows.
        windows: windows measured.
        seq_len: tokens in a window; perplexities at different lengths are not comparable.
        dtype: what the matrices were multiplied in.
        source: where the text came from.
        tokens_sha256: hash of the token ids, see `halve.text.tokens.hash_ids`.
        seconds: wall-clock time of the measurement, tokenising and loading excluded.
        nll: mean negative log-likelihood in nats, over the predicted tokens of every window: all but its first, and
            but those that stand before the text.
        note: empty if the logits were computed in slices; otherwise why the model's own, slower forward was used.
        bos: which windows begin with BOS, as `halve.text.tokens.TokenSet` has it.
        scored: what of each window is scored: empty for all of it, `SECOND_HALF` for an encoder-decoder.
        window_nll: mean negative log-likelihood of every window, in nats, in the order of the text.
        versions: of the packages that measured.
    """

    value: float
    windows: int
    seq_len: int
    dtype: str
    source: str
    tokens_sha256: str
    seconds: float
    nll: float
    note: str = ""
    bos: str = ""
    scored: str = ""
    window_nll: tuple[float, ...] = field(default=(), repr=False)
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)

    def minus(self, first: "Perplexity") -> tuple[float, float | None]:
        """Return by how much the logarithm of another perplexity is lower, and the standard error of that.

        The error is that of paired windows: what they have in common, being hard or easy to predict, drops out.

        Args:
            first: of another model on the same windows.

        Returns:
            tuple[float, float | None]: the difference of the logarithms, in nats a token, and its standard error; None
                for a single window.

        Raises:
            InputError: they were measured on other tokens.
        """
        if not self.pairs_with(first):
            raise InputError(
                f"perplexities on {self.source} and {first.source} are of other tokens or windows, so they cannot be "
                "compared: measure both models on the same text, with the same tokenizer, seq_len and bos"
            )
        return paired_difference(self.window_nll, first.window_nll)

    def pairs_with(self, first: "Perplexity") -> bool:
        """Whether both were measured on the same windows, and the loss of every window is known of both."""
        mine, theirs = ((one.tokens_sha256, one.seq_len, one.bos, one.scored) for one in (self, first))
        return mine == theirs and len(self.window_nll) == len(first.window_nll) > 0

    def as_json(self, first: "Perplexity | None" = None) -> dict[str, Any]:
        """Return this as plain JSON values; a perplexity that overflows is None.

        Args:
            first: what to tell the difference of the logarithms to, if it is of the same windows.
        """
        value = self.value if math.isfinite(self.value) else None
        content = asdict(self) | {"value": value, "window_nll": rounded(self.window_nll)}
        if first is not None and self.pairs_with(first):
            content["log_difference"], content["log_difference_stderr"] = self.minus(first)
        return content


def paired_difference(after: Sequence[float], before: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of differences between pairs, and its standard error; None for a single pair.

    Args:
        after: a number a window, of one model.
        before: of another model, as many.
    """
    differences = [new - old for new, old in zip(after, before, strict=True)]
    if len(differences) == 1:
        return differences[0], None
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def said_difference(difference: float, stderr: float | None) -> str:
    """Return a difference of logarithms in words: ``+0.1234 ± 0.0056``."""
    return f"{difference:+.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def rounded(window_nll: Sequence[float]) -> list[float]:
    """Return losses of windows as they are put on record: to 6 decimals, which is far below their standard error."""
    return [round(value, _DECIMALS) for value in window_nll]


def measured_as(windows: int, seq_len: int, bos: str, dtype: str, scored: str = "") -> str:
    """Say how a perplexity was measured, without which it says nothing."""
    return ", ".join(filter(None, (f"{counted(windows, 'window')} of {seq_len} tokens", scored, said(bos), dtype)))
