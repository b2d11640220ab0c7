// AVX2, with AVX-VNNI where the compiler is told of it: 32 weights are one register. The unsigned factor of a product of
// bytes is the weight's size; its sign goes to x.
#pragma once

#include <immintrin.h>

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// A strip of x whose numbers are gathered by shuffles of 16 bytes: lane l has the columns from 32 l, and in `q[1]` from
// 32 l + 16.
struct alignas(64) Gathered {
    static constexpr std::size_t STRIPS = 1;
    static constexpr int ROWS_FOR_ONE = 2;
    std::int8_t q[2][64];
    float scale[16];

    void put(const std::int8_t* from, const float* scales, int, std::size_t) {
        for (std::size_t column = 0; column < STRIP; ++column)
            q[column / 16 % 2][column / 32 * 16 + column % 16] = from[column];
        for (int i = 0; i < 16; ++i) scale[i] = scales[i / 4];
    }
};

// A strip of x in its order.
struct alignas(32) Straight {
    static constexpr std::size_t STRIPS = 1;
    static constexpr int ROWS_FOR_ONE = 2;
    std::int8_t q[STRIP];
    float scale[8];  // of which four are used

    void put(const std::int8_t* from, const float* scales, int, std::size_t) {
        std::memcpy(q, from, STRIP);
        for (int i = 0; i < 8; ++i) scale[i] = scales[i % 4];
    }
};

using Sum = __m256;

// 32 of 64 integers, the first or the second half of them.
template <int BITS>
inline __m256i integers(const std::uint8_t* codes, int half) {
    if constexpr (BITS == 8) return load_256(codes + 32 * half);
    const __m256i both = load_256(codes), shifted = half ? _mm256_srli_epi16(both, 4) : both;
    return _mm256_sub_epi8(_mm256_and_si256(shifted, _mm256_set1_epi8(0x0f)), _mm256_set1_epi8(ZERO_OF_FOUR_BITS));
}

inline __m256i dot(__m256i weights, __m256i x) {
    const __m256i sizes = _mm256_abs_epi8(weights), signed_x = _mm256_sign_epi8(x, weights);
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), sizes, signed_x);
#else
    return _mm256_madd_epi16(_mm256_maddubs_epi16(sizes, signed_x), _mm256_set1_epi16(1));
#endif
}

template <int>
struct Kept {
    __m256i weights[2], from[2];
};

template <int BITS>
inline Kept<BITS> load_kept(const std::uint8_t* codes, const std::uint8_t* places) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
    const __m256i groups = _mm256_set1_epi64x(0x0c0c080804040000), two_bits = _mm256_set1_epi8(3);
    Kept<BITS> kept;
    for (int half = 0; half < 2; ++half) {
        const __m256i bits = _mm256_set_epi64x(4 * half + 2, 4 * half + 2, 4 * half, 4 * half);
        kept.weights[half] = integers<BITS>(codes, half);
        kept.from[half] = _mm256_or_si256(_mm256_and_si256(_mm256_srlv_epi64(twice, bits), two_bits), groups);
    }
    return kept;
}

template <int BITS>
inline void add(Sum& sum, const Kept<BITS>& kept, const Gathered& x, const float* scales) {
    for (int half = 0; half < 2; ++half) {
        const __m256i first = _mm256_shuffle_epi8(load_256(x.q[0] + 32 * half), kept.from[half]);
        const __m256i second = _mm256_shuffle_epi8(load_256(x.q[1] + 32 * half), kept.from[half]);
        const __m256i found = dot(kept.weights[half], _mm256_blend_epi32(first, second, 0xcc));
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(found), _mm256_load_ps(x.scale + 8 * half));
        sum = _mm256_fmadd_ps(scaled, _mm256_set1_ps(scales[half]), sum);
    }
}

template <int>
struct Dense {
    __m256i parts[4];
};

template <int BITS>
inline Dense<BITS> load_dense(const std::uint8_t* codes) {
    Dense<BITS> found;
    for (int part = 0; part < 4; ++part) found.parts[part] = integers<BITS>(codes + part / 2 * 8 * BITS, part % 2);
    return found;
}

template <int BITS>
inline void add(Sum& sum, const Dense<BITS>& weights, const Straight& x, const float* scales) {
    for (int part = 0; part < 4; ++part) {
        const __m256i found = dot(weights.parts[part], load_256(x.q + 32 * part));
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(found), _mm256_broadcast_ss(x.scale + part));
        sum = _mm256_fmadd_ps(scaled, _mm256_set1_ps(scales[part / 2]), sum);
    }
}

inline float total(Sum sum) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline void widen_scales(const std::uint16_t* from, float* to) {
    for (int i = 0; i < int(SCALES); i += 8)
        _mm256_store_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
}

}  // namespace
}  // namespace halve::HALVE_ISA
