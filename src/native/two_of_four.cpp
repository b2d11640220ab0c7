// Compiled once for each instruction set, HALVE_ISA naming it. Loops run over the groups of a block, without branches,
// so that the compiler vectorises them; the few groups that Newton's method has not settled are finished one by one.
#include "two_of_four.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace halve::HALVE_ISA {
namespace {

constexpr int BLOCK = 256;  // groups at a time: few enough for the arrays below to stay in the cache

constexpr double SPARSE_FROM = 1.2072;  // from here on no minimiser has a third non-zero: (1 + sqrt 2) / 2
constexpr double THREE_IS_SAFE_BELOW = 0.92;  // share of the fourth entry's slope
constexpr int STARTS = 3;
constexpr double START[STARTS][2] = {{0.45, 0.9}, {0.3, 1.0}, {0.6, 1.2}};
constexpr int STEPS = 4, MORE_STEPS = 16;

template <typename T>
constexpr T newton_tolerance() {
    return sizeof(T) == 8 ? T(1e-6) : T(1e-3);
}

template <typename T>
inline void two_largest(T y1, T mu, T u3, T& u1, T& u2, T& inverse) {
    const T t = mu * u3;
    inverse = T(1) / (T(1) - t * t);
    u1 = (T(1) - t * y1) * inverse;
    u2 = (y1 - t) * inverse;
}

// Newton steps on h(u_3) = u_3 - y_3 + mu u_1 u_2.
template <typename T, int Count>
inline void descend_to_third(T y1, T y2, T mu, T& u3, T& before) {
    const T limit = std::min(y2, T(0.75) / mu);
    for (int step = 0; step < Count; ++step) {
        T u1, u2, inverse;
        two_largest(y1, mu, u3, u1, u2, inverse);
        const T product = u1 * u2;
        const T value = mu * product + (u3 - y2);
        const T slope = T(1) - mu * mu * (u1 * u1 + u2 * u2 - T(2) * mu * u3 * product) * inverse;
        before = u3;
        u3 = std::min(std::max(u3 - value / std::max(slope, T(1e-30)), T(0)), limit);
    }
}

template <typename T>
inline bool third_settled(T u3, T before) {
    return std::abs(u3 - before) <= newton_tolerance<T>() * u3;
}

template <typename T>
inline bool four_is_convex(T s, T q, T d, T e) {
    const T left = T(1) + q - e * e / (T(1) - s);
    const T right = T(1) + s - d * d / (T(1) - q);
    return (s < T(1)) & (q < T(1)) & (left > T(0)) & (left * right > (s + q) * (s + q));
}

// Sums and differences of the pairs (1, 2) and (3, 4), and the last Newton step.
template <typename T>
struct Four {
    T s, q, d, e, step_s, step_q;
};

template <typename T>
inline Four<T> start_of_four(T y1, T y2, T y3, T mu, double damping, double share) {
    const T s = T(1) + y1, q = y2 + y3;
    const T low = std::max(s - T(share) * mu * y2 * y3, T(0)) / (T(1) + T(damping) * mu * q);
    const T high = std::max(q - T(share) * mu * y1, T(0)) / (T(1) + T(damping) * mu * s);
    return {low, high, T(1) - y1, y2 - y3, T(0), T(0)};
}

template <typename T, int Count>
inline void descend_on_four(T y1, T y2, T y3, T mu, Four<T>& f) {
    const T sum_s = T(1) + y1, sum_q = y2 + y3, diff_d = T(1) - y1, diff_e = y2 - y3;
    for (int step = 0; step < Count; ++step) {
        const T ms = mu * f.s, mq = mu * f.q, md = mu * f.d, me = mu * f.e;
        const T over_q = T(1) / (T(1) - mq), over_s = T(1) / (T(1) - ms);
        const T rest_d = f.d * (T(1) - mq) - diff_d, rest_e = f.e * (T(1) - ms) - diff_e;
        const T lift_d = md * over_q, lift_e = me * over_s;
        const T rest_s = f.s + f.s * mq - sum_s + T(0.5) * (f.q * mq - f.e * me) + lift_e * rest_e;
        const T rest_q = f.q + f.q * ms - sum_q + T(0.5) * (f.s * ms - f.d * md) + lift_d * rest_d;
        const T ss = T(1) + mq - me * lift_e, qq = T(1) + ms - md * lift_d, sq = ms + mq;
        const T inverse = T(1) / (ss * qq - sq * sq);
        f.step_s = (qq * rest_s - sq * rest_q) * inverse;
        f.step_q = (ss * rest_q - sq * rest_s) * inverse;
        f.d = f.d - rest_d * over_q - lift_d * f.step_q;
        f.e = f.e - rest_e * over_s - lift_e * f.step_s;
        f.s -= f.step_s;
        f.q -= f.step_q;
    }
}

template <typename T>
inline bool four_settled(const Four<T>& f) {
    const T noise = T(16) * std::numeric_limits<T>::epsilon() * f.s;
    const T tolerance = newton_tolerance<T>();
    return (std::abs(f.step_s) <= tolerance * f.s) & (std::abs(f.step_q) <= tolerance * f.q + noise);
}

// The candidate without zeros: mu de_3/du for each entry, its objective, and whether it is a local minimum.
template <typename T>
struct Candidate {
    T d0, d1, d2, d3, objective;
    bool positive;
};

template <typename T>
inline Candidate<T> polish_four(T y1, T y2, T y3, T mu, const Four<T>& f) {
    const T u0 = T(0.5) * (f.s + f.d);
    const T a1 = mu * u0;
    T s = f.s, q = f.q, e = f.e, u1 = s - u0;
    for (int pass = 0; pass < 2; ++pass) {  // the first takes the noise out of q, which the second would meet squared
        const T low_product = mu * T(0.25) * (q * q - e * e);
        q = (y2 + y3 - T(2) * a1 * (y1 - low_product)) / (T(1) + mu * s - T(2) * a1 * a1);
        u1 = y1 - low_product - a1 * q;
        s = u0 + u1;
        e = (y2 - y3) / (T(1) - mu * s);
    }
    const T u2 = T(0.5) * (q + e), u3 = T(0.5) * (q - e);
    Candidate<T> c;
    c.positive = four_is_convex(mu * s, mu * q, mu * (u0 - u1), mu * e) & (u3 > T(0)) & (u1 > T(0));
    const T low = u2 + u3, high = u0 + u1, product_low = u2 * u3, product_high = u0 * u1;
    c.d0 = mu * (u1 * low + product_low);
    c.d1 = mu * (u0 * low + product_low);
    c.d2 = mu * (u3 * high + product_high);
    c.d3 = mu * (u2 * high + product_high);
    // Euler: sum_i u_i d_i = 3 mu e_3
    c.objective = T(0.5) * (c.d0 * c.d0 + c.d1 * c.d1 + c.d2 * c.d2 + c.d3 * c.d3) +
                  (u0 * c.d0 + u1 * c.d1 + u2 * c.d2 + u3 * c.d3) / T(3);
    return c;
}

// An integer as wide as T, so that a comparison's result stays in the lane of its operands.
template <typename T>
using Flag = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;

template <typename T>
struct Block {
    alignas(64) T w[4][BLOCK];  // sorted magnitudes, then the solution
    alignas(64) Flag<T> undecided[BLOCK];
    // The groups that may keep more than two, packed: `at` is their place in the block.
    alignas(64) T t[4][BLOCK], y1[BLOCK], y2[BLOCK], y3[BLOCK], mu[BLOCK], u3[BLOCK], d[4][BLOCK];
    alignas(64) T three[BLOCK], forced[BLOCK];
    alignas(64) Flag<T> open[BLOCK], settled[BLOCK], wins[BLOCK], four[BLOCK];
    int at[BLOCK];
    // Of those, the groups that may keep four, packed again: `dense` is their place in the arrays above.
    alignas(64) T x1[BLOCK], x2[BLOCK], x3[BLOCK], xmu[BLOCK], c[4][BLOCK], objective[BLOCK];
    alignas(64) Flag<T> found[BLOCK];
    int dense[BLOCK];
};

template <typename T>
bool sort_block(const T* __restrict z, int n, T lam, Block<T>& b) {
    Flag<T> spoiled = 0;
    for (int g = 0; g < n; ++g) {
        const T z0 = z[4 * g], z1 = z[4 * g + 1], z2 = z[4 * g + 2], z3 = z[4 * g + 3];
        const T a = std::abs(z0), c = std::abs(z1), x = std::abs(z2), y = std::abs(z3);
        spoiled |= !((a - a) + (c - c) + (x - x) + (y - y) == T(0));  // infinity - infinity is NaN
        const T ab = std::max(a, c), ba = std::min(a, c), xy = std::max(x, y), yx = std::min(x, y);
        const T top = std::max(ab, xy), low = std::min(ab, xy), high = std::max(ba, yx), bottom = std::min(ba, yx);
        b.w[0][g] = top;
        b.w[1][g] = std::max(low, high);
        b.w[2][g] = std::min(low, high);
        b.w[3][g] = bottom;
        b.undecided[g] = (top * lam < T(SPARSE_FROM)) & (b.w[2][g] > T(0));
    }
    return spoiled == 0;
}

// Pack the undecided groups; where most are, take them all, in place, and mark the others closed.
template <typename T>
int pack(int n, T lam, Block<T>& b) {
    int count = 0;
    for (int g = 0; g < n; ++g) {
        b.at[count] = g;
        count += static_cast<int>(b.undecided[g]);
    }
    if (2 * count > n) {
        count = n;
        for (int g = 0; g < n; ++g) b.at[g] = g;
        std::memcpy(b.t, b.w, sizeof(b.t));
        std::memcpy(b.open, b.undecided, sizeof(b.open));
    } else {
        for (int k = 0; k < count; ++k) {
            const int g = b.at[k];
            for (int i = 0; i < 4; ++i) b.t[i][k] = b.w[i][g];
            b.open[k] = 1;
        }
    }
    for (int k = 0; k < count; ++k) {
        // A closed group is solved for a harmless stand-in.
        const T top = b.open[k] ? b.t[0][k] : T(1);
        const T mu = b.open[k] ? top * lam : T(1);
        b.y1[k] = b.open[k] ? b.t[1][k] / top : T(1);
        b.y2[k] = b.open[k] ? b.t[2][k] / top : T(1);
        b.y3[k] = b.open[k] ? b.t[3][k] / top : T(0);
        b.mu[k] = mu;
    }
    return count;
}

// Solve face 3 for the packed groups; return how many need face 4 looked at, packed again.
template <typename T>
int solve_three(int count, Block<T>& b) {
    for (int k = 0; k < count; ++k) {
        T u3 = std::min(b.y2[k], b.y1[k] / (T(2) * b.mu[k])), before = u3;
        descend_to_third<T, STEPS>(b.y1[k], b.y2[k], b.mu[k], u3, before);
        b.u3[k] = u3;
        b.settled[k] = third_settled(u3, before);
    }
    for (int k = 0; k < count; ++k) {
        T before = T(0);
        for (int more = 0; more < 30 && !b.settled[k]; ++more) {
            descend_to_third<T, 1>(b.y1[k], b.y2[k], b.mu[k], b.u3[k], before);
            b.settled[k] = third_settled(b.u3[k], before);
        }
    }
    for (int k = 0; k < count; ++k) {
        const T y3 = b.y3[k], mu = b.mu[k], u3 = b.u3[k];
        T u1, u2, inverse;
        two_largest(b.y1[k], mu, u3, u1, u2, inverse);
        const Flag<T> wins =
            (b.open[k] != 0) & (b.settled[k] != 0) & (u3 > T(0)) & (mu * mu * (u1 * u1 + u2 * u2) < T(1));
        const T push = mu * (u3 * (u1 + u2) + u1 * u2);
        const Flag<T> leaves =
            (y3 > push) | ((y3 >= T(THREE_IS_SAFE_BELOW) * push) &
                           !four_is_convex(mu * (u1 + u2), mu * u3, mu * (u1 - u2), mu * u3));
        const T d0 = mu * u2 * u3, d1 = mu * u1 * u3, d2 = mu * u1 * u2;
        b.d[0][k] = d0;
        b.d[1][k] = d1;
        b.d[2][k] = d2;
        b.d[3][k] = y3;
        b.three[k] = T(0.5) * (d0 * d0 + d1 * d1 + d2 * d2 + y3 * y3) + u3 * d2;
        b.forced[k] = y3 - push;  // positive where three non-zeros cannot be optimal
        b.wins[k] = wins;
        b.four[k] = wins & leaves & Flag<T>(y3 > T(0));
    }
    int dense = 0;
    for (int k = 0; k < count; ++k) {
        b.dense[dense] = k;
        dense += static_cast<int>(b.four[k]);
    }
    for (int j = 0; j < dense; ++j) {
        const int k = b.dense[j];
        b.x1[j] = b.y1[k];
        b.x2[j] = b.y2[k];
        b.x3[j] = b.y3[k];
        b.xmu[j] = b.mu[k];
    }
    return dense;
}

template <typename T>
inline void store_candidate(int j, const Four<T>& f, Block<T>& b) {
    const Candidate<T> c = polish_four(b.x1[j], b.x2[j], b.x3[j], b.xmu[j], f);
    b.c[0][j] = c.d0;
    b.c[1][j] = c.d1;
    b.c[2][j] = c.d2;
    b.c[3][j] = c.d3;
    b.objective[j] = c.objective;
    b.found[j] = four_settled(f) & c.positive;
}

// Look for the candidate without zeros in a fixed number of steps, all groups side by side.
template <typename T>
void attempt_four(int dense, Block<T>& b) {
    for (int j = 0; j < dense; ++j) {
        Four<T> f = start_of_four(b.x1[j], b.x2[j], b.x3[j], b.xmu[j], START[0][0], START[0][1]);
        descend_on_four<T, STEPS>(b.x1[j], b.x2[j], b.x3[j], b.xmu[j], f);
        store_candidate(j, f, b);
    }
}

// Look again for the groups that were not served, one by one: stopping once settled keeps rounding errors out of the
// worst conditioned.
template <typename T>
void retry_four(int dense, int start, Block<T>& b) {
    for (int j = 0; j < dense; ++j) {
        Four<T> f = start_of_four(b.x1[j], b.x2[j], b.x3[j], b.xmu[j], START[start][0], START[start][1]);
        for (int step = 0; step < MORE_STEPS; ++step) {
            descend_on_four<T, 1>(b.x1[j], b.x2[j], b.x3[j], b.xmu[j], f);
            if (four_settled(f)) break;
        }
        store_candidate(j, f, b);
    }
}

// Keep the candidates that were found and win; return how many groups are left, packed at the front.
template <typename T>
int keep_found(int dense, Block<T>& b) {
    int left = 0;
    for (int j = 0; j < dense; ++j) {
        const int k = b.dense[j];
        b.four[k] = b.found[j] & Flag<T>((b.objective[j] < b.three[k]) | (b.forced[k] > T(0)));
        if (b.four[k])
            for (int i = 0; i < 4; ++i) b.d[i][k] = b.c[i][j];
        if (!b.found[j]) {
            b.dense[left] = k;
            b.x1[left] = b.x1[j];
            b.x2[left] = b.x2[j];
            b.x3[left] = b.x3[j];
            b.xmu[left] = b.xmu[j];
            ++left;
        }
    }
    return left;
}

template <typename T>
void solve_four(int dense, Block<T>& b) {
    attempt_four(dense, b);
    dense = keep_found(dense, b);
    for (int start = 0; start < STARTS && dense > 0; ++start) {
        retry_four(dense, start, b);
        dense = keep_found(dense, b);
    }
}

// Write the solution of the packed groups back, and the two largest of everybody else.
template <typename T>
void settle(int n, int count, Block<T>& b) {
    for (int k = 0; k < count; ++k) {
        const T top = b.t[0][k], wins = T(b.wins[k]), four = T(b.four[k]);
        b.t[1][k] = wins ? std::max(b.t[1][k] - top * b.d[1][k], T(0)) : b.t[1][k];
        b.t[2][k] = wins ? std::max(b.t[2][k] - top * b.d[2][k], T(0)) : T(0);
        b.t[3][k] = four ? std::max(b.t[3][k] - top * b.d[3][k], T(0)) : T(0);
        b.t[0][k] = wins ? std::max(top - top * b.d[0][k], T(0)) : top;
    }
    if (count == n) {
        std::memcpy(b.w, b.t, sizeof(b.w));
        return;
    }
    std::memset(b.w[2], 0, 2 * sizeof(b.w[2]));
    for (int k = 0; k < count; ++k)
        for (int i = 0; i < 4; ++i) b.w[i][b.at[k]] = b.t[i][k];
}

// Give each entry the solution of its rank; equal magnitudes rank by index.
template <typename T>
void unsort(const T* __restrict z, T* __restrict out, int n, const Block<T>& b) {
    for (int g = 0; g < n; ++g) {
        const T w0 = b.w[0][g], w1 = b.w[1][g], w2 = b.w[2][g], w3 = b.w[3][g];
        T a[4];
        for (int i = 0; i < 4; ++i) a[i] = std::abs(z[4 * g + i]);
        const T c01 = a[0] >= a[1] ? T(1) : T(0), c02 = a[0] >= a[2] ? T(1) : T(0), c03 = a[0] >= a[3] ? T(1) : T(0);
        const T c12 = a[1] >= a[2] ? T(1) : T(0), c13 = a[1] >= a[3] ? T(1) : T(0), c23 = a[2] >= a[3] ? T(1) : T(0);
        const T beaten[4] = {T(3) - c01 - c02 - c03, T(2) + c01 - c12 - c13, T(1) + c02 + c12 - c23, c03 + c13 + c23};
        for (int i = 0; i < 4; ++i) {
            const T rank = beaten[i];
            const T value = rank < T(2) ? (rank < T(1) ? w0 : w1) : (rank < T(3) ? w2 : w3);
            const T signed_value = std::copysign(value, z[4 * g + i]);
            out[4 * g + i] = value > T(0) ? signed_value : T(0);
        }
    }
}

template <typename T>
bool two_of_four(const T* z, T* out, std::size_t groups, double lam) {
    Block<T> block;
    const T strength = static_cast<T>(lam);
    for (std::size_t start = 0; start < groups; start += BLOCK) {
        const int n = static_cast<int>(std::min<std::size_t>(BLOCK, groups - start));
        if (!sort_block(z + 4 * start, n, strength, block)) return false;
        const int count = pack(n, strength, block);
        solve_four(solve_three(count, block), block);
        settle(n, count, block);
        unsort(z + 4 * start, out + 4 * start, n, block);
    }
    return true;
}

}  // namespace

bool two_of_four_f32(const float* z, float* out, std::size_t groups, double lam) {
    return two_of_four(z, out, groups, lam);
}

bool two_of_four_f64(const double* z, double* out, std::size_t groups, double lam) {
    return two_of_four(z, out, groups, lam);
}

}  // namespace halve::HALVE_ISA
