// Products of a few vectors with a packed matrix, y = x Wᵀ + bias: weights are read once and expanded in registers. The
// format is that of halve/runtime/packed_matrix.py. The same source is compiled once for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halve {

enum class Values { bf16, fp16, fp32 };  // what a matrix, x, bias and y hold; sums are float32

constexpr std::size_t WORD = 64;      // columns in a word of the mask
constexpr std::size_t OVERREAD = 64;  // values after the last kept one that may be read

struct Matrix {
    const std::uint8_t* mask;  // one bit a column, rows padded to whole words; null if dense
    const void* values;        // the kept ones of row after row
    std::size_t d_out, d_in;   // if dense, d_in is a multiple of WORD
    std::size_t kept;          // values in a row
    bool half;                 // four are kept of every eight columns, so that their places need no counting
};

constexpr std::size_t words(std::size_t d_in) { return (d_in + WORD - 1) / WORD; }

struct Kernels {
    // Bytes for x as the kernels want it, aligned to 64.
    std::size_t (*arranged)(std::size_t batch, std::size_t d_in);
    // Put x, (batch, d_in), there.
    void (*arrange)(const void* x, std::size_t batch, std::size_t d_in, void* arranged);
    // Compute the columns [first, last) of y, (batch, d_out); bias, (d_out,), may be null. Whatever the mask holds,
    // nothing outside the matrix and its OVERREAD is read.
    void (*multiply)(const Matrix& w, const void* arranged, std::size_t batch, const void* bias, void* y,
                     std::size_t first, std::size_t last);
    // Write the rows [first, last) of a packed matrix as dense ones, (last - first, d_in).
    void (*expand)(const Matrix& w, std::size_t first, std::size_t last, void* out);
};

#define HALVE_DECLARE(isa)                      \
    namespace isa {                             \
    Kernels sparse_linear_kernels(Values held); \
    }

HALVE_DECLARE(portable)
HALVE_DECLARE(avx2)
HALVE_DECLARE(avx512)

#undef HALVE_DECLARE

}  // namespace halve
