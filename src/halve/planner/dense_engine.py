"""What packed weights are worth beside the dense engine that a user would take: both decode models of the same shape.

Neither needs the model. Each is timed on models of few blocks and random weights, and since the time of a token is
linear in the number of blocks, two such times give that of the whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, Protocol

from torch import nn

from halve.errors import HalveError, InputError
from halve.model.layers import block_weight_count
from halve.model.stacks import find_stack
from halve.runtime.timing import last_level_cache

PROMPT, NEW, ROUNDS = 8, 32, 3
"""Tokens of the prompt, tokens that are timed behind it, and how often that is done, after once that is not counted."""
_FEWEST_BITS = 3.25
"""That a weight of a block takes in any contender."""
_BEYOND = 2
"""Last-level caches that all weights of the smallest model fill together, so that none is still there when read."""
_SPREAD = 3
"""Times as many blocks as the smaller one has the larger model."""

Counts = tuple[int, ...]


class DenseEngine(Protocol):
    """A program that runs dense models on the CPU, as a contender.

    Attributes:
        name: of the engine.
        kinds: what its weights can be held as, by the engine's own names.
    """

    name: str
    kinds: tuple[str, ...]

    def check(self, model: str, skeleton: nn.Module) -> None:
        """Check that models of this shape can be timed, before anything expensive.

        Args:
            model: its name, for messages.
            skeleton: the model, maybe without values.

        Raises:
            InputError: the engine is not installed.
            UnsupportedModelError: the model is of no family that it can be given.
        """

    def seconds(self, skeleton: nn.Module, kind: str, blocks: int, threads: int) -> float:
        """Return the seconds of a decoded token, the median of `ROUNDS` times `NEW` tokens behind a `PROMPT`.

        Args:
            skeleton: a model of the wanted shape; only names and sizes of its parameters are used, and its settings.
            kind: what weights are held as.
            blocks: that the timed model has.
            threads: of the CPU.

        Raises:
            HalveError: it could not be run.
        """


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How fast one contender decodes one sequence with a short context.

    Attributes:
        contender: the engine, and what its weights are held as.
        blocks: of the whole model.
        blocks_run: of the models that were timed.
        token_seconds: of a token, of each of these; empty where they could not be run.
        reason: why they could not.
    """

    contender: str
    blocks: int
    blocks_run: Counts
    token_seconds: tuple[float, ...]
    reason: str = ""

    @property
    def seconds(self) -> float | None:
        """Of a token of the whole model; None where that is not known."""
        if not self.token_seconds:
            return None
        first, last = self.token_seconds[0], self.token_seconds[-1]
        if len(self.blocks_run) == 1:
            return first
        block = (last - first) / (self.blocks_run[-1] - self.blocks_run[0])
        return first + (self.blocks - self.blocks_run[0]) * block if block > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole model; None where that is not known."""
        return None if self.seconds is None else 1 / self.seconds

    @property
    def why_unknown(self) -> str:
        """Why the whole model's time is not known, as half a sentence; empty where it is."""
        if self.reason or self.seconds is not None:
            return self.reason
        few, more = self.blocks_run
        return f"{more} blocks took no longer than {few}: something else was running, measure again"

    def as_json(self, packed: "Decoding") -> dict[str, Any]:
        """Return everything as plain JSON values, beside the packed model."""
        return {
            "contender": self.contender,
            "blocks": self.blocks,
            "blocks_run": list(self.blocks_run),
            "token_seconds": list(self.token_seconds),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "packed_speedup": speedup(packed, self),
            "reason": self.why_unknown,
        }


def speedup(packed: Decoding, other: Decoding) -> float | None:
    """Return how many times as fast as another contender the packed model is; None where that is not known."""
    if packed.seconds is None or other.seconds is None:
        return None
    return other.seconds / packed.seconds


