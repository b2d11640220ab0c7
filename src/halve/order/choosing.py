"""The order of channels in which pruning is estimated to cost least.

The estimate is that of a diagonal objective: every weight has a saliency, what its removal costs, and a group of N:M
loses its M - N smallest in every row. Which M channels make a group decides how much that is, so channels are exchanged
between groups. Of every group one channel is taken out. What it would cost in each of the groups is, but for terms that
all have in common, ``Σ_rows min(s, t)``: s the channel's saliencies, t the (M - N)-th smallest of those that have
stayed there. That is an assignment, as the second step of RIA (Zhang et al. 2024, arXiv 2402.13485), which makes it
once with one score a channel; here it is made on all rows, again and again.

All those sums at once are one product of matrices, with ``min(s, t) = ∫ [s > u] [t > u] du`` taken over a few levels
of each row, between which both are cut off and scaled: exact but where both lie between the same two levels. Where
there are few groups, as in a head, they are summed one by one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from halve.maths.pattern import Pattern

ROUNDS = 16
"""Times that one channel of every group is taken out."""
_LEVELS = 4
"""Levels of a row between which the smaller of two saliencies is found."""
_FEW = 64
"""Places up to which the smaller of two saliencies is found exactly, one by one."""
_AT_ONCE = 1 << 24
"""Numbers that are there at once, at most: 64 MiB."""
_LEAST_GAIN = 1e-6
"""Least gain of an exchange, as a share of the mean cost: smaller ones are rounding."""


def estimated_loss(saliency: Tensor, pattern: Pattern, order: Tensor | None = None) -> float:
    """Return what pruning costs by the saliencies: the M - N smallest of every group, summed.

    Args:
        saliency: (units, width, rows), never negative; channels of one unit never leave it.
        pattern: N:M, of which M divides ``width``.
        order: (units, width) int64, which channel comes to each place; None leaves them where they are.
    """
    units, width, _ = saliency.shape
    keep, group = pattern.budget(width)
    if order is None:
        order = torch.arange(width, device=saliency.device).expand(units, -1)
    members = order.reshape(units, -1, group)
    lost = _smallest(_rows_of(saliency, members), group - keep)
    return sum(float(each.sum(dtype=torch.float64)) for each in lost)


def choose_order(saliency: Tensor, pattern: Pattern, generator: torch.Generator, rounds: int = ROUNDS) -> Tensor:
    """Return an order of channels whose estimated loss is low, the given one if none was found that is lower.

    Args:
        saliency: (units, width, rows) float32, finite, never negative.
        pattern: N:M, of which M divides ``width``.
        generator: on the CPU; draws which channels are taken out.
        rounds: how often.

    Returns:
        Tensor: (units, width) int64 on the CPU, which channel comes to each place.
    """
    units, width, _ = saliency.shape
    keep, group = pattern.budget(width)
    given = torch.arange(width, device=saliency.device).repeat(units, 1)
    members = spread(saliency.sum(2), group)
    if estimated_loss(saliency, pattern, members.flatten(1)) > estimated_loss(saliency, pattern):
        members = given.view(units, -1, group).clone()
    at = torch.arange(units, device=saliency.device)[:, None]
    for _ in range(rounds):
        slots = torch.randint(group, members.shape[:2], generator=generator).to(saliency.device).unsqueeze(-1)
        taken = members.gather(2, slots).squeeze(-1)
        stayed = members[torch.ones_like(members, dtype=torch.bool).scatter_(2, slots, value=False)]
        thresholds = _smallest(_rows_of(saliency, stayed.view(units, -1, group - 1)), group - keep)[-1]
        places = assign(_sums_of_smaller(thresholds, saliency[at, taken]))
        members.scatter_(2, slots, taken.gather(1, places).unsqueeze(-1))
    order = members.sort(dim=-1).values.flatten(1)
    better = estimated_loss(saliency, pattern, order) < estimated_loss(saliency, pattern)
    return (order if better else given).cpu()


def _rows_of(saliency: Tensor, members: Tensor) -> Iterable[Tensor]:
    """Yield the saliencies (units, groups, rows) of the first channel of every group, of the second, and so on."""
    at = torch.arange(len(saliency), device=saliency.device)[:, None]
    return (saliency[at, channels] for channels in members.unbind(-1))


def _smallest(values: Iterable[Tensor], count: int) -> list[Tensor]:
    """Return the ``count`` smallest of several tensors, entry by entry, from the smallest on."""
    found: list[Tensor] = []
    for value in values:
        rest = value
        for place, other in enumerate(found):
            found[place], rest = torch.minimum(other, rest), torch.maximum(other, rest)
        if len(found) < count:
            found.append(rest)
    return found


def _sums_of_smaller(thresholds: Tensor, channels: Tensor) -> Tensor:
    """Return ``Σ_rows min(t, s)`` of every threshold with every channel.

    Args:
        thresholds: (units, places, rows).
        channels: (units, items, rows).

    Returns:
        Tensor: (units, places, items).
    """
    units, places, rows = thresholds.shape
    total = thresholds.new_zeros(units, places, channels.shape[1])
    step = max(1, _AT_ONCE // (units * places * (places if places <= _FEW else _LEVELS)))
    cuts = torch.linspace(0, places - 1, _LEVELS + 1, device=thresholds.device).round().long()[1:]
    for first in range(0, rows, step):
        t, s = thresholds[..., first : first + step], channels[..., first : first + step]
        if places <= _FEW:
            total += torch.minimum(t.unsqueeze(2), s.unsqueeze(1)).sum(-1)
            continue
        levels = t.sort(dim=1).values[:, cuts]  # (units, levels, rows), the last one no threshold exceeds
        below = torch.nn.functional.pad(levels, (0, 0, 1, 0))[:, :-1]
        heights = (levels - below).unsqueeze(1)
        between_t = ((t.unsqueeze(2) - below.unsqueeze(1)) / heights.clamp_min(1e-30)).clamp_(0.0, 1.0)
        between_s = torch.minimum((s.unsqueeze(2) - below.unsqueeze(1)).clamp_min_(0.0), heights)
        total.baddbmm_(between_t.flatten(2), between_s.flatten(2).mT)
    return total


def spread(importance: Tensor, group: int) -> Tensor:
    """Deal channels out by their importance, so that the most important ones come to different groups.

    RIA's first step.

    Args:
        importance: (units, width), of each channel.
        group: M.

    Returns:
        Tensor: (units, width / M, M) int64, the channels of each group.
    """
    ranked = importance.argsort(dim=-1, descending=True, stable=True)
    return ranked.view(len(importance), group, -1).mT.contiguous()


def assign(costs: Tensor) -> Tensor:
    """Assign one item to every place so that exchanging no two would lower the cost.

    Args:
        costs: (units, places, items), square, of each item in each place; item i is in place i at first.

    Returns:
        Tensor: (units, places) int64, the item of every place.
    """
    units, count, _ = costs.shape
    places = torch.arange(count, device=costs.device).expand(units, -1).contiguous()
    own = places.clone()
    least = _LEAST_GAIN * costs.mean(dim=(1, 2)).unsqueeze(-1)
    placed = costs  # with its columns as the items are now
    for _ in range(4 * count):
        now = placed.diagonal(dim1=1, dim2=2)
        saved = now.unsqueeze(1) + now.unsqueeze(2) - placed - placed.mT
        gain, partner = saved.max(dim=-1)
        mutual = (partner.gather(1, partner) == own) & (gain > least)
        if not bool(mutual.any()):
            break
        places = torch.where(mutual, places.gather(1, partner), places)
        placed = costs.gather(2, places.unsqueeze(1).expand(-1, count, -1))
    return places
