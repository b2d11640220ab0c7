"""Independent answers in float64 by brute force; slow, and sharing no formula with the package."""

from itertools import combinations, product

import torch
from torch import Tensor


def elementary(weight: Tensor, degree: int) -> Tensor:
    """Sum over all subsets of `degree` entries of the last dimension of the product of their magnitudes."""
    magnitudes = weight.double().abs()
    subsets = torch.tensor(list(combinations(range(weight.shape[-1]), degree)))
    return magnitudes[..., subsets].prod(-1).sum(-1)


def prox_objective(w: Tensor, z: Tensor, lam: float | Tensor, keep: int) -> Tensor:
    """``1/2 |w - z|^2 + lam e_{keep+1}(|w|)`` of every group (..., M) -> (...), in float64 at the given numbers."""
    difference = w.double() - z.double()
    return 0.5 * (difference * difference).sum(-1) + lam * elementary(w, keep + 1)


def brute_force_prox(z: Tensor, lam: Tensor, keep: int, *, levels: int, starts: int = 3) -> tuple[Tensor, Tensor]:
    """Minimise `prox_objective` over every support of every group, without assuming order, uniqueness or convexity.

    A grid of `levels` values a coordinate (0, ... z_i) is evaluated in full; the best grid point of every support (of
    every support size where M > 6), the best `starts` of all, and z itself are polished by exact coordinate
    minimisation and Newton steps.

    Args:
        z: (groups, M) float64.
        lam: (groups,) float64.
        keep: N.
        levels: grid values a coordinate, 0 included.
        starts: how many of the best grid points are polished besides.

    Returns:
        tuple[Tensor, Tensor]: the best points (groups, M), float64, and their objectives (groups,).
    """
    groups, size = z.shape
    magnitudes = z.abs()
    subsets = torch.tensor(list(combinations(range(size), keep + 1)))
    grid = torch.tensor(list(product(range(levels), repeat=size)), dtype=torch.float64) / (levels - 1)
    positive = grid > 0
    code = positive.sum(-1) if size > 6 else (positive.long() * 2 ** torch.arange(size)).sum(-1)
    members = [torch.nonzero(code == value).squeeze(1) for value in code.unique()]
    members = [rows for rows in members if int(positive[rows[0]].sum()) > keep]
    grid_features = torch.cat([0.5 * (1 - grid) ** 2, grid[:, subsets].prod(-1)], dim=1)
    features = torch.cat([magnitudes**2, lam[:, None] * magnitudes[:, subsets].prod(-1)], dim=1)
    best = torch.zeros_like(magnitudes)
    lowest = prox_objective(best, magnitudes, lam, keep)

    def offer(rows: slice, w: Tensor) -> None:
        value = prox_objective(w, magnitudes[rows], lam[rows], keep)
        better = value < lowest[rows]
        best[rows][better], lowest[rows][better] = w[better], value[better]

    for start in range(0, groups, 4096):
        rows = slice(start, start + 4096)
        for kept in combinations(range(size), keep):  # nothing to solve: the regulariser is zero
            offer(rows, magnitudes[rows] * torch.tensor([float(i in kept) for i in range(size)]))
        values = features[rows] @ grid_features.T
        points = [grid[some[values[:, some].argmin(1)]] for some in members]
        points += list(grid[values.topk(starts, largest=False).indices].unbind(1))
        points.append(torch.ones_like(points[0]))
        for point in points:
            offer(rows, _polish(point * magnitudes[rows], magnitudes[rows], lam[rows], subsets))
    return best * z.sign(), lowest


def _partial(w: Tensor, subsets: Tensor, i: int) -> Tensor:
    """d e / d w_i: the products of the subsets that hold i, without it."""
    holding = torch.stack([subset[subset != i] for subset in subsets if i in subset])
    return w[:, holding].prod(-1).sum(-1)


def _polish(w: Tensor, z: Tensor, lam: Tensor, subsets: Tensor, sweeps: int = 20) -> Tensor:
    """Coordinate descent on the support of the start, then Newton steps kept where they lower the objective."""
    keep = subsets.shape[1] - 1
    on = w > 0
    w = w.clone()
    for _ in range(sweeps):
        for i in range(w.shape[1]):
            w[:, i] = torch.where(on[:, i], (z[:, i] - lam * _partial(w, subsets, i)).clamp(min=0), 0.0)
    for _ in range(8):
        inside = (w > 0).double()
        slopes = torch.stack([_partial(w, subsets, i) for i in range(w.shape[1])], -1)
        residual = (w - z + lam[:, None] * slopes) * inside
        hessian = lam[:, None, None] * _second_partials(w, subsets) * inside[:, :, None] * inside[:, None, :]
        hessian = hessian + torch.eye(w.shape[1], dtype=w.dtype)
        solved, info = torch.linalg.solve_ex(hessian, residual[..., None])
        step = torch.where((info == 0)[:, None], solved[..., 0], 0.0)
        moved = ((w - step) * inside).clamp(min=0)
        finite = torch.isfinite(moved).all(-1)
        moved = torch.where(finite[:, None], moved, w)
        # near the minimum the objective cannot resolve the step: there a smaller residual decides
        gain = prox_objective(moved, z, lam, keep) <= prox_objective(w, z, lam, keep) * (1 + 1e-15)
        w = torch.where(gain[:, None], moved, w)
    return w


def _second_partials(w: Tensor, subsets: Tensor) -> Tensor:
    size = w.shape[1]
    result = w.new_zeros(len(w), size, size)
    for i, j in combinations(range(size), 2):
        holding = [subset[(subset != i) & (subset != j)] for subset in subsets if i in subset and j in subset]
        value = w[:, torch.stack(holding)].prod(-1).sum(-1)
        result[:, i, j] = result[:, j, i] = value
    return result