def block_counts(skeleton: nn.Module) -> Counts:
    """Return how many blocks the timed models have: 1 and 3 of a large one, and all of a small one.

    Weights are read from memory where a whole model is run, and would be in a cache where few small blocks are.
    """
    stack = find_stack(skeleton)[1]
    in_block = block_weight_count(stack[0])
    outside = sum(parameter.numel() for parameter in skeleton.parameters()) - sum(map(block_weight_count, stack))
    missing = _BEYOND * last_level_cache() - (outside if _tied(skeleton) else outside // 2)  # the head's, at 8 bits
    few = max(1, ceil(missing / (in_block * _FEWEST_BITS / 8)))
    return (few, _SPREAD * few) if _SPREAD * few < len(stack) else (len(stack),)


def _tied(skeleton: Any) -> bool:
    return bool(getattr(skeleton.config, "tie_word_embeddings", False))


def check_engine(engine: DenseEngine, model: str, skeletons: Sequence[nn.Module], device: str, rows: int) -> None:
    """Check that a model can be timed beside a dense engine, before anything expensive.

    Args:
        engine: the contender.
        model: its name.
        skeletons: the model, maybe without values.
        device: where it is planned for.
        rows: the smallest batch that is planned for.

    Raises:
        InputError: it is no single model of transformers, or is not decoded one token after the other on the CPU; or
            as `DenseEngine.check`.
        UnsupportedModelError: as `DenseEngine.check`.
    """
    if isinstance(engine, str):
        raise InputError(f"against is {engine!r}: give the engine itself, such as halve.LlamaCpp()")
    if device != "cpu":
        raise InputError(f"{engine.name} is measured on the CPU, and this plan is for {device}: leave one of them out")
    if rows != 1:
        raise InputError(f"beside {engine.name} one sequence is decoded: let the batches have 1 among them")
    if len(skeletons) > 1 or not hasattr(skeletons[0], "config"):
        raise InputError(f"{model} is not one model of transformers, and cannot be decoded beside {engine.name}")
    engine.check(model, skeletons[0])


def measure_beside(
    engine: DenseEngine,
    skeleton: nn.Module,
    packed: str,
    packed_seconds: Callable[[int], float],
    *,
    threads: int,
    listen: Callable[[str], None],
) -> tuple[Decoding, ...]:
    """Time packed weights and every kind of a dense engine's, one after the other.

    Args:
        engine: of which `check_engine` has nothing to say.
        skeleton: the model, maybe without values.
        packed: what the packed contender is called.
        packed_seconds: returns the seconds of a token of a packed model of so many blocks.
        threads: of the CPU.
        listen: called with each contender before it is timed.

    Returns:
        tuple[Decoding, ...]: the packed one first.
    """
    whole, counts = len(find_stack(skeleton)[1]), block_counts(skeleton)

    def timed(contender: str, of: Callable[[int], float]) -> Decoding:
        listen(f"decoding by {contender}")
        try:
            times, reason = tuple(of(count) for count in counts), ""
        except HalveError as error:
            times, reason = (), str(error)
        return Decoding(contender=contender, blocks=whole, blocks_run=counts, token_seconds=times, reason=reason)

    kinds = {f"{engine.name} {kind}": partial(_dense_seconds, engine, skeleton, kind, threads) for kind in engine.kinds}
    return tuple(timed(contender, of) for contender, of in ({packed: packed_seconds} | kinds).items())


def _dense_seconds(engine: DenseEngine, skeleton: nn.Module, kind: str, threads: int, blocks: int) -> float:
    return engine.seconds(skeleton, kind, blocks, threads)


def said(found: Sequence[Decoding], pattern: str) -> str:
    """Return what the user is to take away of it, in sentences.

    Args:
        found: what `measure_beside` returns.
        pattern: of the packed matrices.
    """
    packed, *others = found
    unknown = [f"{each.contender} was not measured ({each.why_unknown})" for each in found if each.seconds is None]
    parts = []
    if packed.tokens_per_second is not None:
        rate = f"{packed.tokens_per_second:.1f} tokens a second"
        text = f"decoding one sequence with a short context, {packed.contender} makes {rate}"
        beside = [
            f"{speedup(packed, other):.2f} times what {other.contender} makes dense ({other.tokens_per_second:.1f})"
            for other in others
            if other.tokens_per_second is not None
        ]
        parts.append(f"{text}: {', '.join(beside)}" if beside else text)
    text = "; ".join([*parts, *unknown])
    return (
        f"{text[0].upper()}{text[1:]}. Quality differs, and is not measured here: a dense model in 8 or 4 bits usually "
        f"keeps more of what it knows than one at {pattern}."
    )
