// One number as it is stored, to and from float32; to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparse_linear.hpp"

namespace halve::HALVE_ISA {
namespace {

inline std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

template <Values V>
struct Number;

template <>
struct Number<Values::fp32> {
    using Stored = float;
    static float widen(float stored) { return stored; }
    static float narrow(float value) { return value; }
};

template <>
struct Number<Values::bf16> {
    using Stored = std::uint16_t;
    static float widen(std::uint16_t stored) { return as_float(std::uint32_t(stored) << 16); }
    static std::uint16_t narrow(float value) {
        const std::uint32_t bits = as_bits(value);
        if (value != value) return std::uint16_t(bits >> 16 | 0x40);  // rounding might carry a NaN to infinity
        return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

template <>
struct Number<Values::fp16> {
    using Stored = std::uint16_t;
    static float widen(std::uint16_t stored) {
        const std::uint32_t sign = std::uint32_t(stored & 0x8000) << 16, rest = std::uint32_t(stored & 0x7fff) << 13;
        if (rest >= 0x0f800000) return as_float(sign | 0x70000000 | rest);  // infinity and NaN
        return as_float(sign | as_bits(as_float(rest) * 0x1p112f));           // scaled exactly, subnormal ones too
    }
    static std::uint16_t narrow(float value) {
        const std::uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
        if (rest > 0x7f800000) return std::uint16_t(sign | 0x7e00);
        if (rest >= 0x477ff000) return std::uint16_t(sign | 0x7c00);  // rounds beyond 65504
        if (rest < 0x38800000)                                        // subnormal: the sum's last bit is half's
            return std::uint16_t(sign | (as_bits(as_float(rest) + 0.5f) - as_bits(0.5f)));
        return std::uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
    }
};

}  // namespace
}  // namespace halve::HALVE_ISA
