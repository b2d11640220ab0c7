// Plain C++.
#pragma once

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

struct Straight {
    static constexpr std::size_t STRIPS = 1;
    static constexpr int ROWS_FOR_ONE = 1;
    std::int8_t q[STRIP];
    float scale[BLOCKS];

    void put(const std::int8_t* from, const float* scales, int, std::size_t) {
        std::memcpy(q, from, STRIP);
        std::memcpy(scale, scales, sizeof(scale));
    }
};

using Gathered = Straight;
using Sum = float;

template <int>
struct Kept {
    std::int8_t weights[KEPT];
    std::uint8_t columns[KEPT];
};

template <int BITS>
inline Kept<BITS> load_kept(const std::uint8_t* codes, const std::uint8_t* places) {
    Kept<BITS> kept;
    for (std::size_t i = 0; i < KEPT; ++i) {
        kept.weights[i] = std::int8_t(integer(codes, BITS, i, KEPT));
        kept.columns[i] = std::uint8_t(column_of(places, i));
    }
    return kept;
}

template <int BITS>
inline void add(Sum& sum, const Kept<BITS>& kept, const Gathered& x, const float* scales) {
    for (std::size_t block = 0; block < BLOCKS; ++block) {
        std::int32_t dot = 0;
        for (std::size_t i = 16 * block; i < 16 * block + 16; ++i) dot += kept.weights[i] * x.q[kept.columns[i]];
        sum += float(dot) * x.scale[block] * scales[block / 2];
    }
}

template <int>
struct Dense {
    std::int8_t weights[STRIP];
};

template <int BITS>
inline Dense<BITS> load_dense(const std::uint8_t* codes) {
    Dense<BITS> found;
    for (std::size_t i = 0; i < STRIP; ++i)
        found.weights[i] = std::int8_t(integer(codes + i / WORD * 8 * BITS, BITS, i % WORD, WORD));
    return found;
}

template <int BITS>
inline void add(Sum& sum, const Dense<BITS>& weights, const Straight& x, const float* scales) {
    for (std::size_t block = 0; block < BLOCKS; ++block) {
        std::int32_t dot = 0;
        for (std::size_t i = X_BLOCK * block; i < X_BLOCK * (block + 1); ++i) dot += weights.weights[i] * x.q[i];
        sum += float(dot) * x.scale[block] * scales[block / 2];
    }
}

inline float total(Sum sum) { return sum; }

inline void widen_scales(const std::uint16_t* from, float* to) {
    for (std::size_t i = 0; i < SCALES; ++i) to[i] = Number<Values::fp16>::widen(from[i]);
}

}  // namespace
}  // namespace halve::HALVE_ISA
