"""Which matrices of a block are solved together, what that costs, and how it is done."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from halve.errors import InputError, LayerFailedError
from halve.maths.gram import Statistics
from halve.maths.pattern import apply_mask
from halve.model.plan import Matrix
from halve.run.settings import Settings
from halve.solve.matrix import GIVEN, prune_weight, prune_weights
from halve.solve.outcome import Outcome, Status

_BUNDLE_WEIGHTS = 1 << 28
"""Most weights of matrices that are solved together: 1 GiB in float32, several of which a solver needs."""
_LEAST_SECONDS = 1e-3
"""What a time limit that is used up counts as."""


def bundles(
    matrices: Sequence[Matrix], statistics: Mapping[str, Statistics | None], most: int = _BUNDLE_WEIGHTS
) -> Iterator[list[Matrix]]:
    """Yield groups of neighbours that share their statistics.

    Args:
        matrices: of one block, in order.
        statistics: of each matrix's inputs, by name.
        most: weights that a group of several may have.
    """
    bundle: list[Matrix] = []
    for matrix in matrices:
        shared = statistics.get(matrix.name)
        size = sum(other.d_out * other.d_in for other in (*bundle, matrix))
        if bundle and (shared is None or shared is not statistics.get(bundle[0].name) or size > most):
            yield bundle
            bundle = []
        bundle.append(matrix)
    if bundle:
        yield bundle


def operations(matrix: Matrix) -> float:
    """About how many multiplications the default solver takes: products of every row, and factorisations."""
    return float(matrix.d_in**2 * (60 * matrix.d_out + 15 * matrix.d_in))


def share_of_time(bundle: Sequence[Matrix], ahead: Sequence[Matrix], seconds: float) -> float:
    """Return how many of the ``seconds`` that are left for all matrices ``ahead`` are for ``bundle``, by operations."""
    cost = sum(operations(matrix) for matrix in bundle) / sum(operations(matrix) for matrix in ahead)
    return max(_LEAST_SECONDS, seconds) * cost


def prune_bundle(
    bundle: Sequence[Matrix],
    weights: Sequence[Tensor],
    statistics: Statistics | None,
    settings: Settings,
    options: Mapping[str, Any],
    *,
    routed: bool,
    masks: Sequence[Tensor] | None = None,
) -> list[Outcome]:
    """Prune matrices that share their statistics.

    Args:
        bundle: the matrices.
        weights: (d_out, d_in) of each.
        statistics: of their inputs, None if there are none.
        settings: what was asked.
        options: of method and refit, for these matrices.
        routed: whether only the tokens that a router sent there are in ``statistics``, which then may be too few.
        masks: (d_out, d_in) bool of what each keeps; None lets the method choose.

    Returns:
        list[Outcome]: one for each matrix.

    Raises:
        InputError: a matrix or its statistics cannot be used as they are; the message names the matrices.
        LayerFailedError: too few tokens, and no fallback.
    """
    tokens = 0 if statistics is None else statistics.tokens
    if routed and tokens < settings.min_expert_tokens:
        if masks is not None:
            reason = _unseen(tokens, settings)
            kept = [apply_mask(weight, mask) for weight, mask in zip(weights, masks, strict=True)]
            return [Outcome(weight, Status.FELL_BACK, GIVEN, reason, {"tokens": float(tokens)}) for weight in kept]
        return [_prune_unseen(matrix, weight, tokens, settings) for matrix, weight in zip(bundle, weights, strict=True)]
    try:
        return prune_weights(
            weights,
            statistics,
            settings.pattern,
            settings.method,
            settings.refit,
            fallback=settings.fallback,
            objective=settings.objective,
            masks=masks,
            **options,
        )
    except InputError as error:
        raise InputError(f"{', '.join(matrix.name for matrix in bundle)}: {error}") from error


def _unseen(tokens: float, settings: Settings) -> str:
    return f"only {tokens} calibration tokens reached this expert (at least {settings.min_expert_tokens} are needed)"


def _prune_unseen(matrix: Matrix, weight: Tensor, tokens: int, settings: Settings) -> Outcome:
    """Prune an expert whose statistics are missing or too thin by magnitude, and say so; refuse if strict."""
    reason = _unseen(tokens, settings)
    as_asked = settings.method == "magnitude" and settings.refit == "none"
    if settings.fallback is None and not as_asked:
        if settings.method == "magnitude":
            raise LayerFailedError(
                f"{matrix.name}: {reason} for refit {settings.refit}: use more samples, or refit none"
            )
        raise LayerFailedError(
            f"{matrix.name}: {reason}: use more samples or a smaller min_expert_tokens, or give a fallback, and such "
            "experts are pruned by magnitude"
        )
    outcome = prune_weight(weight, None, settings.pattern, "magnitude", "none")
    if as_asked:
        return outcome
    facts = {**outcome.facts, "tokens": float(tokens)}
    return Outcome(outcome.weight, Status.FELL_BACK, "magnitude", reason, facts)
