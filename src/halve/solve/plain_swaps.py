"""Cheap exchanges of a kept and a pruned weight of a group, all other weights staying as they are.

Letting entry i in with value x and entry j out changes a row's loss ``½ e H̃ eᵀ``, e = v - v0, with slope g = e H̃, by

    ½ v_j² H_jj - v_j g_j + x (g_i - v_j H_ij) + ½ x² H_ii

which needs no inverse (`halve.solve.exact_swaps` costs exchanges as if the others followed, which does). As nothing
follows, this is an upper bound on what an exchange and a refit achieve: whatever it accepts is an improvement.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.maths.pattern import Pattern

_BYTES_AT_ONCE = 1 << 25
"""Size of one intermediate tensor over the rows treated side by side."""
_PROGRESS = 1e-6
"""Smallest decrease of a row's loss, as a share of it, for which an exchange is made: below lies rounding."""


@dataclass(frozen=True)
class Exchanges:
    """What was exchanged.

    Attributes:
        total: number of exchanges in all rows.
        rounds: the largest number in one row.
        unfinished: rows that the limit stopped.
    """

    total: int
    rounds: int
    unfinished: int


def exchange(
    weight: Tensor, target: Tensor, gram: Tensor, pattern: Pattern, *, limit: int, restore: bool
) -> tuple[Tensor, Tensor, Exchanges]:
    """Make each row's best exchange, again and again, until none lowers the row's loss.

    Args:
        weight: (rows, d) float32, v, in the pattern.
        target: (rows, d) float32, v0.
        gram: (d, d) float32, H̃, its diagonal positive but for dead features.
        pattern: N:M.
        limit: most exchanges of a row.
        restore: whether entering weights take their value in v0, or else the best one.

    Returns:
        tuple[Tensor, Tensor, Exchanges]: the weights, the mask (both (rows, d)), and what was done.
    """
    _, size = pattern.budget(gram.shape[0])
    chunk = max(1, _BYTES_AT_ONCE // (4 * gram.shape[0] * size))
    parts = [
        _exchange(weight[start : start + chunk], target[start : start + chunk], gram, pattern, limit, restore=restore)
        for start in range(0, len(weight), chunk)
    ]
    weights, masks, done = zip(*parts, strict=True)
    total = Exchanges(
        sum(part.total for part in done), max(part.rounds for part in done), sum(part.unfinished for part in done)
    )
    return torch.cat(weights), torch.cat(masks), total


def _exchange(
    weight: Tensor, target: Tensor, gram: Tensor, pattern: Pattern, limit: int, *, restore: bool
) -> tuple[Tensor, Tensor, Exchanges]:
    weight, mask = weight.clone(), pattern.keep_mask(weight.abs())
    difference = weight - target
    slope = difference @ gram
    loss = 0.5 * (difference * slope).sum(-1)
    rows = torch.arange(len(mask), device=mask.device)
    total = rounds = 0
    unfinished = 0
    while len(rows):
        change, enters, leaves, value = _best(
            weight[rows], target[rows] if restore else None, mask[rows], slope, gram, pattern
        )
        useful = change < -_PROGRESS * loss
        if rounds == limit:
            unfinished = int(useful.sum())
            break
        rows, enters, leaves, value = rows[useful], enters[useful], leaves[useful], value[useful]
        loss, slope = loss[useful] + change[useful], slope[useful]
        slope += value.unsqueeze(-1) * gram[enters] - weight[rows, leaves].unsqueeze(-1) * gram[leaves]
        weight[rows, enters], weight[rows, leaves] = value, 0.0
        mask[rows, enters], mask[rows, leaves] = True, False
        total += len(rows)
        rounds += bool(len(rows))
    return weight, mask, Exchanges(total, rounds, unfinished)


def _best(
    weight: Tensor, entering: Tensor | None, mask: Tensor, slope: Tensor, gram: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each row's best change of loss, what enters and leaves for it, and the value of what enters."""
    rows, d = weight.shape
    _, size = pattern.budget(d)
    blocks = gram.reshape(d // size, size, d // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    diagonal = gram.diagonal().reshape(d // size, size)
    groups, kept, slopes = pattern.groups(weight), pattern.groups(mask), pattern.groups(slope)
    cost = torch.where(kept, 0.5 * groups * groups * diagonal - groups * slopes, torch.inf)
    pull = slopes.unsqueeze(-1) - groups.unsqueeze(-2) * blocks  # (rows, groups, what enters, what leaves)
    if entering is None:
        value = -pull / diagonal.clamp_min(torch.finfo(gram.dtype).tiny).unsqueeze(-1)
        value = torch.where((diagonal > 0.0).unsqueeze(-1), value, 0.0)
    else:
        value = pattern.groups(entering).unsqueeze(-1).expand_as(pull)
    gain = value * pull + 0.5 * value * value * diagonal.unsqueeze(-1)
    change = torch.where(kept.unsqueeze(-1), torch.inf, gain) + cost.unsqueeze(-2)
    lowest, place = change.reshape(rows, -1).min(-1)
    group, pair = place // (size * size), place % (size * size)
    chosen = value.reshape(rows, -1).gather(-1, place.unsqueeze(-1)).squeeze(-1)
    return lowest, group * size + pair // size, group * size + pair % size, chosen
