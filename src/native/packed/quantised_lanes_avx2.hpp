// AVX2, with AVX-VNNI where the compiler is told of it: half a word of 32 columns is one register, its kept weights moved
// into place eight columns at a time by a shuffle whose table the byte of mask chooses.
//
// Without VNNI a product of 8 by 8 bits is added to its neighbour in 16 bits, where the largest without a sign would not
// fit: weights of 8 bits give their sign to x. Those of 4 bits fit as they are.
#pragma once

#include <immintrin.h>

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

#ifdef __AVXVNNI__
constexpr bool VNNI = true;
#else
constexpr bool VNNI = false;
#endif
constexpr int ROWS_FOR_ONE = 2, ROWS_FOR_MORE = 2;  // rows of W at a time, for one row of x and for several
constexpr int HALF = COLUMNS_OF_BYTE / 2;
constexpr std::uint8_t ABSENT = 0x80;  // makes a byte shuffle write zero

template <int BITS>
constexpr bool SIGNED = BITS == 8 && !VNNI;

struct alignas(32) Input {
    std::int8_t q[WORD];
    std::int32_t start[2][8];  // -zero · (sum of the four columns); 0 where weights keep their sign
    float scale[8];            // of which two are used

    void put(const std::int8_t* from, const float* scales, int bits) {
        const int zero = bits == 4 ? ZERO_OF_FOUR_BITS : VNNI ? ZERO_OF_EIGHT_BITS : 0;
        std::memcpy(q, from, WORD);
        for (int i = 0; i < 16; ++i)
            start[i / 8][i % 8] = -zero * (from[4 * i] + from[4 * i + 1] + from[4 * i + 2] + from[4 * i + 3]);
        for (int i = 0; i < 8; ++i) scale[i] = scales[i % 2];
    }
};

using Sum = __m256;

struct Weights {
    __m256i half[2];
};

struct Shuffles {
    // For each byte of mask where the kept values come from that begin at value 4 · i; and at value 0, as 8 bytes.
    alignas(64) std::uint8_t from[4][256][COLUMNS_OF_BYTE];
};

constexpr Shuffles make_shuffles() {
    Shuffles s{};
    for (int i = 0; i < 4; ++i)
        for (int byte = 0; byte < 256; ++byte)
            for (int column = 0; column < COLUMNS_OF_BYTE; ++column) {
                const int place = place_of(byte, column);
                s.from[i][byte][column] = place < 0 || i * HALF + place > 15 ? ABSENT : std::uint8_t(i * HALF + place);
            }
    return s;
}

constexpr Shuffles SHUFFLES = make_shuffles();

inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline __m128i load_64(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }

// 32 codes as signed bytes, in their order.
template <int BITS>
inline __m256i signed_codes(const std::uint8_t* codes) {
    if constexpr (BITS == 8) return load_256(codes);
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i found =
        _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(0x0f));
    return _mm256_sub_epi8(found, _mm256_set1_epi8(ZERO_OF_FOUR_BITS));
}

inline __m128i two_bytes(int which, std::uint32_t bits) {
    return _mm_unpacklo_epi64(load_64(SHUFFLES.from[which][bits & 255]), load_64(SHUFFLES.from[which + 1][bits >> 8 & 255]));
}

// Half a word whose 16 kept values are in both halves of `values`.
inline __m256i place_half(__m256i values, std::uint32_t bits) {
    return _mm256_shuffle_epi8(values, _mm256_set_m128i(two_bytes(2, bits >> 16), two_bytes(0, bits)));
}

template <int BITS, Form FORM>
inline Weights expand_signed(const std::uint8_t* codes, const std::uint8_t* mask) {
    if constexpr (FORM == Form::dense) return {{signed_codes<BITS>(codes), signed_codes<BITS>(codes + 4 * BITS)}};
    std::uint64_t bits;
    std::memcpy(&bits, mask, sizeof(bits));
    if constexpr (FORM == Form::half) {
        const __m256i values = signed_codes<BITS>(codes);
        const __m256i first = _mm256_permute2x128_si256(values, values, 0x00);
        const __m256i second = _mm256_permute2x128_si256(values, values, 0x11);
        return {{place_half(first, std::uint32_t(bits)), place_half(second, std::uint32_t(bits >> 32))}};
    }
    alignas(32) std::int8_t values[2 * WORD], placed[WORD];  // a mask may have a bit for every column
    _mm256_store_si256(reinterpret_cast<__m256i*>(values), signed_codes<BITS>(codes));
    _mm256_store_si256(reinterpret_cast<__m256i*>(values + 32), signed_codes<BITS>(codes + 4 * BITS));
    const std::int8_t* next = values;
    for (int byte = 0; byte < 8; ++byte, bits >>= 8) {
        const __m128i eight = _mm_shuffle_epi8(load_64(next), load_64(SHUFFLES.from[0][bits & 255]));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(placed + 8 * byte), eight);
        next += __builtin_popcount(unsigned(bits & 255));
    }
    return {{load_256(placed), load_256(placed + 32)}};
}

template <int BITS, Form FORM>
inline Weights expand(const std::uint8_t* codes, const std::uint8_t* mask) {
    Weights found = expand_signed<BITS, FORM>(codes, mask);
    if constexpr (SIGNED<BITS>) return found;
    const __m256i zero = _mm256_set1_epi8(char(BITS == 4 ? ZERO_OF_FOUR_BITS : ZERO_OF_EIGHT_BITS));
    for (__m256i& half : found.half) half = _mm256_add_epi8(half, zero);
    return found;
}

template <int BITS>
inline __m256i dot(__m256i weights, __m256i x, __m256i start) {
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (SIGNED<BITS>)
        return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights)), ones);
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(start, weights, x);
#else
    return _mm256_add_epi32(start, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, x), ones));
#endif
}

template <int BITS>
inline void add(Sum& sum, const Weights& weights, const Input& x, float scale) {
    for (int half = 0; half < 2; ++half) {
        const __m256i found = dot<BITS>(weights.half[half], load_256(x.q + 32 * half), load_256(x.start[half]));
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(found), _mm256_broadcast_ss(x.scale + half));
        sum = _mm256_fmadd_ps(scaled, _mm256_set1_ps(scale), sum);
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

template <int BITS, Form FORM>
inline void place(const std::uint8_t* codes, const std::uint8_t* mask, std::int8_t* out) {
    const Weights found = expand_signed<BITS, FORM>(codes, mask);
    for (int half = 0; half < 2; ++half)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * half), found.half[half]);
}

}  // namespace
}  // namespace halve::HALVE_ISA
