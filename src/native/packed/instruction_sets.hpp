// The kernels of the packed products for every instruction set that this processor runs, best first.
#pragma once

#include <string>
#include <vector>

#include "between.hpp"
#include "quantised.hpp"
#include "sparse_linear.hpp"

namespace halve {

struct InstructionSet {
    const char* name;
    Kernels (*kernels)(Values held);
    BetweenKernels (*between)(Values held);
};

struct QuantisedInstructionSet {
    const char* name;
    QuantisedKernels (*kernels)();
};

const std::vector<InstructionSet>& instruction_sets();

const std::vector<QuantisedInstructionSet>& quantised_instruction_sets();

}  // namespace halve
