"""Shrinking a Gram matrix towards its diagonal, by as much as held-out tokens ask for.

    H_s = (1 - s) H + s diag(H),   0 <= s <= 1

With s = 1 features count as uncorrelated: every method that minimises the layer's loss then keeps Wanda's mask, and no
refit changes a weight. With few calibration tokens the off-diagonal of H is noise, and whoever fits it makes the layer
worse than Wanda does. How far to trust it is chosen by cross-validation over the two halves of the calibration tokens:
Wanda's mask refitted on one half is judged on the other, for a few of the rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from halve.maths.gram import Statistics
from halve.maths.linalg import full_precision
from halve.maths.pattern import Pattern
from halve.maths.quadratic import Scaled, row_losses
from halve.solve.refit import refit_cg

CANDIDATES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Shrinkages that compete; 0 trusts H as it is and 1 trusts only its diagonal."""
_FIRST = CANDIDATES.index(0.1)
"""Where the search begins: it goes to smaller or larger candidates while that helps."""
_ROWS = 64
"""Rows that judge, spread evenly over the matrix."""
_TOLERANCE = 1e-2
"""Of the refits that are only compared: their loss within a per cent."""


def shrink(gram: Tensor, amount: float) -> Tensor:
    """Return ``(1 - s) H + s diag(H)`` for ``gram`` (d, d) and s = ``amount`` in [0, 1]; ``gram`` itself for s = 0."""
    if amount == 0.0:
        return gram
    shrunk = gram * (1.0 - amount)
    shrunk.diagonal().copy_(gram.diagonal())
    return shrunk


def choose_shrinkage(weight: Tensor, stats: Statistics, pattern: Pattern) -> float:
    """Return the shrinkage under which weights fitted on half of the tokens serve the other half best.

    Both halves take both parts. All tokens together deserve more trust than half of them: what is returned is half of
    the winner, for the noise in H falls in proportion to the tokens, but 1 if the winner is 1.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs.
        pattern: of the mask that is refitted.

    Returns:
        float: between 0 and 1; 0 where the statistics are not kept by halves, but 1 for a single token, which has none.
    """
    if stats.tokens == 1:
        return 1.0
    if stats.halves is None or not all(bool((half.diagonal() > 0.0).any()) for half in stats.halves):
        return 0.0
    step = -(-weight.shape[0] // _ROWS)
    rows = weight[::step].float()
    halves = stats.halves
    with full_precision():
        mask = pattern.keep_mask(Scaled.of(rows, stats.gram).weight.abs())
        best = _lowest(lambda index: _held_out_loss(rows, mask, halves, CANDIDATES[index]), _FIRST, len(CANDIDATES))
    amount = CANDIDATES[best]
    return amount if amount == 1.0 else amount / 2.0


def _lowest(cost: Callable[[int], float], start: int, count: int) -> int:
    """Return the index below ``count`` from which neither neighbour is lower, going downhill from ``start``."""
    best, lowest = start, cost(start)
    for step in (-1, 1):
        while 0 <= best + step < count and (lost := cost(best + step)) < lowest:
            best, lowest = best + step, lost
        if best != start:
            break
    return best


def _held_out_loss(rows: Tensor, mask: Tensor, halves: tuple[Tensor, Tensor], amount: float) -> float:
    """Return the loss, summed over both directions, each relative to the dense output on the tokens that judge."""
    lost = 0.0
    for fitted_on, judged_on in (halves, halves[::-1]):
        fitted = rows * mask
        if amount < 1.0:
            fitted, _ = refit_cg(fitted, rows, shrink(fitted_on, amount), mask, tolerance=_TOLERANCE)
        total = row_losses(torch.zeros_like(rows), rows, judged_on).sum().clamp_min(torch.finfo(torch.float64).tiny)
        lost += float(row_losses(fitted, rows, judged_on).sum() / total)
    return lost
