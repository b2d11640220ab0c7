"""As few dense matrices as keep a model's perplexity within a budget, as far as quickly pruned weights can tell."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from halve.errors import InputError
from halve.maths.pattern import Pattern
from halve.model.blocks import Batch
from halve.sensitivity.choose import by_cost
from halve.sensitivity.logits import log_probabilities
from halve.sensitivity.quick import pruned_in
from halve.sensitivity.units import Unit


def negative_log_likelihood(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean over predicted tokens of their negative log-likelihood, in nats.

    Args:
        model: a causal language model.
        batches: ``input_ids`` (rows, tokens) alone, of two tokens or more.
    """
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"]
        said = log_probabilities(model, batch).view(*ids.shape, -1)[:, :-1]
        right = said.gather(-1, ids[:, 1:, None].to(said.device))
        total -= float(right.double().sum())
        count += right.numel()
    return total / count


def fewest_dense(
    model: nn.Module,
    units: Sequence[Unit],
    damages: Mapping[str, float],
    held_out: Sequence[Batch],
    norms: Mapping[str, Tensor],
    pattern: Pattern,
    ratio: float,
) -> list[Unit]:
    """Return the units that stay dense, in the plan's order: the first of the costliest that are enough.

    With so many dense and all others quickly pruned, perplexity is at most ``ratio`` times the dense model's; with one
    less it is more, where perplexity falls with every unit that stays dense, which bisection takes for granted.

    Args:
        model: dense, where it is run; afterwards as before.
        units: in the plan's order.
        damages: of each, by name.
        held_out: batches that `damages` were not measured on.
        norms: `halve.sensitivity.quick.input_norms`.
        pattern: to prune to.
        ratio: above 1.

    Raises:
        InputError: all of them would have to stay dense.
    """
    most = negative_log_likelihood(model, held_out) + math.log(ratio)
    ranked = by_cost(units, damages)

    def fits(dense: int) -> bool:
        with pruned_in(model, ranked[dense:], norms, pattern):
            return negative_log_likelihood(model, held_out) <= most

    least, enough = -1, len(ranked)
    while enough - least > 1:
        middle = (least + enough) // 2
        if fits(middle):
            enough = middle
        else:
            least = middle
    if enough == len(ranked):
        raise InputError(
            f"with a single matrix pruned, perplexity is already more than {ratio:g} times the dense model's: "
            "ask keep_dense for more"
        )
    chosen = {unit.name for unit in ranked[:enough]}
    return [unit for unit in units if unit.name in chosen]
