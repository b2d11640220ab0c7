"""The N:M regulariser and its exact proximal operator.

``r(w) = e_{N+1}(|w|)``, the elementary symmetric polynomial of degree N + 1 of a group's magnitudes, is zero exactly
when the group has at most N non-zeros. Signs and the order of magnitudes survive the proximal operator, so everything
below works on magnitudes in decreasing order, divided by the largest one: with ``y = z / z_1`` and
``mu = lam * z_1**(N-1)`` the problem is ``min_u 1/2 |u - y|^2 + mu e_{N+1}(u)``, and the answer is ``w = z_1 u``. A
minimiser on the face of the k largest entries is stationary there: ``u_i = y_i - mu d_i`` with ``d_i = de_{N+1}/du_i``.
Results are formed as ``z_i - z_1 (mu d_i)``, a correction to the given number, and objectives from ``mu d`` instead of
``u - y``: both keep their relative accuracy when the penalty is tiny.

Source: Kübler et al., "A Proximal Operator for Inducing 2:4-Sparsity" (arXiv 2501.18015) for 2:4 and its faces; the
other N:M, and the tests that choose between the faces of 2:4 without their objectives, are Halve's.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from halve.errors import InputError, PatternError
from halve.maths import kernels
from halve.maths.pattern import Pattern
from halve.maths.proximal_general import prox_of_pairs, prox_on_faces

Backend = Literal["auto", "reference", "native"]

_STABLE_NETWORK = ((0, 1), (2, 3), (1, 2), (0, 1), (2, 3), (1, 2))
"""Sorts four entries by swapping neighbours only, so that equal entries keep their order."""
_SPARSE_FROM = 1.2072
"""For 2:4, no minimiser has a third non-zero once mu reaches (1 + sqrt 2) / 2 (see `_face_of_three`)."""
_THREE_IS_SAFE_BELOW = 0.92
"""Share of the slope at the fourth entry below which the point of face 3 stands (see `_denser_faces`)."""
_STARTS = ((0.45, 0.9), (0.3, 1.0), (0.6, 1.2))
"""Starts of `_face_of_four` in the order tried: the first serves all but some groups in a million."""
_FLOAT32_LAMS = (1e-30, 1e30)
"""Strengths that float32 holds to its full accuracy; beyond them the computation is in float64."""
_CHUNK = 1 << 18
"""Groups at a time: bounds the memory, and makes the many operations on a few slow groups a small share of the time."""


def regulariser(weight: Tensor, pattern: str | Pattern = "2:4") -> Tensor:
    """Return ``e_{N+1}(|w|)`` of every group: zero exactly where the group has at most N non-zeros.

    Args:
        weight: (..., d_in), floating point, groups along the last dimension.
        pattern: ``N:M``.

    Returns:
        Tensor: (..., d_in / M), float64 if ``weight`` is, else float32; its unit is that of ``weight`` to the power
        N + 1.

    Raises:
        PatternError: the pattern is unstructured or malformed, or does not fit the last dimension.
        InputError: ``weight`` is not floating point.
    """
    parsed, keep = _checked(weight, pattern, "weight")
    _, size = parsed.budget(weight.shape[-1])
    groups = weight.to(_compute_dtype(weight)).reshape(*weight.shape[:-1], weight.shape[-1] // size, size).abs()
    value = [torch.ones_like(groups[..., 0]), *(torch.zeros_like(groups[..., 0]) for _ in range(keep + 1))]
    for entry in groups.unbind(-1):
        for degree in range(keep + 1, 0, -1):
            value[degree] = torch.addcmul(value[degree], value[degree - 1], entry)
    return value[-1]


@torch.no_grad()
def prox(z: Tensor, lam: float, pattern: str | Pattern = "2:4", *, backend: Backend = "auto") -> Tensor:
    """Return the global minimiser of ``1/2 |w - z|^2 + lam * e_{N+1}(|w|)`` of every group.

    Exact for every N:M that the tests' brute force can judge; 2:4 and 1:M are fast, other patterns solve M - N small
    problems a group in float64.

    Args:
        z: (..., d_in), any floating dtype; float64 is computed in float64, every other in float32 at least.
        lam: the strength, finite and >= 0; its unit is that of ``z`` to the power 1 - N.
        pattern: ``N:M`` with groups along the last dimension.
        backend: ``auto`` takes the compiled kernel where there is one (2:4; `halve.maths.kernels.describe` says which:
            C++ on the CPU, Triton on a GPU, that one not in float64), else PyTorch; ``reference`` is always PyTorch,
            and ``native`` refuses to be anything but compiled.

    Returns:
        Tensor: a new tensor of z's shape and dtype, without a gradient. Signs and the order of magnitudes are z's,
        zeros are +0.0, and where equal entries compete the lowest index stays.

    Raises:
        PatternError: the pattern is unstructured or malformed, or does not fit the last dimension.
        InputError: ``z`` is not floating point or not finite, ``lam`` is negative or not finite, or the backend is
            unknown or has no kernel for this.
    """
    parsed, keep = _checked(z, pattern, "z")
    strength = float(lam)
    if not (math.isfinite(strength) and strength >= 0.0):
        raise InputError(f"lam = {lam} cannot weigh a penalty: pass a finite number >= 0")
    if backend not in get_args(Backend):
        raise InputError(f"backend {backend!r} is unknown: choose one of {', '.join(get_args(Backend))}")
    _, size = parsed.budget(z.shape[-1])
    wide = strength > 0.0 and not _FLOAT32_LAMS[0] <= strength <= _FLOAT32_LAMS[1]
    dtype = torch.float64 if wide else _compute_dtype(z)
    reads = kernels.dtypes(z.device.type) if (keep, size) == (2, 4) and backend != "reference" else ()
    if backend == "native" and dtype not in reads:
        raise InputError(
            f"there is no kernel for {parsed} in {dtype} on {z.device} "
            f"({kernels.describe(z.device.type)}): use backend auto"
        )
    exact = z.detach() if z.dtype in reads and not wide else z.detach().to(dtype)
    exact = exact.reshape(-1, size).contiguous()
    solved: Tensor | None
    if strength == 0.0:
        solved = exact + 0.0 if _all_finite(exact) else None
    elif dtype in reads:
        solved = kernels.prox_two_of_four(exact, strength)
    else:
        solved = _reference(exact, strength, keep)
    if solved is None:
        raise InputError("z holds NaN or infinity: the proximal operator needs finite weights")
    return solved.to(z.dtype).reshape(z.shape)


def has_fast_solver(pattern: Pattern) -> bool:
    """Whether the groups of ``pattern`` are solved in a few steps (2:4, 1:M), not by many generic iterations."""
    return pattern.structured and (pattern.keep == 1 or (pattern.keep, pattern.group) == (2, 4))


def _reference(z: Tensor, lam: float, keep: int) -> Tensor | None:
    """Solve (groups, M) chunk by chunk in PyTorch; None if an entry is not finite."""
    size = z.shape[1]
    fast = (keep, size) == (2, 4)
    chunk = _CHUNK if fast else max(1, _CHUNK // size**3)
    result = torch.empty_like(z)
    for start in range(0, len(z), chunk):
        part = z[start : start + chunk]
        if not _all_finite(part):
            return None
        result[start : start + chunk] = _two_of_four(part, lam) if fast else _any_pattern(part, lam, keep)
    return result


def _all_finite(tensor: Tensor) -> bool:
    return math.isfinite(float((tensor - tensor).sum()))  # infinity - infinity is NaN; no mask, unlike isfinite


def _checked(tensor: Tensor, pattern: str | Pattern, name: str) -> tuple[Pattern, int]:
    parsed = Pattern.parse(pattern)
    if parsed.keep is None:
        raise PatternError(f"pattern {parsed} has no groups, and the regulariser needs them: pass N:M, such as 2:4")
    if not tensor.is_floating_point():
        raise InputError(f"{name} has dtype {tensor.dtype}: pass a floating-point tensor")
    if tensor.ndim == 0:
        raise PatternError(f"pattern {parsed} needs rows of weights, but {name} is a single number")
    return parsed, parsed.keep


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _any_pattern(z: Tensor, lam: float, keep: int) -> Tensor:
    """Solve (groups, M) in float64, for any N:M."""
    exact = z.double()
    magnitudes, order = exact.abs().sort(dim=-1, descending=True, stable=True)
    sorted_w = prox_of_pairs(magnitudes, lam) if keep == 1 else prox_on_faces(magnitudes, lam, keep)
    return torch.copysign(torch.empty_like(exact).scatter_(-1, order, sorted_w), exact).add_(0.0).to(z.dtype)


def _two_of_four(z: Tensor, lam: float) -> Tensor:
    """Solve (groups, 4), one plane per position, faces only where they can win.

    Selection by `torch.where` costs twenty times an addition on a CPU, so the sort's swaps are undone by masked
    exclusive or on the numbers' bits.
    """
    bits, shift = (torch.int64, 63) if z.dtype == torch.float64 else (torch.int32, 31)
    planes = [z[:, i].contiguous() for i in range(4)]
    w = [plane.abs() for plane in planes]
    swaps = []
    for i, j in _STABLE_NETWORK:
        swaps.append(torch.sub(w[i], w[j]).view(bits).bitwise_right_shift_(shift))  # all ones where w[i] < w[j]
        w[i], w[j] = torch.maximum(w[i], w[j]), torch.minimum(w[i], w[j])
    mu = w[0] * lam
    undecided = torch.nonzero((mu < _SPARSE_FROM) & (w[2] > 0)).squeeze(1)
    top = torch.stack([plane[undecided] for plane in w])
    w[2].zero_()
    w[3].zero_()
    if len(undecided):
        solved, denser = _denser_faces(top, mu[undecided])
        for i in range(4):
            w[i][undecided[denser]] = solved[i]
    for (i, j), swap in zip(reversed(_STABLE_NETWORK), reversed(swaps), strict=True):
        change = (w[i].view(bits) ^ w[j].view(bits)).bitwise_and_(swap)
        w[i].view(bits).bitwise_xor_(change)
        w[j].view(bits).bitwise_xor_(change)
    out = torch.empty_like(z)
    for i in range(4):
        torch.add(torch.copysign(w[i], planes[i]), 0.0, out=out[:, i])  # + 0.0 turns -0.0 into +0.0
    return out


def _denser_faces(z: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the groups that end with three or four non-zeros.

    With ``a = mu u``, four facts decide between the faces. The first is algebra; the others held in millions of groups
    sampled densely in the region where they could fail, and the tests' brute force judges the outcome.

    - A stationary point of face 3 beats face 2 exactly when ``a_1^2 + a_2^2 < 1``, and then its Hessian is positive.
    - Where a stationary point of face 4 has a positive Hessian and beats face 2, such a point of face 3 exists.
    - Where that point stays optimal against a fourth non-zero (``y_4 <= mu e_2(u)``) it is the minimiser if the Hessian
      of face 4 is positive at it, or if ``y_4 < 0.9277 mu e_2(u)``, a ratio that four equal entries attain.
    - Where it does not stay optimal, the point of face 4 is the minimiser; only otherwise are objectives compared.

    Args:
        z: (4, groups), decreasing magnitudes, z[2] > 0.
        mu: (groups,), lam * z[0].

    Returns:
        tuple[Tensor, Tensor]: the magnitudes (4, solved) and the indices (solved,) of their groups.
    """
    y = z / z[0]
    u, wins = _face_of_three(y, mu)
    d = _slopes(u, mu)
    pair, third = mu * (u[0] + u[1]), mu * u[2]
    convex = _four_is_convex(pair, third, mu * (u[0] - u[1]), third)
    stays = (y[3] <= d[3]) & (convex | (y[3] < _THREE_IS_SAFE_BELOW * d[3]))
    kept = torch.nonzero(wins).squeeze(1)
    d = d.index_select(1, kept)
    dense = torch.nonzero((~stays & (y[3] > 0))[kept]).squeeze(1)
    d[3] = y[3, kept]  # what takes the fourth entry to zero
    keeps_four = torch.zeros_like(kept, dtype=torch.bool)
    if len(dense):
        at = kept[dense]
        y_dense, mu_dense, d_three = y.index_select(1, at), mu[at], d.index_select(1, dense)
        three = 0.5 * (d_three * d_three).sum(0) + u[2, at] * d_three[2]
        u_four, d_four, found = _face_of_four(y_dense, mu_dense)
        four = 0.5 * (d_four * d_four).sum(0) + (u_four * d_four).sum(0) / 3  # Euler: sum_i u_i d_i = 3 mu e_3
        better = torch.nonzero(found & ((four < three) | (y_dense[3] > mu_dense * _e2(u[:3, at])))).squeeze(1)
        d[:, dense[better]] = d_four[:, better]
        keeps_four[dense[better]] = True
    z = z.index_select(1, kept)
    solved = (z - z[0] * d).clamp_(min=0.0)
    solved[3].mul_(keeps_four)  # z_1 (z_4 / z_1) need not be z_4
    return solved, kept


