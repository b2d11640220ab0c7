// AVX2, FMA and F16C: eight columns at a time, their values moved into place by one shuffle whose table the byte of mask
// chooses. Of the tables, 2:4 touches 36 entries, so they stay in the first-level cache.
#pragma once

#include <immintrin.h>

#include "lanes.hpp"
#include "places.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int ROWS_FOR_ONE = 2, ROWS_FOR_MORE = 3;  // rows of W at a time, for one row of x and for several
constexpr int CHAINS_FOR_ONE = 2;                   // sums of an element, where x is one row
constexpr int UNROLLED = 8;                         // steps of a word
constexpr int ABSENT = 0x80;                        // makes a byte shuffle write zero
constexpr int HALF = COLUMNS_OF_BYTE / 2;

struct Shuffles {
    // 16 bits to the upper half of 32; also for values that begin after those of another half-kept byte.
    alignas(64) std::uint8_t widening[256][2][4 * COLUMNS_OF_BYTE];
    alignas(64) std::uint8_t halves[256][2 * COLUMNS_OF_BYTE];
    alignas(64) std::uint32_t floats[256][COLUMNS_OF_BYTE];
};

constexpr Shuffles make_shuffles() {
    Shuffles s{};
    for (int byte = 0; byte < 256; ++byte)
        for (int column = 0; column < COLUMNS_OF_BYTE; ++column) {
            const int place = place_of(byte, column);
            for (int second = 0; second < 2; ++second)
                for (int i = 0; i < 4; ++i)
                    s.widening[byte][second][4 * column + i] =
                        std::uint8_t(place < 0 || i < 2 ? ABSENT : 2 * (place + second * HALF) + i - 2);
            for (int i = 0; i < 2; ++i)
                s.halves[byte][2 * column + i] = std::uint8_t(place < 0 ? ABSENT : 2 * place + i);
            s.floats[byte][column] = place < 0 ? 0x80000000u : std::uint32_t(place);
        }
    return s;
}

constexpr Shuffles SHUFFLES = make_shuffles();

inline __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline __m128i expand_halves(const std::uint16_t* values, std::uint8_t bits) {
    return _mm_shuffle_epi8(load_128(values), load_128(SHUFFLES.halves[bits]));
}

struct EightFloats {
    using Input = float;
    using Weights = __m256;
    using Sum = __m256;
    using Bits = std::uint8_t;
    static constexpr int COLUMNS = 8;

    static int count(Bits bits) { return __builtin_popcount(bits); }

    static void add(Sum& sum, Weights weights, const Input* x) { sum = _mm256_fmadd_ps(weights, _mm256_load_ps(x), sum); }

    static float total(Sum sum) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
};

template <>
struct Lanes<Values::bf16> : EightFloats {
    using Stored = std::uint16_t;

    static Weights expand(const Stored* values, Bits bits, int second = 0) {
        const __m256i twice = _mm256_broadcastsi128_si256(load_128(values));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, load_256(SHUFFLES.widening[bits][second])));
    }

    static void place(const Stored* values, Bits bits, Stored* out) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), expand_halves(values, bits));
    }

    static Weights load(const Stored* values) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(values)), 16));
    }

    static Input input(Stored x) { return Number<Values::bf16>::widen(x); }
};

// Two bytes of mask share one load of their values, and a word one of its mask: loads are what this loop waits for.
template <>
inline __m256 expand_half<Values::bf16>(const std::uint16_t* values, const std::uint8_t* mask, int step) {
    std::uint64_t word;
    std::memcpy(&word, mask, sizeof(word));
    return Lanes<Values::bf16>::expand(values + step / 2 * 2 * HALF, std::uint8_t(word >> 8 * step), step % 2);
}

template <>
struct Lanes<Values::fp16> : EightFloats {
    using Stored = std::uint16_t;

    static Weights expand(const Stored* values, Bits bits) { return _mm256_cvtph_ps(expand_halves(values, bits)); }

    static void place(const Stored* values, Bits bits, Stored* out) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), expand_halves(values, bits));
    }

    static Weights load(const Stored* values) { return _mm256_cvtph_ps(load_128(values)); }

    static Input input(Stored x) { return _cvtsh_ss(x); }
};

template <>
struct Lanes<Values::fp32> : EightFloats {
    using Stored = float;

    static Weights expand(const Stored* values, Bits bits) {
        const __m256i from = load_256(SHUFFLES.floats[bits]);  // of which the permutation reads the lowest three bits
        const __m256 placed = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), from);
        return _mm256_blendv_ps(placed, _mm256_setzero_ps(), _mm256_castsi256_ps(from));
    }

    static void place(const Stored* values, Bits bits, Stored* out) { _mm256_storeu_ps(out, expand(values, bits)); }

    static Weights load(const Stored* values) { return _mm256_loadu_ps(values); }

    static Input input(Stored x) { return x; }
};

}  // namespace
}  // namespace halve::HALVE_ISA
