// Products of a few vectors with a matrix whose kept weights are integers of 8 or 4 bits and a float16 scale for every
// word of 64 columns. The vectors are quantised too, to 8 bits and a scale for every 32 columns; what is summed over
// these is exact. The format is that of halve/runtime/quantised_matrix.py. The same source is compiled once for each
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparse_linear.hpp"

namespace halve {

struct QuantisedMatrix {
    const std::uint8_t* mask;     // one bit a column, rows padded to whole words; null if dense
    const std::uint8_t* codes;    // of the kept ones, word after word; of 4 bits, the first of a byte is the lower half
    const std::uint16_t* scales;  // float16, one a word, OVERREAD of no meaning at the end
    std::size_t d_out, d_in;
    std::size_t kept;  // weights of a word, an even number; WORD if dense
    int bits;          // 8: two's complement; 4: the integer plus 8
    bool half;         // four are kept of every eight columns

    std::size_t word_bytes() const { return kept * std::size_t(bits) / 8; }
};

struct QuantisedKernels {
    // Bytes for x as the kernels want it, aligned to 64.
    std::size_t (*arranged)(std::size_t batch, std::size_t d_in);
    // Quantise x, (batch, d_in), and put it there, for codes of so many bits. A vector with NaN or infinity in it makes
    // its sums NaN.
    void (*arrange)(Values held, int bits, const void* x, std::size_t batch, std::size_t d_in, void* arranged);
    // Compute the columns [first, last) of y, (batch, d_out); bias, (d_out,), may be null. Whatever the mask holds,
    // nothing outside the matrix and its OVERREAD bytes of codes is read.
    void (*multiply)(const QuantisedMatrix& w, const void* arranged, std::size_t batch, Values held, const void* bias,
                     void* y, std::size_t first, std::size_t last);
    // Write the rows [first, last) as dense ones, (last - first, d_in), each weight its integer times the scale.
    void (*expand)(const QuantisedMatrix& w, Values held, std::size_t first, std::size_t last, void* out);
};

#define HALVE_DECLARE(isa) \
    namespace isa {        \
    QuantisedKernels quantised_kernels(); \
    }

HALVE_DECLARE(portable)
HALVE_DECLARE(avx2)
HALVE_DECLARE(avxvnni)
HALVE_DECLARE(avx512)

#undef HALVE_DECLARE

}  // namespace halve
