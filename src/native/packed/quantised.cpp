// The loops of the quantised products; quantised_lanes.hpp has what differs between instruction sets. See quantised.hpp.
#include "quantised.hpp"

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int BLOCK = 4;  // rows of x that the same expanded weights are multiplied with
constexpr std::size_t LINE = 64;
constexpr std::uintptr_t AHEAD = 4096;  // bytes of codes, at least: what is nearer would not arrive in time
constexpr float LARGEST = 127.0f;    // of a quantised x; -128 is not used
constexpr float SMALLEST = 1e-30f;   // what is smaller than that in all columns of a block is 0

template <bool DENSE>
struct OfForm {  // at 2:4
    using Input = Gathered;
    template <int BITS>
    using Weights = Kept<BITS>;
};

template <>
struct OfForm<true> {
    using Input = Straight;
    template <int BITS>
    using Weights = Dense<BITS>;
};

struct Job {
    const QuantisedMatrix& w;
    const void* x;
    std::size_t batch;
    Values held;
    const void* bias;
    void* y;
};

template <Values V>
float widen(const void* from, std::size_t index) {
    return Number<V>::widen(static_cast<const typename Number<V>::Stored*>(from)[index]);
}

float widen(Values held, const void* from, std::size_t index) {
    switch (held) {
        case Values::bf16: return widen<Values::bf16>(from, index);
        case Values::fp16: return widen<Values::fp16>(from, index);
        default: return widen<Values::fp32>(from, index);
    }
}

template <Values V>
void narrow(float value, void* to, std::size_t index) {
    static_cast<typename Number<V>::Stored*>(to)[index] = Number<V>::narrow(value);
}

void narrow(Values held, float value, void* to, std::size_t index) {
    switch (held) {
        case Values::bf16: return narrow<Values::bf16>(value, to, index);
        case Values::fp16: return narrow<Values::fp16>(value, to, index);
        default: return narrow<Values::fp32>(value, to, index);
    }
}

void prefetch(const void* from, std::uintptr_t ahead) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) + ahead), 0, 2);
}

template <int BITS, bool DENSE>
typename OfForm<DENSE>::template Weights<BITS> load(const std::uint8_t* codes, const std::uint8_t* places) {
    if constexpr (DENSE) return load_dense<BITS>(codes);
    else return load_kept<BITS>(codes, places);
}

// Where an instruction set does not say how several rows of W go together: one after the other.
template <int BITS, class Weights, class Input, int ROWS, int BATCH, std::size_t COUNT>
inline void add(Sum (&sums)[ROWS][BATCH], const Weights (&weights)[ROWS], const Input* x,
                const float (&scales)[ROWS][COUNT], std::size_t first) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < BATCH; ++n) add<BITS>(sums[r][n], weights[r], x[n], scales[r] + first);
    }
}

// ROWS rows of W, beginning at `row`, times BATCH rows of x, beginning at `start`.
template <int BITS, bool DENSE, int ROWS, int BATCH>
void block(const Job& job, std::size_t row, std::size_t start) {
    using Input = typename OfForm<DENSE>::Input;
    constexpr std::size_t AT_ONCE = Input::STRIPS, SOME = AT_ONCE > 1 ? AT_ONCE : SCALES / 2;
    constexpr std::size_t CODES = (DENSE ? STRIP : KEPT) * BITS / 8;
    const std::size_t count = job.w.strips();
    // In the next rows, whose beginning the processor itself would not have foreseen.
    const std::uintptr_t next = ROWS * count * CODES, ahead = next > AHEAD ? next : AHEAD;
    const std::uintptr_t places_ahead = ahead / CODES * STRIP_PLACES;
    const std::uint8_t *codes[ROWS], *places[ROWS];
    const std::uint16_t* scales[ROWS];
    Sum sums[ROWS][BATCH];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        codes[r] = job.w.codes + (row + r) * count * CODES;
        places[r] = DENSE ? nullptr : job.w.places + (row + r) * count * STRIP_PLACES;
        scales[r] = job.w.scales + (row + r) * count * 2;
#pragma GCC unroll 8
        for (int n = 0; n < BATCH; ++n) sums[r][n] = Sum{};
    }
    const auto* x = static_cast<const Input*>(job.x) + start * ((count + AT_ONCE - 1) / AT_ONCE);
    for (std::size_t strip = 0; strip < count; strip += SOME) {
        alignas(64) float wide[ROWS][2 * SOME];
        const std::size_t some = count - strip < SOME ? count - strip : SOME;
        const auto prefetch_next = [&](int r, std::size_t i, std::size_t strips) __attribute__((always_inline)) {
            for (std::size_t byte = 0; byte < strips * CODES; byte += LINE) prefetch(codes[r] + byte, ahead);
            if (!DENSE && i % 4 == 0) prefetch(places[r], places_ahead);  // a line holds those of four strips
        };
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) widen_scales(scales[r] + 2 * strip, wide[r]);
        std::size_t i = 0;
        for (; i + AT_ONCE <= some; i += AT_ONCE, x += BATCH) {
            typename OfForm<DENSE>::template Weights<BITS> weights[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                prefetch_next(r, i, AT_ONCE);
                weights[r] = load<BITS, DENSE>(codes[r], places[r]);
                codes[r] += CODES * AT_ONCE;
                if (!DENSE) places[r] += STRIP_PLACES * AT_ONCE;
            }
            add<BITS>(sums, weights, x, wide, 2 * i);
        }
        if constexpr (AT_ONCE > 1)
            if (i < some) {
                for (int r = 0; r < ROWS; ++r) prefetch_next(r, i, some - i);
                Input::template add_rest<BITS>(sums, codes, places, x, wide, some - i);
            }
    }
