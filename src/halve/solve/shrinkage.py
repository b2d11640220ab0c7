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
from halve.maths.pattern import Pattern, apply_mask
from halve.maths.quadratic import Scaled, row_losses
from halve.solve.refit import CGOptions, conjugate_gradients

CANDIDATES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Shrinkages that compete; 0 trusts H as it is and 1 trusts only its diagonal."""
_FIRST = CANDIDATES.index(0.1)
"""Where the search begins: it goes to smaller or larger candidates while that helps."""
_ROWS = 32
"""Rows that judge, spread evenly over the matrix."""
_TOLERANCE = 1e-2
"""Of the refits that are only compared: their loss within a per cent."""
_TINY = torch.finfo(torch.float64).tiny


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
    with full_precision():
        mask = pattern.keep_mask(Scaled.of(rows, stats.gram).weight.abs())
        folds = [_Fold(rows, mask, *each) for each in (stats.halves, stats.halves[::-1])]
        best = _lowest(lambda index: sum(fold.loss(CANDIDATES[index]) for fold in folds), _FIRST, len(CANDIDATES))
    amount = CANDIDATES[best]
    return amount if amount == 1.0 else amount / 2.0


class _Fold:
    """Weights that are fitted on one half of the tokens and judged on the other.

    Args:
        rows: (rows, d_in) float32, the dense weights.
        mask: (rows, d_in) bool, of what is kept.
        fitted_on: (d_in, d_in) float32, H of one half.
        judged_on: (d_in, d_in) float32, H of the other.
    """

    def __init__(self, rows: Tensor, mask: Tensor, fitted_on: Tensor, judged_on: Tensor) -> None:
        self._rows = rows
        self._mask = mask
        self._judged_on = judged_on
        self._problem = Scaled.of(rows, fitted_on)
        self._total = row_losses(torch.zeros_like(rows), rows, judged_on).sum().clamp_min(_TINY)

    def loss(self, amount: float) -> float:
        """Return what is lost with a shrinkage, as a share of the dense output on the tokens that judge."""
        fitted = apply_mask(self._rows, self._mask)
        if amount < 1.0:
            problem = self._problem
            shrunk = shrink(problem.gram, amount)  # scaled to unit diagonal first: shrinking leaves the diagonal alone
            start = apply_mask(problem.weight, self._mask)
            limit = CGOptions().max_iterations
            solution, *_ = conjugate_gradients(start, problem.weight, shrunk, self._mask, _TOLERANCE, limit)
            fitted = problem.restore(solution)
        return float(row_losses(fitted, self._rows, self._judged_on).sum() / self._total)


def _lowest(cost: Callable[[int], float], start: int, count: int) -> int:
    """Return the index below ``count`` from which neither neighbour is lower, going downhill from ``start``."""
    best, lowest = start, cost(start)
    for step in (-1, 1):
        while 0 <= best + step < count and (lost := cost(best + step)) < lowest:
            best, lowest = best + step, lost
        if best != start:
            break
    return best
