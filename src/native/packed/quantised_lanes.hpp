// How an instruction set expands a word of quantised weights and multiplies it with a word of quantised x. Everything is
// inline and lives in the namespace of one instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "number.hpp"
#include "places.hpp"
#include "quantised.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr std::size_t X_BLOCK = 32;      // columns of x that have a scale
constexpr std::size_t SCALES = 16;       // scales of weights that are widened at a time
constexpr int ZERO_OF_FOUR_BITS = 8;     // what stands for 0 in 4 bits, and what is added to 8 bits to have none below 0:
constexpr int ZERO_OF_EIGHT_BITS = 128;  // products are of numbers without a sign with such that have one

enum class Form { dense, half, counted };

}  // namespace
}  // namespace halve::HALVE_ISA

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#include "quantised_lanes_avx512.hpp"
#elif defined(__AVX2__)
#include "quantised_lanes_avx2.hpp"
#else
#include "quantised_lanes_portable.hpp"
#endif