#pragma GCC unroll 8  // else the sums would have to lie in memory, where the next rows' loads wait for them
    for (int r = 0; r < ROWS; ++r) {
        const float bias = job.bias ? widen(job.held, job.bias, row + r) : 0.0f;
#pragma GCC unroll 8
        for (int n = 0; n < BATCH; ++n)
            narrow(job.held, total(sums[r][n]) + bias, job.y, (start + n) * job.w.d_out + row + r);
    }
}

template <int BITS, bool DENSE, int BATCH>
void rows(const Job& job, std::size_t row, std::size_t last, std::size_t start) {
    constexpr int FOR_ONE = OfForm<DENSE>::Input::ROWS_FOR_ONE, ROWS = BATCH == 1 || FOR_ONE == 1 ? FOR_ONE : 2;
    for (; row + ROWS <= last; row += ROWS) block<BITS, DENSE, ROWS, BATCH>(job, row, start);
    for (; row < last; ++row) block<BITS, DENSE, 1, BATCH>(job, row, start);
}

template <int BITS, bool DENSE>
void multiply_form(const Job& job, std::size_t row, std::size_t last) {
    for (std::size_t start = 0; start < job.batch; start += BLOCK) switch (job.batch - start) {
            case 1: rows<BITS, DENSE, 1>(job, row, last, start); break;
            case 2: rows<BITS, DENSE, 2>(job, row, last, start); break;
            case 3: rows<BITS, DENSE, 3>(job, row, last, start); break;
            default: rows<BITS, DENSE, BLOCK>(job, row, last, start);
        }
}

template <int BITS>
void multiply_bits(const Job& job, std::size_t first, std::size_t last) {
    if (job.w.places)
        multiply_form<BITS, false>(job, first, last);
    else
        multiply_form<BITS, true>(job, first, last);
}

void multiply(const QuantisedMatrix& w, const void* arranged, std::size_t batch, Values held, const void* bias, void* y,
              std::size_t first, std::size_t last) {
    const Job job{w, arranged, batch, held, bias, y};
    if (w.bits == 4)
        multiply_bits<4>(job, first, last);
    else
        multiply_bits<8>(job, first, last);
}

std::size_t arranged(const QuantisedMatrix& w, std::size_t batch) {
    const std::size_t strips = w.places ? Gathered::STRIPS : Straight::STRIPS;
    return batch * ((w.strips() + strips - 1) / strips) * (w.places ? sizeof(Gathered) : sizeof(Straight));
}

// The integer nearest to the exact product, ties to even: the same on every processor.
inline int nearest(float x, float steps) {
#ifdef __FMA__
    return int(__builtin_fmaf(x, steps, 0x1.8p23f) - 0x1.8p23f);
#else
    return int((double(x) * double(steps) + 0x1.8p52) - 0x1.8p52);
#endif
}

// Quantise a block of x: to the nearest of 255 integers, whose largest stands for the largest number.
float quantise(const float* x, std::int8_t* q) {
    float largest = 0.0f, odd = 0.0f;
    for (std::size_t i = 0; i < X_BLOCK; ++i) {
        const float size = x[i] < 0.0f ? -x[i] : x[i];
        largest = size > largest ? size : largest;
        odd += x[i] * 0.0f;
    }
    if (odd != odd || largest < SMALLEST) {
        std::memset(q, 0, X_BLOCK);
        return odd != odd ? odd : 0.0f;
    }
    const float steps = LARGEST / largest;
    for (std::size_t i = 0; i < X_BLOCK; ++i) q[i] = std::int8_t(nearest(x[i], steps));
    return largest / LARGEST;
}

