"""Exact swaps: exchange a kept and a pruned weight of a group as long as that lowers the row's loss.

Both the removal and the insertion are costed as the row would be after optimal re-adjustment of all its kept weights.
With S the kept entries of a row and C the others, everything follows from ``P = (H_SS)⁻¹`` and ``B = H_CS P``. At the
optimum on S, with gradient g, taking j out and putting i in changes the row's loss by

    w_j² / (2 P_jj)  -  (g_i - B_ij w_j / P_jj)² / (2 (s_i + B_ij² / P_jj)),      s_i = H_ii - B_i · H_Si

(removal as in Optimal Brain Surgeon, Hassibi and Stork 1992; insertion by the Schur complement; together exact). After
a swap P, B, s, g and w are brought up to date by updates of rank two, O(d²) a swap instead of the O(d³) of a new
inverse. Setting up costs about d³/4 multiplications a row and d²/2 numbers of memory, so d_in = 4096 is for a GPU or
for patience.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.checks import check_count, check_not_negative
from halve.errors import FactorisationError, PatternError
from halve.maths.active_rows import ActiveRows
from halve.maths.pattern import Pattern
from halve.maths.quadratic import Scaled, row_losses

_RIDGES = ((1e-5, torch.float32), (1e-5, torch.float64), (1e-3, torch.float64))
"""What is added to the unit diagonal, in which precision, until every row's matrix has a factor."""
_BYTES_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 30}
"""Memory for the inverses of the rows treated side by side: on a CPU, little enough for a last-level cache."""
_REPACK_SHARE = 0.25
"""Share of ended rows at which the others are packed together (`ActiveRows`)."""


@dataclass(frozen=True)
class SwapOptions:
    """Options of the exact swaps.

    Attributes:
        max_swaps: limit on the swaps of a row, >= 1.
        tolerance: smallest decrease, as a share of the row's loss, for which a swap is made, >= 0.
    """

    max_swaps: int = 200
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        check_count("refit_max_swaps", self.max_swaps)
        check_not_negative("refit_tolerance", self.tolerance)


