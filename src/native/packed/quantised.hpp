// Products of a few vectors with a matrix whose weights are integers of 8 or 4 bits, with a float16 scale for every word
// of 64 columns: at 2:4, or dense. The vectors are quantised too, to 8 bits and a scale for every 32 columns; what is
// summed over these is exact. The format is that of halve/runtime/quantised_matrix.py. The same source is compiled once
// for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparse_linear.hpp"

namespace halve {

constexpr std::size_t STRIP = 128;        // columns that are multiplied at a time, two words
constexpr std::size_t KEPT = STRIP / 2;   // weights that a strip keeps at 2:4
constexpr std::size_t STRIP_PLACES = 16;  // bytes

struct QuantisedMatrix {
    const std::uint8_t* places;   // two bits a kept weight: where it is in its group; null if dense
    const std::uint8_t* codes;    // of strip after strip, of word after word if dense
    const std::uint16_t* scales;  // float16, one a word, OVERREAD of no meaning at the end
    std::size_t d_out, d_in;      // rows are filled up to whole strips
    int bits;                     // 8: two's complement; 4: the integer plus 8

    std::size_t strips() const { return (d_in + STRIP - 1) / STRIP; }
    std::size_t strip_codes() const { return (places ? KEPT : STRIP) * std::size_t(bits) / 8; }
};

struct QuantisedKernels {
    // Bytes for x as the kernels want it, aligned to 64.
    std::size_t (*arranged)(const QuantisedMatrix& w, std::size_t batch);
    // Quantise x, (batch, d_in), and put it there. A vector with NaN or infinity in it makes its sums NaN.
    void (*arrange)(const QuantisedMatrix& w, Values held, const void* x, std::size_t batch, void* arranged);
    // Compute the columns [first, last) of y, (batch, d_out); bias, (d_out,), may be null.
    void (*multiply)(const QuantisedMatrix& w, const void* arranged, std::size_t batch, Values held, const void* bias,
                     void* y, std::size_t first, std::size_t last);
    // Write the rows [first, last) as dense ones, (last - first, d_in), each weight its integer times the scale.
    void (*expand)(const QuantisedMatrix& w, Values held, std::size_t first, std::size_t last, void* out);
};

#define HALVE_DECLARE(isa)                \
    namespace isa {                       \
    QuantisedKernels quantised_kernels(); \
    }

HALVE_DECLARE(portable)
HALVE_DECLARE(avx2)
HALVE_DECLARE(avxvnni)
HALVE_DECLARE(avx512)

#undef HALVE_DECLARE

}  // namespace halve