// Blocks of x one after the other; within a block, what is multiplied with the same weights lies together.
template <Values V, bool DENSE>
void arrange_form(const QuantisedMatrix& w, const void* from, std::size_t batch, void* to) {
    using Input = typename OfForm<DENSE>::Input;
    constexpr std::size_t COLUMNS = STRIP * Input::STRIPS;
    auto* out = static_cast<Input*>(to);
    for (std::size_t start = 0; start < batch; start += BLOCK) {
        const std::size_t end = batch - start < BLOCK ? batch : start + BLOCK;
        for (std::size_t column = 0; column < w.d_in; column += COLUMNS)
            for (std::size_t n = start; n < end; ++n, ++out) {
                float x[COLUMNS];
                std::int8_t q[COLUMNS];
                float scales[BLOCKS * Input::STRIPS];
                const std::size_t width = w.d_in - column < COLUMNS ? w.d_in - column : COLUMNS;
                for (std::size_t i = 0; i < width; ++i) x[i] = widen<V>(from, n * w.d_in + column + i);
                for (std::size_t i = width; i < COLUMNS; ++i) x[i] = 0.0f;
                for (std::size_t block = 0; block < BLOCKS * Input::STRIPS; ++block)
                    scales[block] = quantise(x + X_BLOCK * block, q + X_BLOCK * block);
                out->put(q, scales, w.bits, (width + STRIP - 1) / STRIP);
            }
    }
}

template <Values V>
void arrange_held(const QuantisedMatrix& w, const void* x, std::size_t batch, void* to) {
    if (w.places)
        arrange_form<V, false>(w, x, batch, to);
    else
        arrange_form<V, true>(w, x, batch, to);
}

void arrange(const QuantisedMatrix& w, Values held, const void* x, std::size_t batch, void* to) {
    switch (held) {
        case Values::bf16: return arrange_held<Values::bf16>(w, x, batch, to);
        case Values::fp16: return arrange_held<Values::fp16>(w, x, batch, to);
        default: return arrange_held<Values::fp32>(w, x, batch, to);
    }
}

// The weights of a strip as integers, in the order of its columns.
void spread(const QuantisedMatrix& w, std::size_t strip, std::int8_t* out) {
    const std::uint8_t* const codes = w.codes + strip * w.strip_codes();
    if (!w.places) {
        for (std::size_t i = 0; i < STRIP; ++i)
            out[i] = std::int8_t(integer(codes + i / WORD * 8 * w.bits, w.bits, i % WORD, WORD));
        return;
    }
    std::memset(out, 0, STRIP);
    const std::uint8_t* const places = w.places + strip * STRIP_PLACES;
    for (std::size_t i = 0; i < KEPT; ++i) out[column_of(places, i)] = std::int8_t(integer(codes, w.bits, i, KEPT));
}

template <Values V>
void expand_held(const QuantisedMatrix& w, std::size_t first, std::size_t last, void* to) {
    using Stored = typename Number<V>::Stored;
    auto* out = static_cast<Stored*>(to);
    for (std::size_t row = first; row < last; ++row)
        for (std::size_t column = 0; column < w.d_in; column += STRIP) {
            const std::size_t strip = row * w.strips() + column / STRIP, left = w.d_in - column;
            std::int8_t integers[STRIP];
            Stored whole[STRIP];
            spread(w, strip, integers);
            for (std::size_t word = 0; word < 2; ++word) {
                const float scale = Number<Values::fp16>::widen(w.scales[2 * strip + word]);
                for (std::size_t i = WORD * word; i < WORD * (word + 1); ++i)
                    whole[i] = Number<V>::narrow(float(integers[i]) * scale);
            }
            const std::size_t width = left < STRIP ? left : STRIP;
            std::memcpy(out, whole, width * sizeof(Stored));
            out += width;
        }
}

void expand(const QuantisedMatrix& w, Values held, std::size_t first, std::size_t last, void* out) {
    switch (held) {
        case Values::bf16: return expand_held<Values::bf16>(w, first, last, out);
        case Values::fp16: return expand_held<Values::fp16>(w, first, last, out);
        default: return expand_held<Values::fp32>(w, first, last, out);
    }
}

}  // namespace

QuantisedKernels quantised_kernels() { return {&arranged, &arrange, &multiply, &expand}; }

}  // namespace halve::HALVE_ISA
