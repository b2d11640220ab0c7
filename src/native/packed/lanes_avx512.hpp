// AVX-512 with VBMI2 and BF16: the processor expands by a mask itself, and bfloat16 is multiplied in pairs as it is.
// Those products take subnormal bfloat16 numbers for zeros, and sums that are subnormal become zero.
#pragma once

#include <immintrin.h>

#include "lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int ROWS_FOR_ONE = 4, ROWS_FOR_MORE = 4;  // rows of W at a time, for one row of x and for several
constexpr int CHAINS_FOR_ONE = 1;                   // sums of an element, where x is one row
constexpr int UNROLLED = 4;                         // steps of a word

// Loads that compilers must not make part of an expansion: one straight from memory has to look at the mask for what
// it may touch, and is slow on some processors.
inline __m512i load_512(const void* from) {
    __m512i loaded = _mm512_loadu_si512(from);
    asm("" : "+v"(loaded));
    return loaded;
}

// Masks are read from memory 32 or 16 bits at a time; x86 has the lowest columns first.
inline __m512i expand_halves(const std::uint16_t* values, std::uint32_t bits) {
    return _mm512_maskz_expand_epi16(__mmask32(bits), load_512(values));
}

struct Half {
    using Stored = std::uint16_t;
    using Sum = __m512;
    using Bits = std::uint32_t;
    static constexpr int COLUMNS = 32;

    static int count(Bits bits) { return __builtin_popcount(bits); }

    static void place(const Stored* values, Bits bits, Stored* out) {
        _mm512_storeu_si512(out, expand_halves(values, bits));
    }

    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

template <>
struct Lanes<Values::bf16> : Half {
    using Input = std::uint16_t;
    using Weights = __m512i;

    static Weights expand(const Stored* values, Bits bits) { return expand_halves(values, bits); }

    static Weights load(const Stored* values) { return _mm512_loadu_si512(values); }

    static void add(Sum& sum, Weights weights, const Input* x) {
        sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_load_si512(x));
    }

    static Input input(Stored x) { return x; }
};

struct TwiceSixteen {
    __m512 low, high;
};

template <>
struct Lanes<Values::fp16> : Half {
    using Input = float;
    using Weights = TwiceSixteen;

    static Weights widen(__m512i halves) {
        return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
    }

    static Weights expand(const Stored* values, Bits bits) { return widen(expand_halves(values, bits)); }

    static Weights load(const Stored* values) { return widen(_mm512_loadu_si512(values)); }

    static void add(Sum& sum, const Weights& weights, const Input* x) {
        sum = _mm512_fmadd_ps(weights.low, _mm512_load_ps(x), sum);
        sum = _mm512_fmadd_ps(weights.high, _mm512_load_ps(x + 16), sum);
    }

    static Input input(Stored x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
};

template <>
struct Lanes<Values::fp32> {
    using Stored = float;
    using Input = float;
    using Weights = __m512;
    using Sum = __m512;
    using Bits = std::uint16_t;
    static constexpr int COLUMNS = 16;

    static int count(Bits bits) { return __builtin_popcount(bits); }

    static Weights expand(const Stored* values, Bits bits) {
        return _mm512_castsi512_ps(
            _mm512_maskz_expand_epi32(__mmask16(bits), load_512(values)));
    }

    static void place(const Stored* values, Bits bits, Stored* out) { _mm512_storeu_ps(out, expand(values, bits)); }

    static Weights load(const Stored* values) { return _mm512_loadu_ps(values); }

    static void add(Sum& sum, Weights weights, const Input* x) {
        sum = _mm512_fmadd_ps(weights, _mm512_load_ps(x), sum);
    }

    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

    static Input input(Stored x) { return x; }
};

}  // namespace
}  // namespace halve::HALVE_ISA
