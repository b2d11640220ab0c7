// How an instruction set multiplies a strip of quantised weights with one of quantised x. Everything is inline and lives
// in the namespace of one instruction set.
//
// A strip of 128 columns keeps 64 weights at 2:4, in the order of their columns. Instead of spreading these out, the
// kernels gather the numbers of x that they are multiplied with: kept weights 16 l to 16 l + 15 are those of the columns
// 32 l to 32 l + 31, which share a scale of x. Byte i of a strip's places has those of the kept weights i, 16 + i, 32 + i
// and 48 + i, from the lowest bits. Codes of 4 bits are two to a byte: those of one half of a strip, or of a dense word,
// are the lower halves of the bytes, those of the other the upper ones.
#pragma once

#include <cstdint>
#include <cstring>

#include "number.hpp"
#include "quantised.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr std::size_t X_BLOCK = 32;               // columns of x that have a scale
constexpr std::size_t BLOCKS = STRIP / X_BLOCK;   // of a strip
constexpr std::size_t SCALES = 16;                // scales of weights that are widened at a time
constexpr int ZERO_OF_FOUR_BITS = 8;              // what stands for 0 in 4 bits

// The integer of one code; `count` are those that lie together: a strip's kept weights, or a dense word.
inline int integer(const std::uint8_t* codes, int bits, std::size_t index, std::size_t count) {
    if (bits == 8) return std::int8_t(codes[index]);
    const std::size_t half = count / 2;
    return (codes[index % half] >> (index < half ? 0 : 4) & 15) - ZERO_OF_FOUR_BITS;
}

// Where a kept weight is in its strip.
inline std::size_t column_of(const std::uint8_t* places, std::size_t index) {
    return index / 2 * 4 + (places[index % 16] >> (index / 16 * 2) & 3);
}

}  // namespace
}  // namespace halve::HALVE_ISA

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include "quantised_lanes_avx512.hpp"
#elif defined(__AVX2__)
#include "quantised_lanes_avx2.hpp"
#else
#include "quantised_lanes_portable.hpp"
#endif
