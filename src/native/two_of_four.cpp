// Compiled once for each instruction set, HALVE_ISA naming it. A vector holds one entry of as many groups as it has
// lanes; every candidate is computed for all of them and masks choose. Where few lanes need the next stage, their groups
// wait in a `Queue` until they fill a vector of their own, and so do, in `Late`, those that few Newton steps do not settle.
//
// What a group becomes depends on that group alone, never on its neighbours or on its place.
#include "two_of_four.hpp"

#include <cmath>
#include <cstring>
#include <limits>

#include "simd.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr double SPARSE_FROM = 1.2072;  // from here on no minimiser has a third non-zero: (1 + sqrt 2) / 2
constexpr double THREE_IS_SAFE_BELOW = 0.92;  // share of the fourth entry's slope
constexpr int STARTS = 3;
constexpr double START[STARTS][2] = {{0.45, 0.9}, {0.3, 1.0}, {0.6, 1.2}};
constexpr int FEW_OF_16 = 10;  // so many lanes of a vector in use are better moved to another
constexpr int STEPS_ON_THREE = 1, MORE_STEPS_ON_THREE = 32;
constexpr int STEPS_ON_FOUR = 2, MORE_STEPS_ON_FOUR = 2, LATE_STEPS = 16;

template <typename T>
constexpr T NEWTON_TOLERANCE = sizeof(T) == 8 ? T(1e-6) : T(1e-3);

// A step may come out small far from any stationary point, in one group of 100 000 where few settle at once.
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

template <typename V>
inline V load(const void* from) {
    V vector;
    std::memcpy(&vector, from, sizeof(V));
    return vector;
}

// Groups of one vector that must wait, and what `Late` needs to know of them.
template <typename T>
struct Open {
    typename Simd<T>::Mask mask = {};
    Group<typename Simd<T>::Real> group;
    typename Simd<T>::Real three, forced;
};

// What is known of the groups of one vector, between the stages of `solve_vector`.
template <typename T>
struct Work {
    using V = typename Simd<T>::Real;
    using M = typename Simd<T>::Mask;

    V z[4];  // one vector a position
    V w[4];  // magnitudes in decreasing order, in the end the solution's
    M swapped[6];  // by the sorting network
    M undecided, wins, keeps_four;
    M sure;  // of those undecided: to keep four
    V top;
    Open<T> open;  // its mask: first the groups that may keep four, in the end those not found
    Candidate<V> c;
};

// Where `transpose` takes a lane from: its place in memory, in groups.
template <typename T>
inline int place(int lane) {
    return lane % 4 * (Simd<T>::LANES / 4) + lane / 4;
}

// Where the groups of a vector will be written: one after the other from `start`, or each at its own address.
template <typename T>
struct Homes {
    T* start;
    T* const* each;

    T* operator()(int group) const { return each ? each[group] : start + 4 * group; }
};

// Groups whose candidate without zeros was not found at the first attempt. They have been written as if there were
// none; where the later attempts find one that wins, the group is written again.
template <typename T>
struct Late {
    static constexpr int LANES = Simd<T>::LANES;
    using V = typename Simd<T>::Real;
    using M = typename Simd<T>::Mask;

    alignas(64) T y1[LANES], y2[LANES], y3[LANES], mu[LANES], three[LANES];
    alignas(64) T forced[LANES];  // positive where three non-zeros cannot be optimal
    T z[LANES][4];
    T* out[LANES];
    int count = 0;

    // Take the open groups of one vector, which were stored at `homes`.
    void add_all(const Work<T>& k, const Homes<T>& homes) {
        for (int lane = 0; lane < LANES; ++lane) {
            if (!k.open.mask[lane]) continue;
            if (count == LANES) flush();
            y1[count] = k.open.group.y1[lane];
            y2[count] = k.open.group.y2[lane];
            y3[count] = k.open.group.y3[lane];
            mu[count] = k.open.group.mu[lane];
            three[count] = k.open.three[lane];
            forced[count] = k.open.forced[lane];
            for (int i = 0; i < 4; ++i) z[count][i] = k.z[i][lane];
            out[count] = homes(place<T>(lane));
            ++count;
        }
    }

    void flush() {
        if (count == 0) return;
        for (int k = count; k < LANES; ++k) {  // harmless stand-ins
            y1[k] = y2[k] = y3[k] = T(1);
            mu[k] = T(0.01);
        }
        const Group<V> g{load<V>(y1), load<V>(y2), load<V>(y3), load<V>(mu)};
        const V lowest = load<V>(three);
        const M must = load<V>(forced) > 0;
        M waiting = M{} - 1;
        for (int start = 0; start < STARTS && any(waiting); ++start) {
            Four<V> f = start_of_four<T>(g, START[start]);
            step_on_four<T>(g, f);
            const M settled = settle_on_four<T>(g, waiting, f, LATE_STEPS - 1);
            M minimum;
            const Candidate<V> c = polish_four<T>(g, f, minimum);
            const M found = waiting & settled & minimum;
            const M wins = found & ((c.objective < lowest) | must);
            for (int k = 0; k < count; ++k)
                if (wins[k]) write(k, c);
            waiting &= ~found;
        }
        count = 0;
    }

