// Vectors of the width that the instruction set at hand has, as the compilers' own vector types: operators, comparisons
// and ?: work lane by lane. Everything is inline and lives in the namespace of one instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace halve::HALVE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <typename T>
struct Simd {
    static constexpr int LANES = VECTOR_BYTES / int(sizeof(T)) < 4 ? 4 : VECTOR_BYTES / int(sizeof(T));
    using Integer = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
    typedef T Real __attribute__((vector_size(LANES * sizeof(T))));
    typedef Integer Mask __attribute__((vector_size(LANES * sizeof(T))));  // a comparison gives -1 where it holds
    static constexpr Integer SIGN = sizeof(T) == 8 ? Integer(std::uint64_t(1) << 63) : Integer(0x80000000u);
};

template <typename V>
inline V smaller(V a, V b) {  // b where a is NaN
    return a < b ? a : b;
}

template <typename V>
inline V larger(V a, V b) {  // b where a is NaN
    return a > b ? a : b;
}

template <typename M>
inline bool any(M mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    if constexpr (sizeof(mask) == 32) return _mm256_movemask_ps((__m256)mask) != 0;
#endif
    constexpr int lanes = sizeof(mask) / sizeof(mask[0]);
    auto found = mask[0];
    for (int i = 1; i < lanes; ++i) found |= mask[i];
    return found != 0;
}

// One bit for every lane.
template <typename M>
inline unsigned bits(M mask) {
#if defined(__AVX512F__)
    if constexpr (sizeof(mask[0]) == 4) return _mm512_movepi32_mask((__m512i)mask);
    if constexpr (sizeof(mask[0]) == 8) return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
    if constexpr (sizeof(mask) == 32 && sizeof(mask[0]) == 4) return unsigned(_mm256_movemask_ps((__m256)mask));
    if constexpr (sizeof(mask) == 32 && sizeof(mask[0]) == 8) return unsigned(_mm256_movemask_pd((__m256d)mask));
#endif
    constexpr int lanes = sizeof(mask) / sizeof(mask[0]);
    unsigned found = 0;
    for (int i = 0; i < lanes; ++i) found |= unsigned(mask[i] & 1) << i;
    return found;
}

// 1 / x to nearly T's precision; NaN where x is zero, infinite or close to either.
template <typename V>
inline V reciprocal(V x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(x[0]) == 4) {
        const V r = (V)_mm512_rcp14_ps((__m512)x);
        return r * (2.0f - x * r);
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(x[0]) == 4) {
        const V r = (V)_mm256_rcp_ps((__m256)x);
        return r * (2.0f - x * r);
    }
#endif
    return 1 / x;
}

#if defined(__clang__)
#define HALVE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HALVE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

// Turn four vectors that hold groups of four one after the other into one vector per position, and back: the
// transpose of every 4 x 4 block, its own inverse. Which group lies in which lane does not matter.
template <typename T>
inline void transpose(typename Simd<T>::Real& a, typename Simd<T>::Real& b, typename Simd<T>::Real& c,
                      typename Simd<T>::Real& d) {
    using V = typename Simd<T>::Real;
    [[maybe_unused]] typedef typename Simd<T>::Mask Mask;
    constexpr int L = Simd<T>::LANES;
    const auto low = [](V x, V y) {
        if constexpr (L == 4) return HALVE_SHUFFLE(x, y, 0, 4, 1, 5);
        if constexpr (L == 8) return HALVE_SHUFFLE(x, y, 0, 8, 1, 9, 4, 12, 5, 13);
        if constexpr (L == 16)
            return HALVE_SHUFFLE(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    };
    const auto high = [](V x, V y) {
        if constexpr (L == 4) return HALVE_SHUFFLE(x, y, 2, 6, 3, 7);
        if constexpr (L == 8) return HALVE_SHUFFLE(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
        if constexpr (L == 16)
            return HALVE_SHUFFLE(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    };
    const V ac_low = low(a, c), ac_high = high(a, c), bd_low = low(b, d), bd_high = high(b, d);
    a = low(ac_low, bd_low);
    b = high(ac_low, bd_low);
    c = low(ac_high, bd_high);
    d = high(ac_high, bd_high);
}

#undef HALVE_SHUFFLE

}  // namespace
}  // namespace halve::HALVE_ISA
