// The loops of the packed products; lanes.hpp has what differs between instruction sets. See sparse_linear.hpp.
#include "sparse_linear.hpp"

#include "lanes.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int BLOCK = 4;  // rows of x that the same expanded weights are multiplied with
constexpr std::size_t LINE = 64;

enum class Form { dense, half, counted };

// Reads one row of a matrix from left to right, a word of 64 columns after the other.
template <Values V, Form FORM>
class Reader {
    using L = Lanes<V>;
    using Stored = typename L::Stored;

    const Stored* values_;
    const Stored* end_;
    const std::uint8_t* mask_;

    typename L::Bits bits(int step) const {
        typename L::Bits bits;
        std::memcpy(&bits, mask_ + step * sizeof(bits), sizeof(bits));
        return bits;
    }

    // Reading starts at `end_` at the latest, also where a mask has too many bits; what a word then takes is OVERREAD.
    const Stored* take(int step, typename L::Bits bits) {
        if constexpr (FORM == Form::dense) return values_ + step * L::COLUMNS;
        if constexpr (FORM == Form::half) return values_ + step * L::COLUMNS / 2;
        const Stored* const from = values_;
        values_ += L::count(bits);
        return from;
    }

    static void prefetch(const void* from, std::uintptr_t ahead) {
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) + ahead), 0, 2);
    }

   public:
    void open(const Matrix& w, std::size_t row) {
        values_ = static_cast<const Stored*>(w.values) + row * w.kept;
        end_ = values_ + w.kept;
        mask_ = FORM == Form::dense ? nullptr : w.mask + row * words(w.d_in) * (WORD / 8);
    }

    void begin_word() {
        if constexpr (FORM == Form::counted) values_ = values_ < end_ ? values_ : end_;
    }

    // Have what lies so many bytes further brought to the second-level cache, as much as a word takes.
    void prefetch_values(std::uintptr_t ahead) const {
        constexpr std::size_t BYTES = (FORM == Form::dense ? WORD : WORD / 2) * sizeof(Stored);
        for (std::size_t line = 0; line < BYTES; line += LINE) prefetch(values_, ahead + line);
    }

    void prefetch_mask(std::uintptr_t ahead) const {
        if constexpr (FORM != Form::dense) prefetch(mask_, ahead);
    }

    template <int BATCH>
    typename L::Weights step(int step) {
        if constexpr (FORM == Form::dense) return L::load(take(step, 0));
        if constexpr (FORM == Form::half && BATCH == 1) return expand_half<V>(values_, mask_, step);
        const auto kept = bits(step);
        return L::expand(take(step, kept), kept);
    }

    void place(int step, Stored* out) {
        const auto kept = bits(step);
        L::place(take(step, kept), kept, out);
    }

    void end_word() {
        if constexpr (FORM == Form::dense) values_ += WORD;
        if constexpr (FORM == Form::half) values_ += WORD / 2;
        if constexpr (FORM != Form::dense) mask_ += WORD / 8;
    }
};

template <Values V>
struct Job {
    using Stored = typename Lanes<V>::Stored;
    using Input = typename Lanes<V>::Input;

    const Matrix& w;
    const Input* x;
    std::size_t batch;
    const Stored* bias;
    Stored* y;
};

// ROWS rows of W, beginning at `row`, times BATCH rows of x, beginning at `start`. Every element of y is the total of
// CHAINS sums, each in the same order whatever is computed beside it. That there are several sums in all hides the
// latency of an addition; where x is a single row, registers are left for more than one an element.
template <Values V, Form FORM, int ROWS, int BATCH, int CHAINS>
void block(const Job<V>& job, std::size_t row, std::size_t start) {
    using L = Lanes<V>;
    constexpr int STEPS = int(WORD) / L::COLUMNS;
    const std::size_t count = words(job.w.d_in), mask_row = count * (WORD / 8);
    // The same place in the next rows, whose beginning the processor itself would not have foreseen.
    const std::uintptr_t ahead = ROWS * job.w.kept * sizeof(typename L::Stored);
    Reader<V, FORM> readers[ROWS];
    typename L::Sum sums[ROWS][BATCH][CHAINS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        readers[r].open(job.w, row + r);
#pragma GCC unroll 8
        for (int n = 0; n < BATCH; ++n)
#pragma GCC unroll 8
            for (int chain = 0; chain < CHAINS; ++chain) sums[r][n][chain] = typename L::Sum{};
    }
    const typename L::Input* x = job.x + start * count * WORD;
    for (std::size_t word = 0; word < count; ++word) {
        readers[0].prefetch_mask((ROWS + word % 8) * mask_row);  // a line holds eight words: each time another row's
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            readers[r].prefetch_values(ahead);
            readers[r].begin_word();
        }
#pragma GCC unroll UNROLLED
        for (int step = 0; step < STEPS; ++step) {
            typename L::Weights weights[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) weights[r] = readers[r].template step<BATCH>(step);
#pragma GCC unroll 8
            for (int n = 0; n < BATCH; ++n)
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r)
                    L::add(sums[r][n][step % CHAINS], weights[r], x + (step * BATCH + n) * L::COLUMNS);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) readers[r].end_word();
        x += BATCH * WORD;
    }