    void write(int k, const Candidate<V>& c) const {
        const T corrections[4] = {c.d0[k], c.d1[k], c.d2[k], c.d3[k]};
        T top = T(0);
        for (const T entry : z[k]) top = std::fabs(entry) > top ? std::fabs(entry) : top;
        for (int i = 0; i < 4; ++i) {
            int rank = 0;
            const T magnitude = std::fabs(z[k][i]);
            for (int j = 0; j < 4; ++j) {
                const T other = std::fabs(z[k][j]);
                rank += other > magnitude || (other == magnitude && j < i);
            }
            const T value = magnitude - top * corrections[rank];
            out[k][i] = value > T(0) ? std::copysign(value, z[k][i]) : T(0);
        }
    }
};

// Neighbours alone change places, so that equal magnitudes keep their order.
constexpr int NETWORK[6] = {0, 2, 1, 0, 2, 1};

// Load and sort; mark in `spoiled` what is not finite. Returns whether some groups may keep more than two.
template <typename T, typename M = typename Simd<T>::Mask>
inline bool prepare(const T* z, T lam, Work<T>& k, M& spoiled) {
    using V = typename Simd<T>::Real;
    V p[4], w[4];
    for (int i = 0; i < 4; ++i) p[i] = load<V>(z + i * Simd<T>::LANES);
    transpose<T>(p[0], p[1], p[2], p[3]);
    for (int i = 0; i < 4; ++i) w[i] = (V)((M)p[i] & ~Simd<T>::SIGN);
    spoiled |= ~((w[0] - w[0]) + (w[1] - w[1]) + (w[2] - w[2]) + (w[3] - w[3]) == 0);  // infinity - infinity is NaN
    for (int n = 0; n < 6; ++n) {
        V &first = w[NETWORK[n]], &second = w[NETWORK[n] + 1];
        k.swapped[n] = first < second;
        const V high = larger(first, second);
        second = smaller(first, second);
        first = high;
    }
    const M undecided = (w[0] * lam < T(SPARSE_FROM)) & (w[2] > 0);
    const bool some = any(undecided);
    k.undecided = undecided;
    k.open.mask = M{};
    for (int i = 0; i < 4; ++i) {
        k.z[i] = p[i];
        k.w[i] = i < 2 || some ? w[i] : V{};
    }
    return some;
}

template <typename T>
inline void normalise(T lam, Work<T>& k) {
    using V = typename Simd<T>::Real;
    const V one = V{} + T(1), zero = {};
    const auto undecided = k.undecided;
    Group<V>& g = k.open.group;
    k.top = undecided ? k.w[0] : one;  // the others are solved for a stand-in
    g.mu = undecided ? k.top * lam : one;
    g.y1 = undecided ? k.w[1] / k.top : one;
    g.y2 = undecided ? k.w[2] / k.top : one;
    g.y3 = undecided ? k.w[3] / k.top : zero;
}

// Find the candidate with three non-zeros. Returns whether some groups may keep four.
template <typename T>
inline bool solve_three(T lam, Work<T>& k) {
    using V = typename Simd<T>::Real;
    using M = typename Simd<T>::Mask;
    normalise(lam, k);
    const V zero = {};
    const M doubtful = k.undecided & ~k.sure;
    const Group<V> g = k.open.group;

    V u3, u1, u2, inverse;
    const M settled = descend_to_third<T>(g, doubtful, u3);
    two_largest(g.y1, g.mu, u3, u1, u2, inverse);
    const V mu = g.mu, y3 = g.y3;
    const M wins = doubtful & settled & (u3 > 0) & (mu * mu * (u1 * u1 + u2 * u2) < 1);
    const V push = mu * (u3 * (u1 + u2) + u1 * u2), forced = y3 - push;
    const M close = wins & (y3 >= T(THREE_IS_SAFE_BELOW) * push) & (y3 > 0);
    const M leaves = close & ((forced > 0) | ~four_is_convex(mu * (u1 + u2), mu * u3, mu * (u1 - u2), mu * u3));
    const Candidate<V> c{mu * u2 * u3, mu * u1 * u3, mu * u1 * u2, zero, zero};
    k.c = c;
    k.wins = wins;
    k.keeps_four = M{};
    k.open.three =
        T(0.5) * (c.d0 * c.d0 + c.d1 * c.d1 + c.d2 * c.d2 + y3 * y3) + u3 * c.d2;
    k.open.forced = k.sure ? V{} + T(1) : forced;
    k.open.mask = leaves | k.sure;
    return any(k.open.mask);
}

