"""The proximal operator of 2:4 on a GPU in one pass; importing this needs Triton (see `halve.maths.kernels`).

The algorithm and its constants are those of the native kernel (``src/native/prox/two_of_four.cpp``), the reasons those
of the reference (`halve.maths.proximal`). A program solves `_BLOCK` groups, one vector a position; a group that has
settled is left alone while its neighbours go on, so that what becomes of it depends on that group alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256

_SPARSE_FROM = tl.constexpr(1.2072)
_THREE_IS_SAFE_BELOW = tl.constexpr(0.92)
_NEWTON_TOLERANCE = tl.constexpr(1e-3)
_STATIONARY_WITHIN = tl.constexpr(1e-4)
_NOISE = tl.constexpr(16 * torch.finfo(torch.float32).eps)
_STEPS_ON_THREE = tl.constexpr(34)
_STEPS_ON_FOUR = tl.constexpr(16)


def prox_two_of_four(z: Tensor, lam: float) -> Tensor | None:
    """Return the proximal operator of ``lam e_3`` for groups of four.

    Args:
        z: contiguous float32, bfloat16 or float16 tensor, its number of elements a multiple of 4; on a GPU, or anywhere
            under Triton's interpreter (``TRITON_INTERPRET=1`` when this module is imported). It is computed in float32.
        lam: positive and within float32.

    Returns:
        Tensor | None: a new tensor like ``z``; None if ``z`` holds NaN or infinity.
    """
    out = torch.empty_like(z)
    spoiled = torch.zeros(1, dtype=torch.int32, device=z.device)
    if z.numel():
        _solve[(triton.cdiv(z.numel(), 4 * _BLOCK),)](z, out, spoiled, z.numel(), lam, BLOCK=_BLOCK)
    return None if spoiled.item() else out


@triton.jit
def _solve(z_ptr, out_ptr, spoiled_ptr, size, lam, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * 4 + tl.arange(0, 4)[None, :]
    at += tl.program_id(0).to(tl.int64) * (4 * BLOCK)
    z = tl.load(z_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    if tl.max(tl.where(tl.abs(z) < float("inf"), 0, 1)) > 0:
        tl.store(spoiled_ptr, 1)
    z0, z1, z2, z3 = _positions(z, BLOCK)

    # Neighbours alone change places, so that equal magnitudes keep their order.
    w0, w1, swap0 = _ordered(tl.abs(z0), tl.abs(z1))
    w2, w3, swap1 = _ordered(tl.abs(z2), tl.abs(z3))
    w1, w2, swap2 = _ordered(w1, w2)
    w0, w1, swap3 = _ordered(w0, w1)
    w2, w3, swap4 = _ordered(w2, w3)
    w1, w2, swap5 = _ordered(w1, w2)

    undecided = (w0 * lam < _SPARSE_FROM) & (w2 > 0)
    if _any(undecided):
        w0, w1, w2, w3 = _denser_faces(w0, w1, w2, w3, lam, undecided)
    else:
        w2 = tl.zeros_like(w2)
        w3 = tl.zeros_like(w3)

    w1, w2 = _back(w1, w2, swap5)
    w2, w3 = _back(w2, w3, swap4)
    w0, w1 = _back(w0, w1, swap3)
    w1, w2 = _back(w1, w2, swap2)
    w2, w3 = _back(w2, w3, swap1)
    w0, w1 = _back(w0, w1, swap0)
    w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK, 4))
    signed = tl.where(w > 0, tl.where(z < 0, -w, w), 0.0)
    tl.store(out_ptr + at, signed.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _positions(z, BLOCK: tl.constexpr):
    even, odd = tl.split(tl.reshape(z, (BLOCK, 2, 2)))
    z0, z2 = tl.split(even)
    z1, z3 = tl.split(odd)
    return z0, z1, z2, z3


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32)) > 0


@triton.jit
def _ordered(first, second):
    swap = first < second
    return tl.where(swap, second, first), tl.where(swap, first, second), swap


@triton.jit
def _back(first, second, swap):
    return tl.where(swap, second, first), tl.where(swap, first, second)


@triton.jit
def _smaller(a, b):  # b where a is NaN
    return tl.where(a < b, a, b)


@triton.jit
def _larger(a, b):  # b where a is NaN
    return tl.where(a > b, a, b)


@triton.jit
def _denser_faces(w0, w1, w2, w3, lam, undecided):
    """Return the magnitudes of the minimisers, in decreasing order as given."""
    top = tl.where(undecided, w0, 1.0)  # the others are solved for a stand-in
    mu = tl.where(undecided, w0 * lam, 1.0)
    y1, y2, y3 = (
        tl.where(undecided, w1 / top, 1.0),
        tl.where(undecided, w2 / top, 1.0),
        tl.where(undecided, w3 / top, 0.0),
    )
    u3, settled = _third(y1, y2, mu, undecided)
    u1, u2, _inverse = _two_largest(y1, mu, u3)
    wins = undecided & settled & (u3 > 0) & (mu * mu * (u1 * u1 + u2 * u2) < 1)
    push = mu * (u3 * (u1 + u2) + u1 * u2)
    close = wins & (y3 >= push * _THREE_IS_SAFE_BELOW) & (y3 > 0)
    convex = _four_is_convex(mu * (u1 + u2), mu * u3, mu * (u1 - u2), mu * u3)
    waiting = close & ((y3 > push) | (convex == 0))
    d0, d1, d2, d3 = mu * u2 * u3, mu * u1 * u3, mu * u1 * u2, tl.zeros_like(mu)
    three = 0.5 * (d0 * d0 + d1 * d1 + d2 * d2 + y3 * y3) + u3 * d2

    keeps_four = waiting & (mu < 0)
    attempt = 0
    while (attempt < 3) & _any(waiting):
        # The first start serves all but some groups in a million.
        damping = tl.where(attempt == 0, 0.45, tl.where(attempt == 1, 0.3, 0.6))
        share = tl.where(attempt == 0, 0.9, tl.where(attempt == 1, 1.0, 1.2))
        c0, c1, c2, c3, four, found = _four(y1, y2, y3, mu, waiting, damping, share)
        better = found & ((four < three) | (y3 > push))
        d0, d1 = tl.where(better, c0, d0), tl.where(better, c1, d1)
        d2, d3 = tl.where(better, c2, d2), tl.where(better, c3, d3)
        keeps_four = keeps_four | better
        waiting = waiting & (found == 0)
        attempt += 1

    w0 = tl.where(wins, _larger(w0 - top * d0, 0.0), w0)
    w1 = tl.where(wins, _larger(w1 - top * d1, 0.0), w1)
    w2 = tl.where(wins, _larger(w2 - top * d2, 0.0), 0.0)
    w3 = tl.where(keeps_four, _larger(w3 - top * d3, 0.0), 0.0)
    return w0, w1, w2, w3


@triton.jit
def _two_largest(y1, mu, u3):
    t = mu * u3
    inverse = 1 / (1 - t * t)
    return (1 - t * y1) * inverse, (y1 - t) * inverse, inverse


@triton.jit
def _third(y1, y2, mu, undecided):
    """Return the third entry of the candidate with three non-zeros, and whether Newton's method has settled."""
    # Two bounds of the root from above: one Newton step from 0, where h is convex and falls, and y_2 / (2 mu).
    slope = 1 - mu * mu * (1 + y1 * y1)
    from_zero = _larger((y2 - mu * y1) / _larger(slope, 1e-30), 0.0)
    limit = _smaller(0.75 / mu, y2)
    u3 = _smaller(tl.where(slope > 0, from_zero, y2), _smaller(0.5 * y1 / mu, y2))
    moving = undecided
    step = 0
    while (step < _STEPS_ON_THREE) & _any(moving):
        u1, u2, inverse = _two_largest(y1, mu, u3)
        product = u1 * u2
        value = mu * product + (u3 - y2)
        slope = 1 - mu * mu * (u1 * u1 + u2 * u2 - 2 * mu * u3 * product) * inverse
        after = _smaller(_larger(u3 - value / _larger(slope, 1e-30), 0.0), limit)
        change = tl.abs(after - u3)
        u3 = tl.where(moving, after, u3)
        moving = moving & (change > u3 * _NEWTON_TOLERANCE)
        step += 1
    return u3, moving == 0


