// The loops of the quantised products; quantised_lanes.hpp has what differs between instruction sets. See quantised.hpp.
#include "quantised.hpp"

#include "quantised_lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int BLOCK = 4;  // rows of x that the same expanded weights are multiplied with
constexpr std::size_t LINE = 64;
constexpr float LARGEST = 127.0f;    // of a quantised x; -128 is not used
constexpr float SMALLEST = 1e-30f;   // what is smaller than that in all columns of a block is 0

struct Job {
    const QuantisedMatrix& w;
    const Input* x;
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

// ROWS rows of W, beginning at `row`, times BATCH rows of x, beginning at `start`.
template <int BITS, Form FORM, int ROWS, int BATCH>
void block(const Job& job, std::size_t row, std::size_t start) {
    const std::size_t count = words(job.w.d_in), word_bytes = job.w.word_bytes(), mask_row = count * (WORD / 8);
    // The same place in the next rows, whose beginning the processor itself would not have foreseen.
    const std::uintptr_t ahead = ROWS * count * word_bytes;
    const std::uint8_t *codes[ROWS], *mask[ROWS];
    const std::uint16_t* scales[ROWS];
    Sum sums[ROWS][BATCH];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        codes[r] = job.w.codes + (row + r) * count * word_bytes;
        mask[r] = FORM == Form::dense ? nullptr : job.w.mask + (row + r) * mask_row;
        scales[r] = job.w.scales + (row + r) * count;
#pragma GCC unroll 8
        for (int n = 0; n < BATCH; ++n) sums[r][n] = Sum{};
    }
    const Input* x = job.x + start * count;
    for (std::size_t word = 0; word < count;) {
        alignas(64) float wide[ROWS][SCALES];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) widen_scales(scales[r] + word, wide[r]);
        const std::size_t some = count - word < SCALES ? count - word : SCALES;
        for (std::size_t i = 0; i < some; ++i, x += BATCH) {
            if (FORM != Form::dense) prefetch(mask[0], (ROWS + i % 8) * mask_row);  // a line holds eight words
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                prefetch(codes[r], ahead);
                const Weights weights = expand<BITS, FORM>(codes[r], mask[r]);
#pragma GCC unroll 8
                for (int n = 0; n < BATCH; ++n) add<BITS>(sums[r][n], weights, x[n], wide[r][i]);
                codes[r] += word_bytes;
                if (FORM != Form::dense) mask[r] += WORD / 8;
            }
        }
        word += some;
    }
#pragma GCC unroll 8  // else the sums would have to lie in memory, where the next rows' loads wait for them
    for (int r = 0; r < ROWS; ++r) {
        const float bias = job.bias ? widen(job.held, job.bias, row + r) : 0.0f;
#pragma GCC unroll 8
        for (int n = 0; n < BATCH; ++n)
            narrow(job.held, total(sums[r][n]) + bias, job.y, (start + n) * job.w.d_out + row + r);
    }
}

template <int BITS, Form FORM, int BATCH>
void rows(const Job& job, std::size_t row, std::size_t last, std::size_t start) {
    constexpr int ROWS = BATCH == 1 ? ROWS_FOR_ONE : ROWS_FOR_MORE;
    for (; row + ROWS <= last; row += ROWS) block<BITS, FORM, ROWS, BATCH>(job, row, start);
    for (; row < last; ++row) block<BITS, FORM, 1, BATCH>(job, row, start);
}

template <int BITS, Form FORM>
void multiply_form(const Job& job, std::size_t row, std::size_t last) {
    for (std::size_t start = 0; start < job.batch; start += BLOCK) switch (job.batch - start) {
            case 1: rows<BITS, FORM, 1>(job, row, last, start); break;
            case 2: rows<BITS, FORM, 2>(job, row, last, start); break;
            case 3: rows<BITS, FORM, 3>(job, row, last, start); break;
            default: rows<BITS, FORM, BLOCK>(job, row, last, start);
        }
}

