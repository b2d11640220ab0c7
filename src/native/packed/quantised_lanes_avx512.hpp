// AVX-512 with VNNI and VBMI: 64 numbers are one register. One factor of a product of bytes has no sign: with 4 bits the
// weights, raised by the number that stands for 0, with 8 the numbers of x, raised by 128 (dense: the weights, too). What
// that adds, Σ zero · x or Σ 128 · weight, is taken off again.
#pragma once

#include <immintrin.h>

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

inline __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }

using Sum = __m512;

// Four strips of x, whose numbers are gathered by shuffles of 128 bytes, one for each block: kept weight i of that block
// in strip s finds its four candidates where bits b and b + 1 of the index are its place and the five others, in order,
// i / 2 and s. `b` is where the places lie in their bytes, so that only those of the last block have to be moved.
// Of the one to three strips that a row has left over, each is by itself, in its order.
struct alignas(64) Gathered {
    static constexpr std::size_t STRIPS = 4;
    static constexpr int ROWS_FOR_ONE = 2;
    std::int8_t q[4][128];  // of a block, or of a strip
    float scale[4][16];

    static constexpr int first_bit(std::size_t block) { return block < 2 ? 2 * int(block) : 4; }

    static constexpr int index(std::size_t block, std::size_t strip, std::size_t column) {
        const int b = first_bit(block), place = int(column % 4), rest = int(column / 4 + 8 * strip);
        return (rest & ((1 << b) - 1)) | place << b | (rest >> b) << (b + 2);
    }

    void put(const std::int8_t* from, const float* scales, int bits, std::size_t strips) {
        const bool whole = strips == STRIPS;
        for (std::size_t strip = 0; strip < STRIPS; ++strip)
            for (std::size_t block = 0; block < BLOCKS; ++block) {
                const std::int8_t* const x = from + strip * STRIP + block * X_BLOCK;
                for (std::size_t column = 0; column < X_BLOCK; ++column) {
                    const int raised = bits == 8 ? x[column] + 128 : x[column];
                    (whole ? q[block][index(block, strip, column)] : q[strip][block * X_BLOCK + column]) =
                        std::int8_t(raised);
                }
                // The codes of the upper halves of bytes stay there, which makes them 16 times as large.
                const float part = bits == 4 && block >= BLOCKS / 2 ? 1.0f / 16 : 1.0f;
                for (std::size_t i = 0; i < 4; ++i)
                    (whole ? scale[block][4 * strip + i] : scale[strip][4 * block + i]) =
                        scales[strip * BLOCKS + block] * part;
            }
    }

    // Multiply the strips that are left over.
    template <int BITS, int ROWS, int BATCH>
    static void add_rest(Sum (&sums)[ROWS][BATCH], const std::uint8_t* const (&codes)[ROWS],
                         const std::uint8_t* const (&places)[ROWS], const Gathered* x,
                         const float (&scales)[ROWS][2 * STRIPS], std::size_t strips);
};

// A strip of x in its order.
struct alignas(64) Straight {
    static constexpr std::size_t STRIPS = 1;
    static constexpr int ROWS_FOR_ONE = 4;
    std::int8_t q[2][64];
    std::int32_t start[2][16];  // -zero · (sum of the four columns)
    float scale[2][16];

    void put(const std::int8_t* from, const float* scales, int bits, std::size_t) {
        const int zero = bits == 4 ? ZERO_OF_FOUR_BITS : 128;
        std::memcpy(q, from, STRIP);
        for (int i = 0; i < 32; ++i) {
            start[i / 16][i % 16] = -zero * (from[4 * i] + from[4 * i + 1] + from[4 * i + 2] + from[4 * i + 3]);
            scale[i / 16][i % 16] = scales[i / 8];
        }
    }
};

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

// Four strips, as they lie in memory or, with 8 bits, one block after the other with a lane for each strip.
template <int BITS>
struct Kept {
    __m512i places, codes[BITS / 2];
};

// The bits of an index that are not a place.
template <int FIRST_BIT>
inline __m512i rest_of_index() {
    alignas(64) static constexpr auto bytes = [] {
        struct { std::uint8_t of[64]; } found{};
        for (int i = 0; i < 64; ++i) {
            const int rest = i % 16 / 2 + i / 16 * 8;
            found.of[i] = std::uint8_t((rest & ((1 << FIRST_BIT) - 1)) | (rest >> FIRST_BIT) << (FIRST_BIT + 2));
        }
        return found;
    }();
    return _mm512_load_si512(bytes.of);
}

