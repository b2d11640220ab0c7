// Plain C++.
#pragma once

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int ROWS_FOR_ONE = 1, ROWS_FOR_MORE = 1;  // rows of W at a time, for one row of x and for several

struct alignas(64) Input {
    std::int8_t q[WORD];
    float scale[2];

    void put(const std::int8_t* from, const float* scales, int) {
        std::memcpy(q, from, WORD);
        scale[0] = scales[0];
        scale[1] = scales[1];
    }
};

using Sum = float;

struct Weights {
    std::int8_t of[WORD];
};

template <int BITS, Form FORM>
inline void place(const std::uint8_t* codes, const std::uint8_t* mask, std::int8_t* out) {
    for (std::size_t column = 0, used = 0; column < WORD; ++column) {
        if (FORM != Form::dense && !(mask[column / 8] >> column % 8 & 1)) {
            out[column] = 0;
            continue;
        }
        if (BITS == 8)
            out[column] = std::int8_t(codes[used]);
        else
            out[column] = std::int8_t((codes[used / 2] >> 4 * (used % 2) & 15) - ZERO_OF_FOUR_BITS);
        ++used;
    }
}

template <int BITS, Form FORM>
inline Weights expand(const std::uint8_t* codes, const std::uint8_t* mask) {
    Weights found;
    place<BITS, FORM>(codes, mask, found.of);
    return found;
}

template <int BITS>
inline void add(Sum& sum, const Weights& weights, const Input& x, float scale) {
    for (std::size_t half = 0; half < 2; ++half) {
        std::int32_t dot = 0;
        for (std::size_t i = X_BLOCK * half; i < X_BLOCK * (half + 1); ++i) dot += weights.of[i] * x.q[i];
        sum += float(dot) * x.scale[half] * scale;
    }
}

inline float total(Sum sum) { return sum; }

inline void widen_scales(const std::uint16_t* from, float* to) {
    for (std::size_t i = 0; i < SCALES; ++i) to[i] = Number<Values::fp16>::widen(from[i]);
}

}  // namespace
}  // namespace halve::HALVE_ISA
