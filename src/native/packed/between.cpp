// The compiler's own vectors do most of it; what a processor converts itself stands in `Sixteen`. See between.hpp.
#include "between.hpp"

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "number.hpp"

namespace halve::HALVE_ISA {
namespace {

typedef float Wide __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef std::uint32_t WideBits __attribute__((vector_size(64)));
typedef std::int32_t WideInts __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(32)));

template <typename To, typename From>
To cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bits are looked at as other numbers of the same size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline Wide all(float value) { return Wide{} + value; }

// Sixteen numbers as they are stored, to and from float32.
template <Values V>
struct Sixteen;

template <>
struct Sixteen<Values::fp32> {
    using Stored = float;
    static Wide load(const Stored* from) {
        Wide wide;
        std::memcpy(&wide, from, sizeof(wide));
        return wide;
    }
    static void store(Wide wide, Stored* to) { std::memcpy(to, &wide, sizeof(wide)); }
    static Wide rounded(Wide wide) { return wide; }
};

template <>
struct Sixteen<Values::bf16> {
    using Stored = std::uint16_t;
    static Wide load(const Stored* from) {
        Halves halves;
        std::memcpy(&halves, from, sizeof(halves));
        return cast<Wide>(__builtin_convertvector(halves, WideBits) << 16);
    }
    static WideBits upper(Wide wide) {
        const auto bits = cast<WideBits>(wide);
        const WideBits up = bits + 0x7fff + (bits >> 16 & 1);
        return wide == wide ? up : bits | 0x400000;  // rounding might carry a NaN to infinity
    }
    static void store(Wide wide, Stored* to) {
        const Halves halves = __builtin_convertvector(upper(wide) >> 16, Halves);
        std::memcpy(to, &halves, sizeof(halves));
    }
    static Wide rounded(Wide wide) { return cast<Wide>(upper(wide) & 0xffff0000); }
};

template <>
struct Sixteen<Values::fp16> {
    using Stored = std::uint16_t;
    static Wide load(const Stored* from) {
        Wide wide;
#if defined(__AVX512F__)
        const __m512 found = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        std::memcpy(&wide, &found, sizeof(wide));
#elif defined(__F16C__)
        for (int half = 0; half < 2; ++half) {
            const __m256 found = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + half));
            std::memcpy(reinterpret_cast<char*>(&wide) + 32 * half, &found, sizeof(found));
        }
#else
        for (std::size_t i = 0; i < LANE; ++i) wide[i] = Number<Values::fp16>::widen(from[i]);
#endif
        return wide;
    }
    static void store(Wide wide, Stored* to) {
#if defined(__AVX512F__)
        const __m256i found = _mm512_cvtps_ph(cast<__m512>(wide), _MM_FROUND_TO_NEAREST_INT);
        std::memcpy(to, &found, sizeof(found));
#elif defined(__F16C__)
        for (int half = 0; half < 2; ++half) {
            __m256 part;
            std::memcpy(&part, reinterpret_cast<const char*>(&wide) + 32 * half, sizeof(part));
            const __m128i found = _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT);
            std::memcpy(to + 8 * half, &found, sizeof(found));
        }
#else
        for (std::size_t i = 0; i < LANE; ++i) to[i] = Number<Values::fp16>::narrow(wide[i]);
#endif
    }
    static Wide rounded(Wide wide) {
        Stored stored[LANE];
        store(wide, stored);
        return load(stored);
    }
};

