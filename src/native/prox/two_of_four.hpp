// The exact proximal operator of lam * e_3 for groups of four: the compiled twin of halve/maths/proximal.py, where the
// mathematics is explained. The same source is compiled once for each instruction set.
#pragma once

#include <cstddef>

namespace halve {

// Solve `groups` groups of four from z into out; both are contiguous and they do not overlap. Returns false if z holds
// NaN or infinity (out is then meaningless).
template <typename T>
using TwoOfFour = bool (*)(const T* z, T* out, std::size_t groups, double lam);

#define HALVE_DECLARE(isa)                                                                       \
    namespace isa {                                                                              \
    bool two_of_four_f32(const float* z, float* out, std::size_t groups, double lam);            \
    bool two_of_four_f64(const double* z, double* out, std::size_t groups, double lam);          \
    }

HALVE_DECLARE(portable)
HALVE_DECLARE(avx2)
HALVE_DECLARE(avx512)

#undef HALVE_DECLARE

}  // namespace halve
