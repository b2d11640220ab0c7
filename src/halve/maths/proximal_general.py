"""Proximal operators of ``e_{N+1}`` for N:M other than 2:4: 1:M in closed form, the rest face by face.

Everything here takes decreasing magnitudes (groups, M) in float64 and returns magnitudes in the same order.
"""

import torch
from torch import Tensor

_SHRINKS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 1.0)
"""Starts along the curve that `_starts` describes, as shares of its length."""
_STEPS = 40
_DAMPINGS = (1.0, 0.5, 0.2, 0.05, 0.01)


def prox_of_pairs(z: Tensor, lam: float) -> Tensor:
    """Solve 1:M, whose regulariser is the sum of all products of two entries.

    For lam < 1 the problem is convex on the orthant: the support is the longest run of largest entries with
    ``w_i = (z_i - lam S) / (1 - lam) > 0``, ``S = sum z / (1 + (k - 1) lam)``. From lam = 1 on, two non-zeros are never
    better than one.

    Args:
        z: (groups, M), decreasing, >= 0.
        lam: > 0, without a unit.

    Returns:
        Tensor: (groups, M).
    """
    alone = torch.zeros_like(z)
    alone[:, 0] = z[:, 0]
    if lam >= 1.0:
        return alone
    size = torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device)
    sums = z.cumsum(-1) / (1.0 + (size - 1.0) * lam)
    count = (z > lam * sums).sum(-1, keepdim=True).clamp(min=1)
    total = sums.gather(-1, count - 1)
    w = ((z - lam * total) / (1.0 - lam)).masked_fill(size > count, 0.0)
    others = total - w
    others[:, 0] = w[:, 1:].sum(-1)  # the largest entry would cancel
    dense = (z - lam * others).clamp(min=0.0).masked_fill(size > count, 0.0)
    return torch.where(count > 1, dense, alone)


def prox_on_faces(z: Tensor, lam: float, keep: int) -> Tensor:
    """Solve any N:M: the best local minimum among the faces of the N, N + 1, ... M largest entries.

    Each face is searched by a descent from z, where the paper's conjecture for 2:4 looks for the minimum, and by one
    from the best point of a curve of likely minima. For these patterns neither uniqueness nor the conjecture is
    proved; the tests compare with brute force. Work is bounded, and a descent that has not settled is not used.

    Args:
        z: (groups, M), decreasing, >= 0.
        lam: > 0.
        keep: N.

    Returns:
        Tensor: (groups, M).
    """
    scale = torch.where(z[:, :1] > 0, z[:, :1], 1.0)
    y = z / scale
    mu = (lam * scale ** (keep - 1)).clamp(max=1e300)
    change = y.clone()  # mu times the slopes, or what takes an entry to zero
    change[:, :keep] = 0.0
    lowest = 0.5 * (change * change).sum(-1)
    for size in range(keep + 1, y.shape[1] + 1):
        live = torch.nonzero(y[:, size - 1] > 0).squeeze(1)
        for start in _starts(y[live, :size], mu[live], keep):
            u, found = _descend(y[live, :size], mu[live], start, keep)
            rows = live[found]
            slopes = mu[rows] * leave_one_out(u[found], keep)
            trial = y[rows]
            trial[:, :size] = slopes
            # Euler: sum_i u_i d_i = (N + 1) mu e_{N+1}
            objective = 0.5 * (trial * trial).sum(-1) + (u[found] * slopes).sum(-1) / (keep + 1)
            better = objective < lowest[rows]
            lowest[rows[better]], change[rows[better]] = objective[better], trial[better]
    return torch.where(change < y, (z - scale * change).clamp(min=0.0), 0.0)


def leave_one_out(u: Tensor, degree: int) -> Tensor:
    """Return ``e_degree`` of every group without its i-th entry, which is ``de_{degree+1}/du_i``.

    Sums of products of non-negative numbers only, from the products of all earlier and all later factors
    ``1 + u_j x``: dividing one factor out of the whole product would cancel.

    Args:
        u: (..., k), >= 0.
        degree: >= 0.

    Returns:
        Tensor: (..., k).
    """
    later = _later_products(u, degree)
    before = later[-1]
    slopes = []
    for i in range(u.shape[-1]):
        slopes.append((before * later[i].flip(-1)).sum(-1))
        before = _times(before, u[..., i])
    return torch.stack(slopes, dim=-1)