def _e2(u: Tensor) -> Tensor:
    return u[0] * u[1] + u[2] * (u[0] + u[1])


def _slopes(u: Tensor, mu: Tensor) -> Tensor:
    """Return ``mu de_3/du`` of (4, groups): sums of products, so the relative accuracy of u is kept."""
    low, high = u[2] + u[3], u[0] + u[1]
    product_low, product_high = u[2] * u[3], u[0] * u[1]
    return torch.stack(
        [u[1] * low + product_low, u[0] * low + product_low, u[3] * high + product_high, u[2] * high + product_high]
    ).mul_(mu)


def _face_of_three(y: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Find the candidate with exactly three non-zeros.

    With ``t = mu u_3`` the two largest follow from a linear system, which leaves one equation for u_3,
    ``h = u_3 - y_3 + mu u_1 u_2 = 0``. Below ``t = y_2 / 2`` h is convex with ``h' > 0`` at every start below, so
    Newton's method overshoots at most once and then falls monotonically.

    Args:
        y: (4, groups), decreasing, y[0] = 1.
        mu: (groups,), below `_SPARSE_FROM`.

    Returns:
        tuple[Tensor, Tensor]: u of shape (4, groups) with u[3] = 0, and whether it exists and beats two non-zeros.
    """
    u3, settled = _descend_to_third(y, mu, torch.minimum(y[2], y[1] / (2 * mu)), 4)
    slow = torch.nonzero(~settled).squeeze(1)
    if len(slow):
        u3[slow], settled[slow] = _descend_to_third(y[:, slow], mu[slow], u3[slow], 30)
    u1, u2, _ = _two_largest(y, mu, u3)
    wins = settled & (u3 > 0) & (mu * mu * (u1 * u1 + u2 * u2) < 1)
    return torch.stack([u1, u2, u3, torch.zeros_like(u3)]), wins


def _two_largest(y: Tensor, mu: Tensor, u3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = mu * u3
    inverse = 1 / (1 - t * t)
    return (1 - t * y[1]) * inverse, (y[1] - t) * inverse, inverse


def _descend_to_third(y: Tensor, mu: Tensor, u3: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    limit = torch.minimum(y[2], 0.75 / mu)  # a_3 < 1/sqrt(2) wherever face 3 wins
    before = u3
    for _ in range(steps):
        u1, u2, inverse = _two_largest(y, mu, u3)
        product = u1 * u2
        value = mu * product + (u3 - y[2])
        slope = 1 - mu * mu * (u1 * u1 + u2 * u2 - 2 * mu * u3 * product) * inverse
        before = u3
        u3 = (u3 - value / slope.clamp(min=1e-30)).clamp_(min=0.0).minimum(limit)
    return u3, (u3 - before).abs() <= _newton_tolerance(y) * u3


def _newton_tolerance(y: Tensor) -> float:
    """Relative size of a last Newton step whose successor, quadratically smaller, would change no result."""
    return 1e-6 if y.dtype == torch.float64 else 1e-3


def _four_is_convex(s: Tensor, q: Tensor, d: Tensor, e: Tensor) -> Tensor:
    """Whether the Hessian on face 4 is positive, from ``mu`` times the pairs' sums s, q and differences d, e."""
    left = 1 + q - e * e / (1 - s)
    right = 1 + s - d * d / (1 - q)
    return (s < 1) & (q < 1) & (left > 0) & (left * right > (s + q) ** 2)


def _face_of_four(y: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the candidate without zeros, by Newton's method on sums and differences of the pairs (1, 2) and (3, 4).

    In s = u_1 + u_2, q = u_3 + u_4, d = u_1 - u_2, e = u_3 - u_4 the Hessian is an arrow: d meets only q, and e only s.

    Args:
        y: (4, groups), decreasing, y[0] = 1.
        mu: (groups,), below `_SPARSE_FROM`.

    Returns:
        tuple[Tensor, Tensor, Tensor]: u and ``mu de_3/du``, both (4, groups), and whether u exists
            with a positive Hessian.
    """
    u, found = torch.zeros_like(y), torch.zeros_like(mu, dtype=torch.bool)
    left = torch.arange(len(mu), device=y.device)
    for attempt, start in enumerate(_STARTS):
        y_left, mu_left = y.index_select(1, left), mu[left]
        state = _start_of_four(y_left, mu_left, *start)
        settled = torch.zeros_like(mu_left, dtype=torch.bool)
        if attempt == 0:  # most settle within four steps; a few more disturb only the worst conditioned
            state, settled = _descend_on_four(y_left, mu_left, state, 4)
        for _ in range(12):
            slow = torch.nonzero(~settled).squeeze(1)
            if not len(slow):
                break
            state[:, slow], settled[slow] = _descend_on_four(
                y_left.index_select(1, slow), mu_left[slow], state.index_select(1, slow), 1
            )
        polished, positive = _polish_four(y_left, mu_left, state)
        good = settled & positive
        u[:, left[good]], found[left[good]] = polished[:, good], True
        left = left[~good]
        if not len(left):
            break
    return u, _slopes(u, mu), found


def _start_of_four(y: Tensor, mu: Tensor, damping: float, share: float) -> Tensor:
    """Return (s, q, d, e) between y and a first Jacobi step from it."""
    s, q = y[0] + y[1], y[2] + y[3]
    low = (s - share * mu * y[2] * y[3]).clamp_(min=0.0) / (1 + damping * mu * q)
    high = (q - share * mu * y[0] * y[1]).clamp_(min=0.0) / (1 + damping * mu * s)
    return torch.stack([low, high, y[0] - y[1], y[2] - y[3]])


def _descend_on_four(y: Tensor, mu: Tensor, state: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    sums = y[0] + y[1], y[2] + y[3]
    differences = y[0] - y[1], y[2] - y[3]
    s, q, d, e = state
    step_s = step_q = s
    for _ in range(steps):
        ms, mq, md, me = mu * s, mu * q, mu * d, mu * e
        over_q, over_s = 1 / (1 - mq), 1 / (1 - ms)
        rest_d, rest_e = d * (1 - mq) - differences[0], e * (1 - ms) - differences[1]
        lift_d, lift_e = md * over_q, me * over_s
        rest_s = s + s * mq - sums[0] + 0.5 * (q * mq - e * me) + lift_e * rest_e
        rest_q = q + q * ms - sums[1] + 0.5 * (s * ms - d * md) + lift_d * rest_d
        ss, qq, sq = 1 + mq - me * lift_e, 1 + ms - md * lift_d, ms + mq
        inverse = 1 / (ss * qq - sq * sq)
        step_s, step_q = (qq * rest_s - sq * rest_q) * inverse, (ss * rest_q - sq * rest_s) * inverse
        d = d - rest_d * over_q - lift_d * step_q
        e = e - rest_e * over_s - lift_e * step_s
        s, q = s - step_s, q - step_q
    tolerance = _newton_tolerance(y)
    noise = 16 * torch.finfo(y.dtype).eps * s  # of a step in q where one entry dominates; `_polish_four` removes it
    return torch.stack([s, q, d, e]), (step_s.abs() <= tolerance * s) & (step_q.abs() <= tolerance * q + noise)


def _polish_four(y: Tensor, mu: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return u (4, groups) with small entries accurate beside a dominant one, and whether it is a local minimum.

    ``s - d`` loses a small u_2, so q and u_2 are solved for again with u_1, s and ``u_3 u_4`` given.
    """
    s, q, d, e = state
    u1 = 0.5 * (s + d)
    a1 = mu * u1
    u2 = s - u1
    for _ in range(2):  # the first pass takes the noise out of q, which the second would otherwise meet squared
        low = mu * 0.25 * (q * q - e * e)
        q = (y[2] + y[3] - 2 * a1 * (y[1] - low)) / (1 + mu * s - 2 * a1 * a1)
        u2 = y[1] - low - a1 * q
        s = u1 + u2
        e = (y[2] - y[3]) / (1 - mu * s)
    u3, u4 = 0.5 * (q + e), 0.5 * (q - e)
    u = torch.stack([u1, u2, u3, u4])
    positive = _four_is_convex(mu * s, mu * q, mu * (u1 - u2), mu * e) & (u4 > 0) & (u2 > 0)
    # a step may come out small far from any stationary point, once in some 100 000 groups near the faces' borders
    stationary = (u + _slopes(u, mu) - y).abs().amax(0) <= 0.1 * _newton_tolerance(y)
    return u, positive & stationary