template <int FIRST_BIT>
inline __m512i index_of(__m512i places) {
    const __m512i two_bits = _mm512_set1_epi8(char(3 << FIRST_BIT));
    return _mm512_ternarylogic_epi32(places, two_bits, rest_of_index<FIRST_BIT>(), 0xea);  // (a & b) | c
}

// In a register from here on: compilers would rather load it again for each of its uses, and loads are what is scarce.
inline __m512i keep(__m512i loaded) {
    asm("" : "+v"(loaded));
    return loaded;
}

template <int BITS>
inline Kept<BITS> load_kept(const std::uint8_t* codes, const std::uint8_t* places) {
    Kept<BITS> kept;
    kept.places = keep(load_512(places));
    if constexpr (BITS == 4) {
        const __m512i first = keep(load_512(codes)), second = keep(load_512(codes + 64));
        kept.codes[0] = _mm512_shuffle_i64x2(first, second, 0x88);  // blocks 0 and, in upper halves of bytes, 2
        kept.codes[1] = _mm512_shuffle_i64x2(first, second, 0xdd);  // 1 and 3
    } else {
        __m512i of[4], halves[4];
        for (int i = 0; i < 4; ++i) of[i] = keep(load_512(codes + 64 * i));
        for (int i = 0; i < 2; ++i) {
            halves[i] = _mm512_shuffle_i64x2(of[2 * i], of[2 * i + 1], 0x44);
            halves[2 + i] = _mm512_shuffle_i64x2(of[2 * i], of[2 * i + 1], 0xee);
        }
        for (int i = 0; i < 2; ++i) {
            kept.codes[2 * i] = _mm512_shuffle_i64x2(halves[2 * i], halves[2 * i + 1], 0x88);
            kept.codes[2 * i + 1] = _mm512_shuffle_i64x2(halves[2 * i], halves[2 * i + 1], 0xdd);
        }
    }
    return kept;
}

// Products as floats: both sums are added to an integer whose bits are those of 1.5 · 2^23, near which floats are the
// integers, so that their difference as floats is that of the integers. What stands for 0 is `zero`, in each byte.
template <int BITS>
inline __m512 dots(__m512i codes, __m512i x, __m512i zero) {
    const __m512i start = _mm512_set1_epi32(0x4b400000);
    const __m512i raised = BITS == 4 ? _mm512_dpbusd_epi32(start, codes, x) : _mm512_dpbusd_epi32(start, x, codes);
    const __m512i too_much = _mm512_dpbusd_epi32(start, zero, BITS == 4 ? x : codes);
    return _mm512_sub_ps(_mm512_castsi512_ps(raised), _mm512_castsi512_ps(too_much));
}

template <int BITS, int BLOCK>
inline __m512 dots_of_block(const Kept<BITS>& kept, __m512i first_half, __m512i second_half) {
    constexpr bool UPPER = BLOCK >= 2;
    const __m512i places = BLOCK == 3 ? _mm512_srli_epi16(kept.places, 2) : kept.places;
    const __m512i from = index_of<Gathered::first_bit(BLOCK)>(places);
    const __m512i x = _mm512_permutex2var_epi8(first_half, from, second_half);
    if constexpr (BITS == 8) return dots<8>(kept.codes[BLOCK], x, _mm512_set1_epi8(char(128)));
    const __m512i codes = _mm512_and_si512(kept.codes[BLOCK % 2], _mm512_set1_epi8(char(UPPER ? 0xf0 : 0x0f)));
    return dots<4>(codes, x, _mm512_set1_epi8(char(ZERO_OF_FOUR_BITS * (UPPER ? 16 : 1))));
}

// A word of four strips of each row of W.
template <int BITS, int WORD_OF_STRIP, int ROWS, int BATCH>
inline void add_word(Sum (&sums)[ROWS][BATCH], const Kept<BITS> (&kept)[ROWS], const Gathered* x,
                     const float (&scales)[ROWS][2 * Gathered::STRIPS]) {
    constexpr int BLOCK = 2 * WORD_OF_STRIP, W = WORD_OF_STRIP;
    const __m512i of_word = _mm512_set_epi32(6 + W, 6 + W, 6 + W, 6 + W, 4 + W, 4 + W, 4 + W, 4 + W, 2 + W, 2 + W, 2 + W,
                                             2 + W, W, W, W, W);
#pragma GCC unroll 8
    for (int n = 0; n < BATCH; ++n) {
        __m512 scaled[ROWS];
        __m512i low = keep(_mm512_load_si512(x[n].q[BLOCK])), high = keep(_mm512_load_si512(x[n].q[BLOCK] + 64));
        __m512 scale = _mm512_load_ps(x[n].scale[BLOCK]);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) scaled[r] = _mm512_mul_ps(dots_of_block<BITS, BLOCK>(kept[r], low, high), scale);
        low = keep(_mm512_load_si512(x[n].q[BLOCK + 1])), high = keep(_mm512_load_si512(x[n].q[BLOCK + 1] + 64));
        scale = _mm512_load_ps(x[n].scale[BLOCK + 1]);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            scaled[r] = _mm512_fmadd_ps(dots_of_block<BITS, BLOCK + 1>(kept[r], low, high), scale, scaled[r]);
            const __m512 both = _mm512_castps256_ps512(_mm256_load_ps(scales[r]));
            sums[r][n] = _mm512_fmadd_ps(scaled[r], _mm512_permutexvar_ps(of_word, both), sums[r][n]);
        }
    }
}

