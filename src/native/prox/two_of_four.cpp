// Compiled once for each instruction set, HALVE_ISA naming it. A vector holds one entry of as many groups as it has
// lanes; every candidate is computed for all of them and masks choose. Where few lanes need the next stage, their
// groups wait in a `Queue` until they fill a vector of their own, and so do, in `Late`, those that a fixed number of
// Newton steps does not settle.
//
// What a group becomes depends on that group alone, never on its neighbours or on its place.
#include "two_of_four.hpp"

#include <cmath>
#include <cstring>

#include "two_of_four_faces.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr double SPARSE_FROM = 1.2072;  // from here on no minimiser has a third non-zero: (1 + sqrt 2) / 2
constexpr double THREE_IS_SAFE_BELOW = 0.92;  // share of the fourth entry's slope
constexpr int FEW_OF_16 = 10;  // so many lanes of a vector in use are better moved to another

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

// What is known of the groups of one vector, between the stages.
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

    // Solve the groups of k.open.mask on face 4 alone, and write `lanes` or, given none, those that keep four.
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
