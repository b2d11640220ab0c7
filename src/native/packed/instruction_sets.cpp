#include "instruction_sets.hpp"

namespace halve {
namespace {

#ifdef HALVE_X86
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("popcnt");
}

// With what both kinds of kernels take beside the products themselves.
[[maybe_unused]] bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi2");
}
#endif

// Best first; the last runs everywhere.
std::vector<InstructionSet> supported() {
    std::vector<InstructionSet> rows;
#ifdef HALVE_X86
#ifdef HALVE_BF16
    if (has_avx512() && __builtin_cpu_supports("avx512bf16"))
        rows.push_back({"avx512", avx512::sparse_linear_kernels, avx512::between_kernels});
#endif
    if (has_avx2()) rows.push_back({"avx2", avx2::sparse_linear_kernels, avx2::between_kernels});
#endif
    rows.push_back({"portable", portable::sparse_linear_kernels, portable::between_kernels});
    return rows;
}

std::vector<QuantisedInstructionSet> supported_quantised() {
    std::vector<QuantisedInstructionSet> rows;
#ifdef HALVE_X86
#ifdef HALVE_VNNI
    if (has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
        rows.push_back({"avx512", avx512::quantised_kernels});
#endif
#ifdef HALVE_AVXVNNI
    if (has_avx2() && __builtin_cpu_supports("avxvnni")) rows.push_back({"avxvnni", avxvnni::quantised_kernels});
#endif
    if (has_avx2()) rows.push_back({"avx2", avx2::quantised_kernels});
#endif
    rows.push_back({"portable", portable::quantised_kernels});
    return rows;
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> rows = supported();
    return rows;
}

const std::vector<QuantisedInstructionSet>& quantised_instruction_sets() {
    static const std::vector<QuantisedInstructionSet> rows = supported_quantised();
    return rows;
}

}  // namespace halve