template <int BITS, int ROWS, int BATCH>
inline void add(Sum (&sums)[ROWS][BATCH], const Kept<BITS> (&kept)[ROWS], const Gathered* x,
                const float (&scales)[ROWS][2 * Gathered::STRIPS], std::size_t) {
    add_word<BITS, 0>(sums, kept, x, scales);
    add_word<BITS, 1>(sums, kept, x, scales);
}

template <int BITS, int ROWS, int BATCH>
inline void Gathered::add_rest(Sum (&sums)[ROWS][BATCH], const std::uint8_t* const (&codes)[ROWS],
                               const std::uint8_t* const (&places)[ROWS], const Gathered* x,
                               const float (&scales)[ROWS][2 * STRIPS], std::size_t strips) {
    const __m512i groups =
        _mm512_set_epi64(0x7c7c787874747070, 0x6c6c686864646060, 0x5c5c585854545050, 0x4c4c484844444040,
                         0x3c3c383834343030, 0x2c2c282824242020, 0x1c1c181814141010, 0x0c0c080804040000);
    const __m512i two_bits = _mm512_set1_epi8(3);
    const auto halves = [](char first, char second) {
        return _mm512_inserti64x4(_mm512_set1_epi8(first), _mm256_set1_epi8(second), 1);
    };
    const __m512i zero = BITS == 4 ? halves(ZERO_OF_FOUR_BITS, char(128)) : _mm512_set1_epi8(char(128));
    for (std::size_t s = 0; s < strips; ++s)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const auto* const at = reinterpret_cast<const __m128i*>(places[r] + s * STRIP_PLACES);
            const __m512i shifted = _mm512_srlv_epi16(_mm512_broadcast_i32x4(_mm_loadu_si128(at)), by_lane(0, 2, 4, 6));
            const __m512i from = _mm512_ternarylogic_epi32(shifted, two_bits, groups, 0xea);
            __m512i weights = _mm512_setzero_si512();
            if constexpr (BITS == 8)
                weights = load_512(codes[r] + s * KEPT);
            else
                weights = _mm512_and_si512(_mm512_broadcast_i64x4(_mm256_loadu_si256(
                                               reinterpret_cast<const __m256i*>(codes[r] + s * KEPT / 2))),
                                           halves(0x0f, char(0xf0)));
            const __m512 of_words =
                _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[r][2 * s]), _mm512_set1_ps(scales[r][2 * s + 1]));
#pragma GCC unroll 8
            for (int n = 0; n < BATCH; ++n) {
                const __m512i gathered = _mm512_permutex2var_epi8(_mm512_load_si512(x[n].q[s]), from,
                                                                  _mm512_load_si512(x[n].q[s] + 64));
                const __m512 scaled = _mm512_mul_ps(dots<BITS>(weights, gathered, zero), _mm512_load_ps(x[n].scale[s]));
                sums[r][n] = _mm512_fmadd_ps(scaled, of_words, sums[r][n]);
            }
        }
}

template <int>
struct Dense {
    __m512i words[2];
};

template <int BITS>
inline Dense<BITS> load_dense(const std::uint8_t* codes) {
    return {{raised<BITS>(codes), raised<BITS>(codes + 8 * BITS)}};
}

template <int BITS>
inline void add(Sum& sum, const Dense<BITS>& weights, const Straight& x, const float* scales) {
    for (int word = 0; word < 2; ++word) {
        const __m512i start = _mm512_load_si512(x.start[word]);
        const __m512i dot = _mm512_dpbusd_epi32(start, weights.words[word], _mm512_load_si512(x.q[word]));
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_load_ps(x.scale[word]));
        sum = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scales[word]), sum);
    }
}

inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

inline void widen_scales(const std::uint16_t* from, float (&to)[16]) {
    _mm512_store_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

inline void widen_scales(const std::uint16_t* from, float (&to)[8]) {
    _mm256_store_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

}  // namespace
}  // namespace halve::HALVE_ISA
