"""SparseSwaps: exchange a kept and a pruned weight, one pair at a time (Zimmer et al. 2025, arXiv 2512.10922).

The weights keep their given values; what a swap changes in a row's loss follows from H and the row's residual alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.errors import InputError, PatternError
from halve.gram import Statistics
from halve.outcome import Outcome, Status
from halve.pattern import Pattern, apply_mask
from halve.quadratic import Scaled

_PROGRESS = 1e-6
"""Smallest decrease of a row's loss, as a share of it, for which a swap is made: below lies rounding."""


@dataclass(frozen=True)
class SparseSwapsOptions:
    """Options of SparseSwaps.

    Attributes:
        max_swaps: limit on the swaps of a row, >= 1.
    """

    max_swaps: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.max_swaps, bool) or not isinstance(self.max_swaps, int) or self.max_swaps < 1:
            raise InputError(f"max_swaps of sparse-swaps must be a whole number of at least 1, got {self.max_swaps!r}")


def solve(weight: Tensor, stats: Statistics, pattern: Pattern, options: SparseSwapsOptions) -> Outcome:
    """Start from Wanda's mask and make the best swap within a group of each row, again and again.

    Args:
        weight: (d_out, d_in), any float dtype.
        stats: of the layer's inputs.
        pattern: N:M.
        options: the limit on swaps.

    Returns:
        Outcome: the kept weights bit for bit, the rest +0.0. Facts: ``iterations`` (most swaps of a row), ``swaps``
            (of all rows together).

    Raises:
        PatternError: the pattern is unstructured.
        CalibrationError: the Gram matrix is zero.
    """
    if not pattern.structured:
        raise PatternError(f"sparse-swaps prunes to N:M, not to {pattern}: choose 2:4, or wanda for {pattern}")
    problem = Scaled.of(weight, stats.gram)
    mask = pattern.keep_mask(problem.weight.abs())
    slope = torch.where(mask, 0.0, -problem.weight) @ problem.gram
    rows = torch.arange(len(mask), device=mask.device)
    swaps = iterations = 0
    while len(rows) and iterations < options.max_swaps:
        change, enters, leaves = _best_swaps(problem.weight[rows], mask[rows], slope, problem.gram, pattern)
        loss = 0.5 * (torch.where(mask[rows], 0.0, -problem.weight[rows]) * slope).sum(-1)
        useful = change < -_PROGRESS * loss
        rows, enters, leaves, slope = rows[useful], enters[useful], leaves[useful], slope[useful]
        mask[rows, enters], mask[rows, leaves] = True, False
        slope += problem.weight[rows, enters, None] * problem.gram[enters]
        slope -= problem.weight[rows, leaves, None] * problem.gram[leaves]
        swaps += len(rows)
        iterations += bool(len(rows))
    facts = {"iterations": float(iterations), "swaps": float(swaps)}
    return Outcome(apply_mask(weight, mask), Status.OK, "sparse-swaps", facts=facts)


def _best_swaps(
    weight: Tensor, mask: Tensor, slope: Tensor, gram: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's best change of loss, and the entries that enter and leave the mask for it.

    With the error e = v - v0 of a row and its slope e H̃, letting i in (its error -v_i becomes 0) and j out changes
    ``½ e H̃ eᵀ`` by ``v_i s_i - v_j s_j + ½ (v_i² H_ii + v_j² H_jj) - v_i v_j H_ij``.

    Args:
        weight: (rows, d) float32, V0.
        mask: (rows, d) bool.
        slope: (rows, d) float32.
        gram: (d, d) float32, H̃.
        pattern: N:M.
    """
    rows, d = weight.shape
    _, size = pattern.budget(d)
    blocks = gram.reshape(d // size, size, d // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    groups, kept = pattern.groups(weight), pattern.groups(mask)
    own = 0.5 * groups * groups * pattern.groups(gram.diagonal())
    gain, cost = own + groups * pattern.groups(slope), own - groups * pattern.groups(slope)
    gain, cost = torch.where(kept, torch.inf, gain), torch.where(kept, cost, torch.inf)
    pairs = gain.unsqueeze(-1) + cost.unsqueeze(-2) - groups.unsqueeze(-1) * groups.unsqueeze(-2) * blocks
    change, place = pairs.reshape(rows, -1).min(-1)
    group, pair = place // (size * size), place % (size * size)
    return change, group * size + pair // size, group * size + pair % size