def _later_products(u: Tensor, degree: int) -> list[Tensor]:
    """Coefficients (..., degree + 1) of the product of ``1 + u_j x`` over j > i, for every i; the last one is 1."""
    product = u.new_zeros(*u.shape[:-1], degree + 1)
    product[..., 0] = 1.0
    products = [product]
    for i in range(u.shape[-1] - 1, 0, -1):
        products.append(_times(products[-1], u[..., i]))
    return products[::-1]


def _times(product: Tensor, entry: Tensor) -> Tensor:
    result = product.clone()
    result[..., 1:] += product[..., :-1] * entry[..., None]
    return result


def _elementary(u: Tensor, degree: int) -> Tensor:
    """Return ``e_degree`` of (..., k) along the last dimension."""
    product = u.new_zeros(*u.shape[:-1], degree + 1)
    product[..., 0] = 1.0
    for entry in u.unbind(-1):
        product = _times(product, entry)
    return product[..., -1]


def _objective(u: Tensor, y: Tensor, mu: Tensor, keep: int) -> Tensor:
    return 0.5 * (u - y).square().sum(-1) + mu[..., 0] * _elementary(u, keep + 1)


def _starts(y: Tensor, mu: Tensor, keep: int) -> list[Tensor]:
    """Return y, and the best point of the curve ``u_i^2 - y_i u_i + c = 0``, 0 <= c <= (smallest y)^2 / 4.

    The curve holds every stationary point of the face of N + 1 entries, with the larger root everywhere except perhaps
    for the smallest entry; on larger faces it is a guess.
    """
    last = y[:, -1:]
    points = []
    for shrink in _SHRINKS:
        constant = 0.25 * shrink * last * last
        point = 0.5 * (y + (y * y - 4 * constant).clamp(min=0.0).sqrt())
        points.append(point)
        if shrink > 0.0:
            point = point.clone()
            point[:, -1:] = constant / point[:, -1:]
            points.append(point)
    curve = torch.stack(points)
    best = _objective(curve, y, mu, keep).argmin(0)
    return [y, curve[best, torch.arange(len(y), device=y.device)]]


def _descend(y: Tensor, mu: Tensor, start: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the local minimum on the open face that a damped Newton descent reaches, and whether there is one.

    Directions of negative curvature are followed downhill by the absolute values of the eigenvalues. A descent that
    runs into a zero entry is given up: that point belongs to a smaller face.
    """
    u, found = start.clone(), torch.zeros(len(y), dtype=torch.bool, device=y.device)
    left = torch.arange(len(y), device=y.device)
    size = y.shape[1]
    identity = torch.eye(size, dtype=y.dtype, device=y.device)
    for _ in range(_STEPS):
        if not len(left):
            break
        point, target, weight = u[left], y[left], mu[left]
        second = leave_one_out(point[:, None, :] * (1.0 - identity), keep - 1) * (1.0 - identity)
        curvature, axes = torch.linalg.eigh(identity + weight[..., None] * second)
        slope = point - target + weight * leave_one_out(point, keep)
        along = (axes.mT @ slope[..., None])[..., 0] / curvature.abs().clamp(min=1e-6)
        step = -(axes @ along[..., None])[..., 0]
        room = torch.where(step < 0, point / -step, torch.inf).amin(-1, keepdim=True)
        reach = (0.9 * room).clamp(max=1.0)
        trials = torch.stack([point + damping * reach * step for damping in _DAMPINGS])
        best = _objective(trials, target, weight, keep).argmin(0)
        moved = trials[best, torch.arange(len(left), device=y.device)]
        minimum = (curvature[:, 0] > 0) & (room[:, 0] > 2)
        # close to a minimum the objective no longer resolves the step
        close = minimum & (step.abs() <= 1e-4 * target[:, -1:]).all(-1)
        moved = torch.where(close[:, None], point + step, moved)
        u[left] = moved
        done = minimum & (step.abs() <= 1e-8 * target[:, -1:]).all(-1)
        found[left[done]] = True
        left = left[~done & (moved > 1e-8 * target).all(-1)]
    return u, found