@triton.jit
def _four_is_convex(s, q, d, e):
    left = 1 + q - e * e / (1 - s)
    right = 1 + s - d * d / (1 - q)
    return (s < 1) & (q < 1) & (left > 0) & (left * right > (s + q) * (s + q))


@triton.jit
def _four(y1, y2, y3, mu, waiting, damping, share):
    """Return ``mu de_3/du`` of the candidate without zeros, its objective, and whether it was found."""
    sum_s, sum_q, diff_d, diff_e = 1 + y1, y2 + y3, 1 - y1, y2 - y3
    s = _larger(sum_s - share * mu * y2 * y3, 0.0) / (1 + damping * mu * sum_q)
    q = _larger(sum_q - share * mu * y1, 0.0) / (1 + damping * mu * sum_s)
    d, e = diff_d, diff_e
    moving = waiting
    step = 0
    while (step < _STEPS_ON_FOUR) & _any(moving):
        ms, mq, md, me = mu * s, mu * q, mu * d, mu * e
        over_q, over_s = 1 / (1 - mq), 1 / (1 - ms)
        rest_d, rest_e = d * (1 - mq) - diff_d, e * (1 - ms) - diff_e
        lift_d, lift_e = md * over_q, me * over_s
        rest_s = s + s * mq - sum_s + 0.5 * (q * mq - e * me) + lift_e * rest_e
        rest_q = q + q * ms - sum_q + 0.5 * (s * ms - d * md) + lift_d * rest_d
        ss, qq, sq = 1 + mq - me * lift_e, 1 + ms - md * lift_d, ms + mq
        inverse = 1 / (ss * qq - sq * sq)
        step_s, step_q = (qq * rest_s - sq * rest_q) * inverse, (ss * rest_q - sq * rest_s) * inverse
        d = tl.where(moving, d - rest_d * over_q - lift_d * step_q, d)
        e = tl.where(moving, e - rest_e * over_s - lift_e * step_s, e)
        s = tl.where(moving, s - step_s, s)
        q = tl.where(moving, q - step_q, q)
        close_s = tl.abs(step_s) <= s * _NEWTON_TOLERANCE
        close_q = tl.abs(step_q) <= q * _NEWTON_TOLERANCE + s * _NOISE
        moving = moving & ((close_s & close_q) == 0)
        step += 1

    # Polish: small entries accurate beside a dominant one. The first pass takes the noise out of q.
    u0 = 0.5 * (s + d)
    a1 = mu * u0
    u1 = s - u0
    for _pass in tl.static_range(2):
        low_product = mu * 0.25 * (q * q - e * e)
        q = (sum_q - 2 * a1 * (y1 - low_product)) / (1 + mu * s - 2 * a1 * a1)
        u1 = y1 - low_product - a1 * q
        s = u0 + u1
        e = diff_e / (1 - mu * s)
    u2, u3 = 0.5 * (q + e), 0.5 * (q - e)
    minimum = _four_is_convex(mu * s, mu * q, mu * (u0 - u1), mu * e) & (u3 > 0) & (u1 > 0)
    low, high, product_low, product_high = u2 + u3, u0 + u1, u2 * u3, u0 * u1
    d0, d1 = mu * (u1 * low + product_low), mu * (u0 * low + product_low)
    d2, d3 = mu * (u3 * high + product_high), mu * (u2 * high + product_high)
    miss_high = _larger(tl.abs(u0 + d0 - 1), tl.abs(u1 + d1 - y1))
    miss_low = _larger(tl.abs(u2 + d2 - y2), tl.abs(u3 + d3 - y3))
    minimum = minimum & (miss_high <= _STATIONARY_WITHIN) & (miss_low <= _STATIONARY_WITHIN)
    # Euler: sum_i u_i d_i = 3 mu e_3
    objective = 0.5 * (d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3) + (u0 * d0 + u1 * d1 + u2 * d2 + u3 * d3) * (1.0 / 3.0)
    return d0, d1, d2, d3, objective, waiting & (moving == 0) & minimum