#pragma GCC unroll 8  // else the sums would have to lie in memory, where the next rows' loads wait for them
    for (int r = 0; r < ROWS; ++r) {
        const float bias = job.bias ? Number<V>::widen(job.bias[row + r]) : 0.0f;
#pragma GCC unroll 8
        for (int n = 0; n < BATCH; ++n) {
            float total = L::total(sums[r][n][0]);
#pragma GCC unroll 8
            for (int chain = 1; chain < CHAINS; ++chain) total += L::total(sums[r][n][chain]);
            job.y[(start + n) * job.w.d_out + row + r] = Number<V>::narrow(total + bias);
        }
    }
}

template <Values V, Form FORM, int BATCH, int CHAINS = 1>
void rows(const Job<V>& job, std::size_t row, std::size_t last, std::size_t start) {
    constexpr int ROWS = BATCH == 1 ? ROWS_FOR_ONE : ROWS_FOR_MORE;
    for (; row + ROWS <= last; row += ROWS) block<V, FORM, ROWS, BATCH, CHAINS>(job, row, start);
    for (; row < last; ++row) block<V, FORM, 1, BATCH, CHAINS>(job, row, start);
}

// Only the first block of x finds the weights in memory, the others in a cache; a block of x stays there all the while.
template <Values V, Form FORM>
void multiply_form(const Job<V>& job, std::size_t row, std::size_t last) {
    if (job.batch == 1) return rows<V, FORM, 1, CHAINS_FOR_ONE>(job, row, last, 0);
    for (std::size_t start = 0; start < job.batch; start += BLOCK) switch (job.batch - start) {
            case 1: rows<V, FORM, 1>(job, row, last, start); break;
            case 2: rows<V, FORM, 2>(job, row, last, start); break;
            case 3: rows<V, FORM, 3>(job, row, last, start); break;
            default: rows<V, FORM, BLOCK>(job, row, last, start);
        }
}

template <Values V>
void multiply(const Matrix& w, const void* arranged, std::size_t batch, const void* bias, void* y, std::size_t first,
              std::size_t last) {
    using Stored = typename Job<V>::Stored;
    const Job<V> job{w, static_cast<const typename Job<V>::Input*>(arranged), batch, static_cast<const Stored*>(bias),
                     static_cast<Stored*>(y)};
    if (w.mask && w.half)
        multiply_form<V, Form::half>(job, first, last);
    else if (w.mask)
        multiply_form<V, Form::counted>(job, first, last);
    else
        multiply_form<V, Form::dense>(job, first, last);
}

template <Values V>
std::size_t arranged(std::size_t batch, std::size_t d_in) {
    return batch * words(d_in) * WORD * sizeof(typename Lanes<V>::Input);
}

// Blocks of x one after the other; within a block, what is multiplied with the same weights lies together. The columns
// that complete the last word are zeros, since zero weights would not cancel a NaN.
template <Values V>
void arrange(const void* from, std::size_t batch, std::size_t d_in, void* to) {
    using L = Lanes<V>;
    const auto* x = static_cast<const typename L::Stored*>(from);
    auto* out = static_cast<typename L::Input*>(to);
    for (std::size_t start = 0; start < batch; start += BLOCK) {
        const std::size_t count = batch - start < BLOCK ? batch - start : BLOCK;
        for (std::size_t column = 0; column < words(d_in) * WORD; column += L::COLUMNS)
            for (std::size_t n = start; n < start + count; ++n, out += L::COLUMNS) {
                const auto* from_column = x + n * d_in + column;
                if (column + L::COLUMNS <= d_in)
                    for (std::size_t i = 0; i < L::COLUMNS; ++i) out[i] = L::input(from_column[i]);
                else
                    for (std::size_t i = 0; i < L::COLUMNS; ++i)
                        out[i] = column + i < d_in ? L::input(from_column[i]) : typename L::Input(0);
            }
    }
}

template <Values V, Form FORM>
void expand_form(const Matrix& w, std::size_t first, std::size_t last, void* to) {
    using L = Lanes<V>;
    using Stored = typename L::Stored;
    constexpr int STEPS = int(WORD) / L::COLUMNS;
    auto* out = static_cast<Stored*>(to);
    for (std::size_t row = first; row < last; ++row) {
        Reader<V, FORM> reader;
        reader.open(w, row);
        for (std::size_t column = 0; column < w.d_in; column += WORD) {
            const std::size_t width = w.d_in - column < WORD ? w.d_in - column : WORD;
            Stored rest[WORD];
            Stored* const target = width == WORD ? out : rest;
            reader.begin_word();
            for (int step = 0; step < STEPS; ++step) reader.place(step, target + step * L::COLUMNS);
            reader.end_word();
            if (width < WORD) std::memcpy(out, rest, width * sizeof(Stored));
            out += width;
        }
    }
}

template <Values V>
void expand(const Matrix& w, std::size_t first, std::size_t last, void* out) {
    if (w.half)
        expand_form<V, Form::half>(w, first, last, out);
    else
        expand_form<V, Form::counted>(w, first, last, out);
}

template <Values V>
Kernels kernels() {
    return {&arranged<V>, &arrange<V>, &multiply<V>, &expand<V>};
}

}  // namespace

Kernels sparse_linear_kernels(Values held) {
    switch (held) {
        case Values::bf16: return kernels<Values::bf16>();
        case Values::fp16: return kernels<Values::fp16>();
        default: return kernels<Values::fp32>();
    }
}

}  // namespace halve::HALVE_ISA
