// AVX-512 with VBMI2 and VNNI: a word of 64 columns is one register. A weight that is not kept becomes the number that
// stands for 0, and what that adds, Σ zero · x, is taken off where the sum begins.
#pragma once

#include <immintrin.h>

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int ROWS_FOR_ONE = 4, ROWS_FOR_MORE = 4;  // rows of W at a time, for one row of x and for several

struct alignas(64) Input {
    std::int8_t q[WORD];
    std::int32_t start[16];  // -zero · (sum of the four columns)
    float scale[16];

    void put(const std::int8_t* from, const float* scales, int bits) {
        const int zero = bits == 4 ? ZERO_OF_FOUR_BITS : ZERO_OF_EIGHT_BITS;
        std::memcpy(q, from, WORD);
        for (int i = 0; i < 16; ++i) {
            start[i] = -zero * (from[4 * i] + from[4 * i + 1] + from[4 * i + 2] + from[4 * i + 3]);
            scale[i] = scales[i / 8];
        }
    }
};

using Sum = __m512;
using Weights = __m512i;

// A load that compilers must not make part of an expansion, which is slow on some processors.
inline __m512i load_whole(const std::uint8_t* from) {
    __m512i loaded = _mm512_loadu_si512(from);
    asm("" : "+v"(loaded));
    return loaded;
}

inline __mmask64 mask_of(const std::uint8_t* mask) {
    std::uint64_t bits;
    std::memcpy(&bits, mask, sizeof(bits));
    return __mmask64(bits);
}

// The integers of a word without a sign, one a byte in the order of the codes.
template <int BITS>
inline __m512i unsigned_codes(const std::uint8_t* codes) {
    if constexpr (BITS == 8) return load_whole(codes);
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    return _mm512_ternarylogic_epi32(bytes, _mm512_slli_epi16(bytes, 4), _mm512_set1_epi8(0x0f), 0xa8);  // (a | b) & c
}

template <int BITS, Form FORM>
inline Weights expand(const std::uint8_t* codes, const std::uint8_t* mask) {
    __m512i found = unsigned_codes<BITS>(codes);
    if constexpr (BITS == 8) {
        if constexpr (FORM != Form::dense) found = _mm512_maskz_expand_epi8(mask_of(mask), found);
        return _mm512_xor_si512(found, _mm512_set1_epi8(char(ZERO_OF_EIGHT_BITS)));
    }
    if constexpr (FORM == Form::dense) return found;
    return _mm512_mask_expand_epi8(_mm512_set1_epi8(ZERO_OF_FOUR_BITS), mask_of(mask), found);
}

template <int BITS>
inline void add(Sum& sum, const Weights& weights, const Input& x, float scale) {
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_load_si512(x.start), weights, _mm512_load_si512(x.q));
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_load_ps(x.scale));
    sum = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scale), sum);
}

inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

inline void widen_scales(const std::uint16_t* from, float* to) {
    _mm512_store_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

template <int BITS, Form FORM>
inline void place(const std::uint8_t* codes, const std::uint8_t* mask, std::int8_t* out) {
    const int zero = BITS == 4 ? ZERO_OF_FOUR_BITS : ZERO_OF_EIGHT_BITS;
    _mm512_storeu_si512(out, _mm512_sub_epi8(expand<BITS, FORM>(codes, mask), _mm512_set1_epi8(char(zero))));
}

}  // namespace
}  // namespace halve::HALVE_ISA
