// AVX-512 with VNNI: 64 weights are one register. They are multiplied without their sign, raised by the number that
// stands for 0, and what that adds, Σ zero · x, is taken off again.
#pragma once

#include <immintrin.h>

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int ROWS_FOR_ONE = 4, ROWS_FOR_MORE = 2;  // rows of W at a time, for one row of x and for several

inline __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }

// Four strips of x, whose numbers are gathered by shuffles of 128 bytes, one for each block: kept weight i of that block
// in strip s finds its four candidates where bits b and b + 1 of the index are its place and the five others, in order,
// i / 2 and s. `b` is such that the places need not be moved to where they lie in their bytes, but those of the last block.
struct alignas(64) Gathered {
    static constexpr std::size_t STRIPS = 4;
    std::int8_t q[BLOCKS][128];
    float scale[BLOCKS][16];

    static constexpr int first_bit(std::size_t block) { return block < 2 ? 2 * int(block) : 4; }

    static constexpr int index(std::size_t block, std::size_t strip, std::size_t column) {
        const int b = first_bit(block), place = int(column % 4), rest = int(column / 4 + 8 * strip);
        return (rest & ((1 << b) - 1)) | place << b | (rest >> b) << (b + 2);
    }

    void put(const std::int8_t* from, const float* scales, int bits) {
        for (std::size_t strip = 0; strip < STRIPS; ++strip)
            for (std::size_t block = 0; block < BLOCKS; ++block) {
                for (std::size_t column = 0; column < X_BLOCK; ++column) {
                    const int x = from[strip * STRIP + block * X_BLOCK + column];
                    q[block][index(block, strip, column)] = std::int8_t(bits == 8 ? x + 128 : x);
                }
                // The codes of the upper halves of bytes stay there, which makes them 16 times as large.
                const float part = bits == 4 && block >= BLOCKS / 2 ? 1.0f / 16 : 1.0f;
                for (std::size_t i = 0; i < 4; ++i) scale[block][4 * strip + i] = scales[strip * BLOCKS + block] * part;
            }
    }
};

// A strip of x in its order.
struct alignas(64) Straight {
    static constexpr std::size_t STRIPS = 1;
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

// Of four strips, the weights of one block after the other, those of a strip in a lane.
struct Kept {
    __m512i weights[BLOCKS], from[BLOCKS];
};

// The rest of an index, its place apart.
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

inline __m512i load_lanes(const std::uint8_t* from, int lanes) {
    return _mm512_maskz_loadu_epi32(__mmask16((1u << 4 * lanes) - 1), from);
}

template <int BITS>
inline Kept load_kept(const std::uint8_t* codes, const std::uint8_t* places, int strips) {
    Kept kept;
    const __m512i all = load_lanes(places, strips);
    kept.from[0] = index_of<0>(all);
    kept.from[1] = index_of<2>(all);
    kept.from[2] = index_of<4>(all);
    kept.from[3] = index_of<4>(_mm512_srli_epi16(all, 2));
    if constexpr (BITS == 4) {
        const __m512i first = load_lanes(codes, strips < 2 ? 2 * strips : 4);
        const __m512i second = load_lanes(codes + 64, strips < 2 ? 0 : 2 * strips - 4);
        const __m512i even = _mm512_shuffle_i64x2(first, second, 0x88), odd = _mm512_shuffle_i64x2(first, second, 0xdd);
        const __m512i lower = _mm512_set1_epi8(0x0f), upper = _mm512_set1_epi8(char(0xf0));
        kept.weights[0] = _mm512_and_si512(even, lower);
        kept.weights[1] = _mm512_and_si512(odd, lower);
        kept.weights[2] = _mm512_and_si512(even, upper);
        kept.weights[3] = _mm512_and_si512(odd, upper);
    } else {
        __m512i of[4], halves[4];
        for (int i = 0; i < 4; ++i) of[i] = i < strips ? load_512(codes + 64 * i) : _mm512_setzero_si512();
        for (int i = 0; i < 2; ++i) {
            halves[i] = _mm512_shuffle_i64x2(of[2 * i], of[2 * i + 1], 0x44);
            halves[2 + i] = _mm512_shuffle_i64x2(of[2 * i], of[2 * i + 1], 0xee);
        }
        for (int i = 0; i < 2; ++i) {
            kept.weights[2 * i] = _mm512_shuffle_i64x2(halves[2 * i], halves[2 * i + 1], 0x88);
            kept.weights[2 * i + 1] = _mm512_shuffle_i64x2(halves[2 * i], halves[2 * i + 1], 0xdd);
        }
    }
    return kept;
}

// A block's products as floats: both sums are added to an integer whose bits are those of 1.5 · 2^23, near which floats
// are the integers, so that their difference as floats is that of the integers.
template <int BITS>
inline __m512 dots(const Kept& kept, const Gathered& x, int block) {
    const __m512i start = _mm512_set1_epi32(0x4b400000);
    const __m512i zero = _mm512_set1_epi8(BITS == 4 && block < 2 ? char(ZERO_OF_FOUR_BITS) : char(128));
    const __m512i gathered = _mm512_permutex2var_epi8(_mm512_load_si512(x.q[block]), kept.from[block],
                                                      _mm512_load_si512(x.q[block] + 64));
    const __m512i raised_dot = BITS == 4 ? _mm512_dpbusd_epi32(start, kept.weights[block], gathered)
                                         : _mm512_dpbusd_epi32(start, gathered, kept.weights[block]);
    const __m512i too_much = _mm512_dpbusd_epi32(start, zero, BITS == 4 ? gathered : kept.weights[block]);
    return _mm512_sub_ps(_mm512_castsi512_ps(raised_dot), _mm512_castsi512_ps(too_much));
}

template <int BITS>
inline void add(Sum& sum, const Kept& kept, const Gathered& x, const float* scales) {
    const __m512i even = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
    const __m512 both = _mm512_castps256_ps512(_mm256_load_ps(scales));
    for (int word = 0; word < 2; ++word) {
        const __m512 of_word = _mm512_permutexvar_ps(_mm512_add_epi32(even, _mm512_set1_epi32(word)), both);
        const __m512 first = _mm512_mul_ps(dots<BITS>(kept, x, 2 * word), _mm512_load_ps(x.scale[2 * word]));
        const __m512 scaled =
            _mm512_fmadd_ps(dots<BITS>(kept, x, 2 * word + 1), _mm512_load_ps(x.scale[2 * word + 1]), first);
        sum = _mm512_fmadd_ps(scaled, of_word, sum);
    }
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

inline void widen_scales(const std::uint16_t* from, std::size_t count, float* to) {
    _mm512_store_ps(to, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from)));
}

}  // namespace
}  // namespace halve::HALVE_ISA