// Choose between three and four non-zeros. Returns whether the choice is open for some groups.
template <typename T>
__attribute__((noinline)) bool choose_four(Work<T>& k) {
    typename Simd<T>::Mask minimum;
    auto f = start_of_four<T>(k.open.group, START[0]);
    for (int step = 0; step < STEPS_ON_FOUR; ++step) step_on_four<T>(k.open.group, f);
    const auto settled = settle_on_four<T>(k.open.group, k.open.mask, f, MORE_STEPS_ON_FOUR);
    const auto four = polish_four<T>(k.open.group, f, minimum);
    const auto found = k.open.mask & settled & minimum;
    const auto keeps = found & ((four.objective < k.open.three) | (k.open.forced > 0));
    k.c.d0 = keeps ? four.d0 : k.c.d0;
    k.c.d1 = keeps ? four.d1 : k.c.d1;
    k.c.d2 = keeps ? four.d2 : k.c.d2;
    k.c.d3 = four.d3;
    k.keeps_four = keeps;
    k.wins |= keeps;
    k.open.mask &= ~found;
    return any(k.open.mask);
}

template <typename T>
inline void apply(Work<T>& k) {
    using V = typename Simd<T>::Real;
    const V zero = {};
    k.w[0] = k.wins ? larger(k.w[0] - k.top * k.c.d0, zero) : k.w[0];
    k.w[1] = k.wins ? larger(k.w[1] - k.top * k.c.d1, zero) : k.w[1];
    k.w[2] = k.wins ? larger(k.w[2] - k.top * k.c.d2, zero) : zero;
    k.w[3] = k.keeps_four ? larger(k.w[3] - k.top * k.c.d3, zero) : zero;
}

// Undo the sorting and store with the signs of z.
template <typename T>
inline void finish(const Work<T>& k, T* out) {
    using V = typename Simd<T>::Real;
    using M = typename Simd<T>::Mask;
    V w[4];
    for (int i = 0; i < 4; ++i) w[i] = k.w[i];
    for (int n = 5; n >= 0; --n) {
        V &first = w[NETWORK[n]], &second = w[NETWORK[n] + 1];
        const V back = k.swapped[n] ? second : first;
        second = k.swapped[n] ? first : second;
        first = back;
    }
    for (int i = 0; i < 4; ++i) w[i] = w[i] > 0 ? (V)((M)w[i] | ((M)k.z[i] & Simd<T>::SIGN)) : V{};
    transpose<T>(w[0], w[1], w[2], w[3]);
    for (int i = 0; i < 4; ++i) std::memcpy(out + i * Simd<T>::LANES, &w[i], sizeof(V));
}

// Write one vector of groups to their homes.
template <typename T>
inline void write(const Work<T>& k, const Homes<T>& homes, unsigned lanes) {
    if (!homes.each) {
        finish(k, homes.start);
        return;
    }
    alignas(64) T solved[4 * Simd<T>::LANES];
    finish(k, solved);
    for (; lanes; lanes &= lanes - 1) {
        const int at = place<T>(__builtin_ctz(lanes));
        std::memcpy(homes.each[at], solved + 4 * at, 4 * sizeof(T));
    }
}

// Groups copied out of vectors in which few need the next stage, until they fill a vector of their own.
template <typename T>
struct Queue {
    static constexpr int LANES = Simd<T>::LANES;

    alignas(64) T z[4 * LANES];
    alignas(64) T three[LANES], forced[LANES];  // by lane, of the groups that may keep four
    T* out[LANES];
    T nowhere[4];
    int count = 0;

    static int lane(int place) { return place % (LANES / 4) * 4 + place / (LANES / 4); }

    void add(const T* from, T* home) {
        std::memcpy(z + 4 * count, from, 4 * sizeof(T));
        out[count++] = home;
    }

    void pad() {
        for (; count < LANES; ++count) {
            for (int i = 0; i < 4; ++i) z[4 * count + i] = T(0);
            three[lane(count)] = forced[lane(count)] = T(0);
            out[count] = nowhere;
        }
    }
};

// Solves one vector after the other; what waits for company is written by `flush` at the latest.
template <typename T>
struct Solver {
    static constexpr int LANES = Simd<T>::LANES;
    static constexpr unsigned ALL = (1u << LANES) - 1;
    using V = typename Simd<T>::Real;
    using M = typename Simd<T>::Mask;

    T lam;
    M spoiled = {};
    Queue<T> denser, fours;
    Late<T> late;

