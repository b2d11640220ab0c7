// AVX-512 with VNNI: 64 weights are one register. They are multiplied without their sign, raised by the number that
// stands for 0, and what that adds, Σ zero · x, is taken off again.
#pragma once

#include <immintrin.h>

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int ROWS_FOR_ONE = 4, ROWS_FOR_MORE = 2;  // rows of W at a time, for one row of x and for several

inline __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }

using Gathered = ByLane;

// A strip of x in its order.
struct alignas(64) Straight {
    std::int8_t q[2][64];
    std::int32_t start[2][16];  // -zero · (sum of the four columns)
    float scale[2][16];

    void put(const std::int8_t* from, const float* scales, int bits) {
        const int zero = bits == 4 ? ZERO_OF_FOUR_BITS : 128;
        std::memcpy(q, from, STRIP);
        for (int i = 0; i < 32; ++i) {
            start[i / 16][i % 16] = -zero * (from[4 * i] + from[4 * i + 1] + from[4 * i + 2] + from[4 * i + 3]);
            scale[i / 16][i % 16] = scales[i / 8];
        }
    }
};

using Sum = __m512;

// How far the words of each of the four lanes are shifted, in bits.
inline __m512i by_lane(int first, int second, int third, int fourth) {
    const auto lane = [](int bits) { return std::int64_t(bits) * 0x0001000100010001; };
    return _mm512_set_epi64(lane(fourth), lane(fourth), lane(third), lane(third), lane(second), lane(second), lane(first),
                            lane(first));
}

// 64 integers without a sign, raised by what stands for 0.
template <int BITS>
inline __m512i raised(const std::uint8_t* codes) {
    if constexpr (BITS == 8) return _mm512_xor_si512(load_512(codes), _mm512_set1_epi8(char(128)));
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    return _mm512_and_si512(_mm512_srlv_epi16(twice, by_lane(0, 0, 4, 4)), _mm512_set1_epi8(0x0f));
}

struct Kept {
    __m512i weights, from;
};

template <int BITS>
inline Kept load_kept(const std::uint8_t* codes, const std::uint8_t* places) {
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
    const __m512i groups = _mm512_set1_epi64(0x0c0c080804040000);
    const __m512i two_bits = _mm512_set1_epi8(3), shifted = _mm512_srlv_epi16(four, by_lane(0, 2, 4, 6));
    return {raised<BITS>(codes), _mm512_ternarylogic_epi32(shifted, two_bits, groups, 0xea)};  // (a & b) | c
}

template <int BITS>
inline void add(Sum& sum, const Kept& kept, const Gathered& x, const float* scales) {
    const __m512i zero = _mm512_set1_epi8(BITS == 4 ? char(ZERO_OF_FOUR_BITS) : char(128));
    const __m512i first = _mm512_shuffle_epi8(_mm512_load_si512(x.q[0]), kept.from);
    const __m512i gathered =
        _mm512_mask_shuffle_epi8(first, 0xff00ff00ff00ff00, _mm512_load_si512(x.q[1]), kept.from);
    const __m512i raised_dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), kept.weights, gathered);
    const __m512i dot = _mm512_sub_epi32(raised_dot, _mm512_dpbusd_epi32(_mm512_setzero_si512(), zero, gathered));
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_load_ps(x.scale));
    const __m512 of_words = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
    sum = _mm512_fmadd_ps(scaled, of_words, sum);
}

struct Dense {
    __m512i words[2];
};

template <int BITS>
inline Dense load_dense(const std::uint8_t* codes) {
    return {{raised<BITS>(codes), raised<BITS>(codes + 8 * BITS)}};
}

template <int BITS>
inline void add(Sum& sum, const Dense& weights, const Straight& x, const float* scales) {
    for (int word = 0; word < 2; ++word) {
        const __m512i start = _mm512_load_si512(x.start[word]);
        const __m512i dot = _mm512_dpbusd_epi32(start, weights.words[word], _mm512_load_si512(x.q[word]));
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_load_ps(x.scale[word]));
        sum = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scales[word]), sum);
    }
}

inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

inline void widen_scales(const std::uint16_t* from, float* to) {
    _mm512_store_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

}  // namespace
}  // namespace halve::HALVE_ISA
