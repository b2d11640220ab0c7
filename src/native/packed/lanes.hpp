// How an instruction set expands packed weights and multiplies them: one `Lanes` for each kind of values. Everything is
// inline and lives in the namespace of one instruction set; nothing here may call a template of the standard library,
// of which the linker would keep one copy for all.
#pragma once

#include <cstdint>
#include <cstring>

#include "number.hpp"
#include "sparse_linear.hpp"

namespace halve::HALVE_ISA {
namespace {

template <Values V>
struct Lanes;

// What a step of a word multiplies where half of every byte is kept and registers are left over, as for one row of x.
// `values` and `mask` are those of the word.
template <Values V>
typename Lanes<V>::Weights expand_half(const typename Lanes<V>::Stored* values, const std::uint8_t* mask, int step) {
    typename Lanes<V>::Bits bits;
    std::memcpy(&bits, mask + step * sizeof(bits), sizeof(bits));
    return Lanes<V>::expand(values + step * Lanes<V>::COLUMNS / 2, bits);
}

}  // namespace
}  // namespace halve::HALVE_ISA

#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
#include "lanes_avx512.hpp"
#elif defined(__AVX2__)
#include "lanes_avx2.hpp"
#else
#include "lanes_portable.hpp"
#endif