    static bool few(unsigned lanes) { return 16 * __builtin_popcount(lanes) <= FEW_OF_16 * LANES; }

    void vector(const T* z, const Homes<T>& homes) {
        Work<T> k;
        if (prepare(z, lam, k, spoiled))
            solve_undecided(k, z, homes);
        else
            write(k, homes, ALL);
    }

    // Not inlined, like `choose_four`: a second copy might be compiled to round differently.
    __attribute__((noinline)) void solve_undecided(Work<T>& k, const T* z, const Homes<T>& homes) {
        // Since u <= y, these leave face 3 wherever its point is, and it exists and beats two non-zeros.
        k.sure = k.undecided & (k.w[3] > lam * (k.w[0] * (k.w[1] + k.w[2]) + k.w[1] * k.w[2]));
        unsigned sure = bits(k.sure), others = bits(k.undecided) & ~sure;
        if (!few(sure)) {
            k.undecided = k.open.mask = k.sure;
            k.open.three = V{};
            k.open.forced = V{} + T(1);
            solve_fours(k, homes, ALL);
            sure = 0;
        } else if (!few(sure | others)) {
            solve_denser(k, z, homes);
            return;
        } else {
            k.w[2] = k.w[3] = V{};
            write(k, homes, ALL);
        }
        for (; others; others &= others - 1) {
            const int at = place<T>(__builtin_ctz(others));
            denser.add(z + 4 * at, homes(at));
            if (denser.count == LANES) flush_denser();
        }
        for (; sure; sure &= sure - 1) {
            const int at = place<T>(__builtin_ctz(sure));
            add_four(z + 4 * at, homes(at), T(0), T(1));
        }
    }

    void add_four(const T* z, T* home, T three, T forced) {
        const int lane = fours.lane(fours.count);
        fours.three[lane] = three;
        fours.forced[lane] = forced;
        fours.add(z, home);
        if (fours.count == LANES) flush_fours();
    }

    // Solve the groups of k.open.mask on face 4 alone, and write `lanes` or, where none are given, those that keep four.
    void solve_fours(Work<T>& k, const Homes<T>& homes, unsigned lanes) {
        normalise(lam, k);
        k.c = Candidate<V>{};
        k.wins = M{};
        const bool open = choose_four(k);
        apply(k);
        write(k, homes, lanes ? lanes : bits(k.keeps_four));
        if (open) late.add_all(k, homes);
    }

    __attribute__((noinline)) void solve_denser(Work<T>& k, const T* z, const Homes<T>& homes) {
        unsigned leaves = 0;
        bool open = false;
        if (solve_three(lam, k)) {
            leaves = bits(k.open.mask);
            if (!few(leaves)) {
                open = choose_four(k);
                leaves = 0;
            }
        }
        apply(k);
        write(k, homes, ALL);
        if (open) late.add_all(k, homes);
        for (; leaves; leaves &= leaves - 1) {
            const int lane = __builtin_ctz(leaves), at = place<T>(lane);
            add_four(z + 4 * at, homes(at), k.open.three[lane], k.open.forced[lane]);
        }
    }

    void flush_denser() {
        Work<T> k;
        denser.pad();
        prepare(denser.z, lam, k, spoiled);
        k.sure = M{};
        solve_denser(k, denser.z, {nullptr, denser.out});
        denser.count = 0;
    }

    void flush_fours() {
        Work<T> k;
        fours.pad();
        prepare(fours.z, lam, k, spoiled);
        k.open.three = load<V>(fours.three);
        k.open.forced = load<V>(fours.forced);
        k.open.mask = k.undecided;
        solve_fours(k, {nullptr, fours.out}, 0);
        fours.count = 0;
    }

    void flush() {
        if (denser.count) flush_denser();
        if (fours.count) flush_fours();
        late.flush();
    }
};

template <typename T>
bool two_of_four(const T* z, T* out, std::size_t groups, double lam) {
    constexpr std::size_t LANES = Simd<T>::LANES;
    Solver<T> solver{static_cast<T>(lam)};
    std::size_t start = 0;
    for (; start + LANES <= groups; start += LANES) solver.vector(z + 4 * start, {out + 4 * start, nullptr});
    Queue<T> rest;
    for (; start < groups; ++start) rest.add(z + 4 * start, out + 4 * start);
    if (rest.count) {
        rest.pad();
        solver.vector(rest.z, {nullptr, rest.out});
    }
    solver.flush();
    return !any(solver.spoiled);
}

}  // namespace

bool two_of_four_f32(const float* z, float* out, std::size_t groups, double lam) {
    return two_of_four(z, out, groups, lam);
}

bool two_of_four_f64(const double* z, double* out, std::size_t groups, double lam) {
    return two_of_four(z, out, groups, lam);
}

}  // namespace halve::HALVE_ISA
