// How a product is shared among threads, and the memory that it takes meanwhile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>

#include "quantised.hpp"
#include "sparse_linear.hpp"

namespace halve {

constexpr std::size_t PART_BYTES = 1 << 17;  // of weights: what a thread takes at a time
constexpr std::size_t PART_ROWS = 12;        // parts are multiples of this, so that kernels of 2 to 4 rows leave none over

constexpr std::size_t value_bytes(Values held) { return held == Values::fp32 ? 4 : 2; }

inline std::size_t row_bytes(const Matrix& w, Values held) {
    return w.kept * value_bytes(held) + (w.mask ? words(w.d_in) * 8 : 0);
}

inline std::size_t row_bytes(const QuantisedMatrix& w) {
    return w.strips() * (w.strip_codes() + (w.places ? STRIP_PLACES : 0) + 4);
}

// Rows of a part, of `rows` that each are so many bytes: about as many parts for every thread.
inline std::size_t rows_of_part(std::size_t rows, std::size_t bytes, std::size_t threads) {
    const std::size_t most = std::max<std::size_t>(1, PART_BYTES / bytes / PART_ROWS) * PART_ROWS;
    const std::size_t rounds = std::max<std::size_t>(1, (rows + most * threads - 1) / (most * threads));
    const std::size_t even = (rows + rounds * threads - 1) / (rounds * threads);
    return std::max(PART_ROWS, std::min(most, (even + PART_ROWS - 1) / PART_ROWS * PART_ROWS));
}

// Memory that a thread keeps from call to call, for what its calls need while they run; aligned to 64.
class Workspace {
    void* memory_ = nullptr;
    std::size_t size_ = 0;

    void release() { ::operator delete(memory_, std::align_val_t(64)); }

   public:
    ~Workspace() { release(); }

    void* get(std::size_t size) {
        if (size <= size_) return memory_;
        release();
        memory_ = nullptr;
        size_ = 0;
        memory_ = ::operator new(size, std::align_val_t(64));
        size_ = size;
        return memory_;
    }
};

}  // namespace halve