def refine(
    weight: Tensor,
    original: Tensor,
    gram: Tensor,
    pattern: Pattern,
    max_swaps: int,
    tolerance: float,
    *,
    deadline: float = math.inf,
) -> tuple[Tensor, dict[str, float]]:
    """Refit the kept weights exactly, then swap until no exchange within a group lowers the loss.

    Args:
        weight: (d_out, d_in), any float dtype, in the pattern.
        original: (d_out, d_in), W0.
        gram: (d_in, d_in) float32, H.
        pattern: N:M.
        max_swaps: see `SwapOptions`.
        tolerance: see `SwapOptions`.
        deadline: reading of ``time.perf_counter`` after which no more rows are begun; those that lose most come first.

    Returns:
        tuple[Tensor, dict[str, float]]: weights in the dtype of ``weight``, no row worse than given, and facts:
            ``swaps`` (of all rows together), ``swap_rounds`` (most of one row), ``refit_kept_rows`` (rows that could
            not be improved, or came too late, and stayed as given), ``refit_unconverged_rows`` (stopped by the limit).

    Raises:
        PatternError: the pattern is unstructured.
        CalibrationError: the Gram matrix is zero.
        FactorisationError: the Gram matrix on a row's support is not positive definite even with a small ridge.
    """
    if not pattern.structured:
        raise PatternError(f"exact swaps exchange weights within the groups of N:M, and {pattern} has none: use cg")
    problem = Scaled.of(original, gram)
    given = problem.apply(weight)
    mask = pattern.keep_mask(given.abs())
    solution = given.clone()
    keep, size = pattern.budget(gram.shape[0])
    kept = gram.shape[0] // size * keep
    budget = _BYTES_AT_ONCE.get(gram.device.type, _BYTES_AT_ONCE["cpu"])
    chunk = max(1, budget // (4 * gram.shape[0] * kept))
    swaps = rounds = unconverged = 0
    before = row_losses(weight, original, gram)
    begun = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    order = (
        torch.arange(len(mask), device=mask.device)
        if deadline == math.inf
        else before.argsort(descending=True, stable=True)
    )
    for rows in torch.split(order, chunk):
        if time.perf_counter() > deadline:
            break
        begun[rows] = True
        search = _Search(problem.weight[rows], mask[rows], problem.gram, pattern)
        solution[rows], made, open_rows = search.run(max_swaps, tolerance)
        swaps, rounds = swaps + int(made.sum()), max(rounds, int(made.amax()))
        unconverged += open_rows
    fitted = problem.restore(solution).to(weight.dtype)
    worse = ~(begun & (row_losses(fitted, original, gram) <= before))
    facts = {
        "swaps": float(swaps),
        "swap_rounds": float(rounds),
        "refit_kept_rows": float(worse.sum()),
        "refit_unconverged_rows": float(unconverged),
    }
    return torch.where(worse.unsqueeze(-1), weight, fitted), facts


def _inverses(gram: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``gram`` with a ridge, and for every row the inverse on its kept entries, (n, k, k)."""
    for ridge, dtype in _RIDGES:
        ridged = gram.clone()
        ridged.diagonal().add_(ridge)
        lower, info = torch.linalg.cholesky_ex(ridged[kept.unsqueeze(-1), kept.unsqueeze(-2)].to(dtype))
        if not bool((info != 0).any()):
            return ridged, torch.cholesky_inverse(lower).to(gram.dtype)
    raise FactorisationError(
        f"the Gram matrix on a row's {kept.shape[1]} kept features is not positive definite even with "
        f"{_RIDGES[-1][0]:g} of its mean diagonal added: use refit cg, or more calibration tokens"
    )


class _Search:
    """The state of n rows with k kept and c pruned entries each; entries of one group lie side by side.

    A swap leaves its two entries in each other's places, so that groups stay where they are.
    """

    def __init__(self, target: Tensor, mask: Tensor, gram: Tensor, pattern: Pattern) -> None:
        n, d = target.shape
        keep, size = pattern.budget(d)
        self._shape, self._group = (n, d), (d // size, size - keep, keep)
        order = torch.sort(pattern.groups(mask).to(torch.uint8), dim=-1, descending=True, stable=True).indices
        order = order + torch.arange(0, d, size, device=gram.device).unsqueeze(-1)
        self._kept, self._pruned = order[..., :keep].reshape(n, -1), order[..., keep:].reshape(n, -1)
        self._gram, self._inverse = _inverses(gram, self._kept)  # with a ridge; P, (n, k, k)
        gram = self._gram
        cross = gram[self._pruned.unsqueeze(-1), self._kept.unsqueeze(-2)]
        self._cross = cross @ self._inverse  # B, (n, c, k)
        self._schur = gram.diagonal()[self._pruned] - (self._cross * cross).sum(-1)  # s, (n, c)
        dropped = target.gather(1, self._pruned).unsqueeze(1)
        self._weight = target.gather(1, self._kept) + (dropped @ self._cross).squeeze(1)  # w, (n, k)
        difference = self._scattered() - target
        slope = difference @ gram
        self._slope = slope.gather(1, self._pruned)  # g, (n, c)
        self._loss = 0.5 * (difference * slope).sum(-1)

    def run(self, max_swaps: int, tolerance: float) -> tuple[Tensor, Tensor, int]:
        """Swap until nothing helps; return each row's weights (n, d) and swaps (n,), and how many hit the limit."""
        n = self._shape[0]
        active = ActiveRows(self._gram.new_empty(self._shape), _REPACK_SHARE)
        swaps = torch.full((n,), max_swaps, device=self._gram.device)
        for made in range(max_swaps + 1):
            change, out, into = self._best()
            ended = active.finish(~(change < -tolerance * self._loss), self._scattered())
            swaps[ended] = made
            if not active.unfinished or made == max_swaps:
                break
            change, out, into = self._pack(active, change, out, into)
            self._exchange(out, into)
            self._loss += change
        return active.result(self._scattered()), swaps, active.unfinished

    def _best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return each row's best change of loss, and the places of what goes out and what comes in."""
        groups, drop, keep = self._group
        n = len(self._kept)
        pivot = self._inverse.diagonal(dim1=1, dim2=2).reshape(n, groups, 1, keep)
        weight = self._weight.view(n, groups, 1, keep)
        own = self._cross.view(n, groups, drop, groups, keep).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        slope, schur = self._slope.view(n, groups, drop, 1), self._schur.view(n, groups, drop, 1)
        ratio = weight / pivot
        gain = (slope - own * ratio).square() / (schur + own * own / pivot)
        change, place = (0.5 * (weight * ratio - gain)).reshape(n, -1).min(-1)
        group, pair = place // (drop * keep), place % (drop * keep)
        return change, group * keep + pair % keep, group * drop + pair // keep

    def _exchange(self, out: Tensor, into: Tensor) -> None:
        """Take the kept entry at place ``out`` (n,) out and put the pruned one at ``into`` (n,) in."""
        each = torch.arange(len(out), device=out.device)
        leaving, entering = self._kept[each, out], self._pruned[each, into]
        column = self._inverse[each, :, out]  # P_:j
        pivot = column[each, out].unsqueeze(-1)  # P_jj
        touched = self._cross[each, :, out]  # B_:j
        ratio = self._weight[each, out].unsqueeze(-1) / pivot
        scaled = column / pivot
        slope = self._slope - ratio * touched
        schur = self._schur + touched * touched / pivot
        enter_schur = schur[each, into].unsqueeze(-1)
        # The kept weights follow the entering one along `follow`; it is 1 at the entering weight's own place.
        follow = touched[each, into].unsqueeze(-1) * scaled - self._cross[each, into]
        follow[each, out] = 1.0
        links = self._gram[entering]
        to_kept = links.gather(1, self._kept)
        to_kept[each, out] = 0.0
        spread = (scaled * to_kept).sum(-1, keepdim=True)
        coupling = links.gather(1, self._pruned) - (self._cross @ to_kept.unsqueeze(-1)).squeeze(-1) + touched * spread
        own_coupling = self._gram[leaving, entering].unsqueeze(-1) + spread
        amount = -slope[each, into].unsqueeze(-1) / enter_schur

        self._weight = self._weight - ratio * column + amount * follow
        self._weight[each, out] = amount.squeeze(-1)
        self._slope = slope + amount * coupling
        self._slope[each, into] = (amount * own_coupling - ratio).squeeze(-1)
        self._schur = schur - coupling * coupling / enter_schur
        self._schur[each, into] = (1.0 / pivot - own_coupling * own_coupling / enter_schur).squeeze(-1)
        right = torch.stack([-scaled, follow / enter_schur], 1)
        self._inverse.baddbmm_(torch.stack([column, follow], -1), right)
        self._cross.baddbmm_(torch.stack([touched, coupling], -1), right)
        scaled[each, out] = 0.0
        self._cross[each, into] = own_coupling * follow / enter_schur - scaled
        self._kept[each, out], self._pruned[each, into] = entering, leaving

    def _scattered(self) -> Tensor:
        wide = self._weight.new_zeros(len(self._kept), self._shape[1])
        return wide.scatter_(1, self._kept, self._weight)

    def _pack(self, active: ActiveRows, *best: Tensor) -> tuple[Tensor, ...]:
        """Leave ended rows out of the state and of what is best for each, once that pays; return the latter."""
        names = ("_kept", "_pruned", "_inverse", "_cross", "_schur", "_weight", "_slope", "_loss")
        state = active.pack(*(getattr(self, name) for name in names), *best)
        for name, part in zip(names, state, strict=False):
            setattr(self, name, part)
        return state[len(names) :]