inline float total(Wide x) {
    Eight eights[2];
    std::memcpy(eights, &x, sizeof(eights));
    const Eight eight = eights[0] + eights[1];
    Four fours[2];
    std::memcpy(fours, &eight, sizeof(fours));
    const Four four = fours[0] + fours[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// e to the power of x, to 2e-7 of itself; 0 below -87, where float32 has no normal numbers, and no more than e^88.
inline Wide exponential(Wide x) {
    const Wide low = all(-87.0f), high = all(88.0f);
    const auto vanishes = x < low;
    x = x > high ? high : x;
    x = vanishes ? low : x;
    const Wide shift = all(0x1.8p23f);
    const Wide whole = (x * 0x1.715476p0f + shift) - shift;         // of x / ln 2
    const Wide rest = (x - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f;  // ln 2 in two parts, the first of few bits
    constexpr float FACTORS[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f};
    Wide sum = all(1.0f / 5040);
    for (const float factor : FACTORS) sum = sum * rest + factor;
    const WideInts power = (__builtin_convertvector(whole, WideInts) + 127) << 23;
    const Wide found = sum * cast<Wide>(power);
    return vanishes ? Wide{} : found;
}

template <Values V>
using Stored = typename Number<V>::Stored;

template <Values V>
void norm(const void* from, const void* by, float eps, std::size_t n, void* to) {
    using S = Sixteen<V>;
    const auto* x = static_cast<const Stored<V>*>(from);
    const auto* weight = static_cast<const Stored<V>*>(by);
    auto* out = static_cast<Stored<V>*>(to);
    Wide squares{};
    for (std::size_t i = 0; i < n; i += LANE) {
        const Wide wide = S::load(x + i);
        squares += wide * wide;
    }
    const float factor = 1.0f / __builtin_sqrtf(total(squares) / float(n) + eps);
    for (std::size_t i = 0; i < n; i += LANE)
        S::store(S::rounded(S::load(x + i) * factor) * S::load(weight + i), out + i);
}

template <Values V>
void rotate(void* heads, const void* cosines, const void* sines, std::size_t count, std::size_t width) {
    using S = Sixteen<V>;
    const auto* c = static_cast<const Stored<V>*>(cosines);
    const auto* s = static_cast<const Stored<V>*>(sines);
    auto* first = static_cast<Stored<V>*>(heads);
    const std::size_t half = width / 2;
    for (std::size_t head = 0; head < count; ++head, first += width) {
        auto* second = first + half;
        for (std::size_t i = 0; i < half; i += LANE) {
            const Wide a = S::load(first + i), b = S::load(second + i);
            S::store(S::rounded(a * S::load(c + i)) - S::rounded(b * S::load(s + i)), first + i);
            S::store(S::rounded(b * S::load(c + half + i)) + S::rounded(a * S::load(s + half + i)), second + i);
        }
    }
}

// WIDTH is that of a head, where it is one of the usual ones, which leaves the compiler registers instead of loops.
template <Values V, std::size_t WIDTH>
void attend_width(const Attention& job) {
    using S = Sixteen<V>;
    const std::size_t width = WIDTH ? WIDTH : job.width;
    const auto* keys = static_cast<const Stored<V>*>(job.keys);
    const auto* values = static_cast<const Stored<V>*>(job.values);
    float* const scores = job.work;                             // (count, length)
    float* const queries = scores + job.count * job.length;     // (count, width), later the sums
    float* const token = queries + job.count * width;           // (width,), a key or a value
    const auto at = [](float* place) { return Sixteen<Values::fp32>::load(place); };
    const auto put = [](Wide wide, float* place) { Sixteen<Values::fp32>::store(wide, place); };
    const auto widen = [&](const Stored<V>* from, std::size_t n, float* to) {
        for (std::size_t i = 0; i < n; i += LANE) put(S::load(from + i), to + i);
    };

    widen(static_cast<const Stored<V>*>(job.queries), job.count * width, queries);
    for (std::size_t t = 0; t < job.length; ++t) {
        if (job.shown && !job.shown[t]) {
            for (std::size_t q = 0; q < job.count; ++q) scores[q * job.length + t] = -__builtin_inff();
            continue;
        }
        widen(keys + t * width, width, token);
        for (std::size_t q = 0; q < job.count; ++q) {
            Wide sum{};
            for (std::size_t i = 0; i < width; i += LANE) sum += at(queries + q * width + i) * at(token + i);
            scores[q * job.length + t] = total(sum) * job.scale;
        }
    }
    for (std::size_t q = 0; q < job.count; ++q) {
        float* const row = scores + q * job.length;
        float largest = row[0], sum = 0.0f;
        for (std::size_t t = 1; t < job.length; ++t) largest = row[t] > largest ? row[t] : largest;
        if (largest == -__builtin_inff()) {  // all is padding: nothing is attended to
            for (std::size_t t = 0; t < job.length; ++t) row[t] = 0.0f;
            continue;
        }
        for (std::size_t t = 0; t < job.length; t += LANE) {
            const std::size_t some = job.length - t < LANE ? job.length - t : LANE;
            float part[LANE] = {};
            for (std::size_t i = 0; i < some; ++i) part[i] = row[t + i] - largest;
            put(exponential(at(part)), part);
            for (std::size_t i = 0; i < some; ++i) sum += row[t + i] = part[i];
        }
        for (std::size_t t = 0; t < job.length; ++t) row[t] /= sum;
    }
    for (std::size_t i = 0; i < job.count * width; ++i) queries[i] = 0.0f;
    for (std::size_t t = 0; t < job.length; ++t) {
        widen(values + t * width, width, token);
        for (std::size_t q = 0; q < job.count; ++q) {
            const float share = scores[q * job.length + t];
            if (share == 0.0f) continue;  // also of what is padding, whatever its value is
            for (std::size_t i = 0; i < width; i += LANE)
                put(at(queries + q * width + i) + share * at(token + i), queries + q * width + i);
        }
    }
    for (std::size_t i = 0; i < job.count * width; i += LANE)
        S::store(at(queries + i), static_cast<Stored<V>*>(job.out) + i);
}

template <Values V>
void attend(const Attention& job) {
    switch (job.width) {
        case 64: return attend_width<V, 64>(job);
        case 128: return attend_width<V, 128>(job);
        default: return attend_width<V, 0>(job);
    }
}

template <Values V>
void gate(void* by, const void* up, std::size_t n) {
    using S = Sixteen<V>;
    auto* out = static_cast<Stored<V>*>(by);
    const auto* other = static_cast<const Stored<V>*>(up);
    for (std::size_t i = 0; i < n; i += LANE) {
        const Wide x = S::load(out + i);
        S::store(S::rounded(x / (1.0f + exponential(-x))) * S::load(other + i), out + i);
    }
}

template <Values V>
void add(const void* from, std::size_t n, void* to) {
    using S = Sixteen<V>;
    const auto* x = static_cast<const Stored<V>*>(from);
    auto* sum = static_cast<Stored<V>*>(to);
    for (std::size_t i = 0; i < n; i += LANE) S::store(S::load(sum + i) + S::load(x + i), sum + i);
}

template <Values V>
BetweenKernels kernels() {
    return {&norm<V>, &rotate<V>, &attend<V>, &gate<V>, &add<V>};
}

}  // namespace

BetweenKernels between_kernels(Values held) {
    switch (held) {
        case Values::bf16: return kernels<Values::bf16>();
        case Values::fp16: return kernels<Values::fp16>();
        default: return kernels<Values::fp32>();
    }
}

}  // namespace halve::HALVE_ISA
