// The candidates with three and with four non-zeros, for a vector of groups; halve/maths/proximal.py has the mathematics.
#pragma once

#include <limits>

#include "simd.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int STARTS = 3;
constexpr double START[STARTS][2] = {{0.45, 0.9}, {0.3, 1.0}, {0.6, 1.2}};
constexpr int STEPS_ON_THREE = 1, MORE_STEPS_ON_THREE = 32;
constexpr int STEPS_ON_FOUR = 2, MORE_STEPS_ON_FOUR = 2, LATE_STEPS = 16;

template <typename T>
constexpr T NEWTON_TOLERANCE = sizeof(T) == 8 ? T(1e-6) : T(1e-3);

// A step may come out small far from any stationary point, once in some 100 000 groups near the faces' borders.
template <typename T>
constexpr T STATIONARY_WITHIN = T(0.1) * NEWTON_TOLERANCE<T>;

// Magnitudes of a group in decreasing order, divided by the largest, and mu = lam * the largest.
template <typename V>
struct Group {
    V y1, y2, y3, mu;  // y0 = 1
};

template <typename V>
inline void two_largest(V y1, V mu, V u3, V& u1, V& u2, V& inverse) {
    const V t = mu * u3;
    inverse = reciprocal(1 - t * t);
    u1 = (1 - t * y1) * inverse;
    u2 = (y1 - t) * inverse;
}

// One Newton step on h(u_3) = u_3 - y_3 + mu u_1 u_2.
template <typename V>
inline V step_to_third(const Group<V>& g, V u3, V limit) {
    V u1, u2, inverse;
    two_largest(g.y1, g.mu, u3, u1, u2, inverse);
    const V product = u1 * u2;
    const V value = g.mu * product + (u3 - g.y2);
    const V slope = 1 - g.mu * g.mu * (u1 * u1 + u2 * u2 - 2 * g.mu * u3 * product) * inverse;
    const V tiny = V{} + decltype(value[0] + 0)(1e-30), zero = {};
    return smaller(larger(u3 - value * reciprocal(larger(slope, tiny)), zero), limit);
}

template <typename T, typename V = typename Simd<T>::Real, typename M = typename Simd<T>::Mask>
inline M descend_to_third(const Group<V>& g, M wanted, V& u3) {
    // Two bounds of the root from above: one Newton step from 0, where h is convex and falls, and y_2 / (2 mu).
    const V over_mu = reciprocal(g.mu), tiny = V{} + T(1e-30), zero = {};
    const V slope = 1 - g.mu * g.mu * (1 + g.y1 * g.y1);
    const V from_zero = larger((g.y2 - g.mu * g.y1) * reciprocal(larger(slope, tiny)), zero);
    const V limit = smaller(T(0.75) * over_mu, g.y2);
    u3 = smaller(slope > 0 ? from_zero : g.y2, smaller(T(0.5) * g.y1 * over_mu, g.y2));
    V before = u3;
    for (int step = 0; step < STEPS_ON_THREE; ++step) {
        before = u3;
        u3 = step_to_third(g, u3, limit);
    }
    const auto moved = [&] {
        const V change = u3 - before;
        return larger(change, -change) > NEWTON_TOLERANCE<T> * u3;
    };
    M open = wanted & moved();
    for (int step = 0; step < MORE_STEPS_ON_THREE && any(open); ++step) {
        before = u3;
        u3 = open ? step_to_third(g, u3, limit) : u3;
        open &= moved();
    }
    return ~open;
}

template <typename V>
inline auto four_is_convex(V s, V q, V d, V e) {
    const V left = 1 + q - e * e * reciprocal(1 - s);
    const V right = 1 + s - d * d * reciprocal(1 - q);
    return (s < 1) & (q < 1) & (left > 0) & (left * right > (s + q) * (s + q));
}

// Sums and differences of the pairs (1, 2) and (3, 4), and the last Newton step.
template <typename V>
struct Four {
    V s, q, d, e, step_s, step_q;
};

template <typename T, typename V = typename Simd<T>::Real>
inline Four<V> start_of_four(const Group<V>& g, const double (&start)[2]) {
    const T damping = T(start[0]), share = T(start[1]);
    const V s = 1 + g.y1, q = g.y2 + g.y3, zero = {};
    const V low = larger(s - share * g.mu * g.y2 * g.y3, zero) * reciprocal(1 + damping * g.mu * q);
    const V high = larger(q - share * g.mu * g.y1, zero) * reciprocal(1 + damping * g.mu * s);
    return {low, high, 1 - g.y1, g.y2 - g.y3, zero, zero};
}