template <int BITS>
void multiply_bits(const Job& job, std::size_t first, std::size_t last) {
    if (!job.w.mask)
        multiply_form<BITS, Form::dense>(job, first, last);
    else if (job.w.half)
        multiply_form<BITS, Form::half>(job, first, last);
    else
        multiply_form<BITS, Form::counted>(job, first, last);
}

void multiply(const QuantisedMatrix& w, const void* arranged, std::size_t batch, Values held, const void* bias, void* y,
              std::size_t first, std::size_t last) {
    const Job job{w, static_cast<const Input*>(arranged), batch, held, bias, y};
    if (w.bits == 4)
        multiply_bits<4>(job, first, last);
    else
        multiply_bits<8>(job, first, last);
}

std::size_t arranged(std::size_t batch, std::size_t d_in) { return batch * words(d_in) * sizeof(Input); }

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
template <Values V>
void arrange(int bits, const void* from, std::size_t batch, std::size_t d_in, Input* out) {
    for (std::size_t start = 0; start < batch; start += BLOCK) {
        const std::size_t end = batch - start < BLOCK ? batch : start + BLOCK;
        for (std::size_t column = 0; column < d_in; column += WORD)
            for (std::size_t n = start; n < end; ++n, ++out) {
                float x[WORD];
                std::int8_t q[WORD];
                float scales[2];
                const std::size_t width = d_in - column < WORD ? d_in - column : WORD;
                for (std::size_t i = 0; i < width; ++i) x[i] = widen<V>(from, n * d_in + column + i);
                for (std::size_t i = width; i < WORD; ++i) x[i] = 0.0f;
                for (std::size_t half = 0; half < 2; ++half) scales[half] = quantise(x + X_BLOCK * half, q + X_BLOCK * half);
                out->put(q, scales, bits);
            }
    }
}

void arrange(Values held, int bits, const void* x, std::size_t batch, std::size_t d_in, void* to) {
    Input* const out = static_cast<Input*>(to);
    switch (held) {
        case Values::bf16: return arrange<Values::bf16>(bits, x, batch, d_in, out);
        case Values::fp16: return arrange<Values::fp16>(bits, x, batch, d_in, out);
        default: return arrange<Values::fp32>(bits, x, batch, d_in, out);
    }
}

template <Values V, int BITS, Form FORM>
void expand_form(const QuantisedMatrix& w, std::size_t first, std::size_t last, void* to) {
    using Stored = typename Number<V>::Stored;
    const std::size_t count = words(w.d_in), word_bytes = w.word_bytes();
    auto* out = static_cast<Stored*>(to);
    for (std::size_t row = first; row < last; ++row)
        for (std::size_t word = 0; word < count; ++word) {
            const std::size_t at = row * count + word, left = w.d_in - word * WORD, width = left < WORD ? left : WORD;
            const std::uint8_t* const mask = FORM == Form::dense ? nullptr : w.mask + at * (WORD / 8);
            const float scale = Number<Values::fp16>::widen(w.scales[at]);
            std::int8_t integers[WORD];
            place<BITS, FORM>(w.codes + at * word_bytes, mask, integers);
            Stored whole[WORD];
            for (std::size_t i = 0; i < WORD; ++i) whole[i] = Number<V>::narrow(float(integers[i]) * scale);
            std::memcpy(out, whole, width * sizeof(Stored));
            out += width;
        }
}

template <Values V, int BITS>
void expand_bits(const QuantisedMatrix& w, std::size_t first, std::size_t last, void* out) {
    if (!w.mask)
        expand_form<V, BITS, Form::dense>(w, first, last, out);
    else if (w.half)
        expand_form<V, BITS, Form::half>(w, first, last, out);
    else
        expand_form<V, BITS, Form::counted>(w, first, last, out);
}

template <Values V>
void expand_held(const QuantisedMatrix& w, std::size_t first, std::size_t last, void* out) {
    if (w.bits == 4)
        expand_bits<V, 4>(w, first, last, out);
    else
        expand_bits<V, 8>(w, first, last, out);
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