template <typename T, typename V = typename Simd<T>::Real>
inline void step_on_four(const Group<V>& g, Four<V>& f) {
    const V sum_s = 1 + g.y1, sum_q = g.y2 + g.y3, diff_d = 1 - g.y1, diff_e = g.y2 - g.y3;
    const V ms = g.mu * f.s, mq = g.mu * f.q, md = g.mu * f.d, me = g.mu * f.e;
    const V over_q = reciprocal(1 - mq), over_s = reciprocal(1 - ms);
    const V rest_d = f.d * (1 - mq) - diff_d, rest_e = f.e * (1 - ms) - diff_e;
    const V lift_d = md * over_q, lift_e = me * over_s;
    const V rest_s = f.s + f.s * mq - sum_s + T(0.5) * (f.q * mq - f.e * me) + lift_e * rest_e;
    const V rest_q = f.q + f.q * ms - sum_q + T(0.5) * (f.s * ms - f.d * md) + lift_d * rest_d;
    const V ss = 1 + mq - me * lift_e, qq = 1 + ms - md * lift_d, sq = ms + mq;
    const V inverse = reciprocal(ss * qq - sq * sq);
    f.step_s = (qq * rest_s - sq * rest_q) * inverse;
    f.step_q = (ss * rest_q - sq * rest_s) * inverse;
    f.d = f.d - rest_d * over_q - lift_d * f.step_q;
    f.e = f.e - rest_e * over_s - lift_e * f.step_s;
    f.s -= f.step_s;
    f.q -= f.step_q;
}

template <typename T, typename V = typename Simd<T>::Real>
inline auto four_settled(const Four<V>& f) {
    const V noise = T(16) * std::numeric_limits<T>::epsilon() * f.s;
    return (larger(f.step_s, -f.step_s) <= NEWTON_TOLERANCE<T> * f.s) &
           (larger(f.step_q, -f.step_q) <= NEWTON_TOLERANCE<T> * f.q + noise);
}

// Continue the wanted groups that have not settled, at most `steps` times; the others stay as they are.
template <typename T, typename V = typename Simd<T>::Real, typename M = typename Simd<T>::Mask>
inline M settle_on_four(const Group<V>& g, M wanted, Four<V>& f, int steps) {
    M settled = ~wanted | four_settled<T>(f);
    for (int step = 0; step < steps && any(~settled); ++step) {
        Four<V> next = f;
        step_on_four<T>(g, next);
        f = {settled ? f.s : next.s,           settled ? f.q : next.q,
             settled ? f.d : next.d,           settled ? f.e : next.e,
             settled ? f.step_s : next.step_s, settled ? f.step_q : next.step_q};
        settled |= four_settled<T>(f);
    }
    return settled;
}

// A candidate: mu de_3/du for each entry, and its objective.
template <typename V>
struct Candidate {
    V d0, d1, d2, d3, objective;
};

// The candidate without zeros, small entries accurate beside a dominant one, and whether it is a local minimum.
template <typename T, typename V = typename Simd<T>::Real, typename M = typename Simd<T>::Mask>
inline Candidate<V> polish_four(const Group<V>& g, const Four<V>& f, M& minimum) {
    const V mu = g.mu, u0 = T(0.5) * (f.s + f.d), a1 = mu * u0;
    V s = f.s, q = f.q, e = f.e, u1 = s - u0;
    for (int pass = 0; pass < 2; ++pass) {  // the first takes the noise out of q, which the second would meet squared
        const V low_product = mu * T(0.25) * (q * q - e * e);
        q = (g.y2 + g.y3 - 2 * a1 * (g.y1 - low_product)) * reciprocal(1 + mu * s - 2 * a1 * a1);
        u1 = g.y1 - low_product - a1 * q;
        s = u0 + u1;
        e = (g.y2 - g.y3) * reciprocal(1 - mu * s);
    }
    const V u2 = T(0.5) * (q + e), u3 = T(0.5) * (q - e);
    minimum = four_is_convex(mu * s, mu * q, mu * (u0 - u1), mu * e) & (u3 > 0) & (u1 > 0);
    const V low = u2 + u3, high = u0 + u1, product_low = u2 * u3, product_high = u0 * u1;
    Candidate<V> c;
    c.d0 = mu * (u1 * low + product_low);
    c.d1 = mu * (u0 * low + product_low);
    c.d2 = mu * (u3 * high + product_high);
    c.d3 = mu * (u2 * high + product_high);
    const V misses[4] = {u0 + c.d0 - 1, u1 + c.d1 - g.y1, u2 + c.d2 - g.y2, u3 + c.d3 - g.y3};
    for (const V miss : misses) minimum &= larger(miss, -miss) <= STATIONARY_WITHIN<T>;
    // Euler: sum_i u_i d_i = 3 mu e_3
    c.objective = T(0.5) * (c.d0 * c.d0 + c.d1 * c.d1 + c.d2 * c.d2 + c.d3 * c.d3) +
                  (u0 * c.d0 + u1 * c.d1 + u2 * c.d2 + u3 * c.d3) * T(1.0 / 3.0);
    return c;
}

}  // namespace
}  // namespace halve::HALVE_ISA
