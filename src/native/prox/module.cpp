// The Python module: picks the instruction set at run time and spreads groups over threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../choosing.hpp"
#include "two_of_four.hpp"

namespace {

constexpr std::size_t GROUPS_A_THREAD = 1 << 14;  // starting a thread for less costs more than it saves

struct InstructionSet {
    const char* name;
    halve::TwoOfFour<float> f32;
    halve::TwoOfFour<double> f64;
};

#define HALVE_ROW(isa) InstructionSet{#isa, halve::isa::two_of_four_f32, halve::isa::two_of_four_f64}

// Best first; the last runs everywhere.
std::vector<InstructionSet> supported() {
    std::vector<InstructionSet> rows;
#ifdef HALVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        rows.push_back(HALVE_ROW(avx512));
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) rows.push_back(HALVE_ROW(avx2));
#endif
    rows.push_back(HALVE_ROW(portable));
    return rows;
}

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> rows = supported();
    return rows;
}

template <typename T>
bool run(halve::TwoOfFour<T> solve, const T* z, T* out, std::size_t groups, double lam, std::size_t threads) {
    threads = std::max<std::size_t>(1, std::min(threads, groups / GROUPS_A_THREAD));
    std::vector<char> finite(threads, 1);
    std::vector<std::thread> workers;
    workers.reserve(threads);
    const std::size_t share = (groups + threads - 1) / threads;
    const auto part = [&](std::size_t index) {
        const std::size_t start = std::min(groups, index * share), stop = std::min(groups, start + share);
        finite[index] = solve(z + 4 * start, out + 4 * start, stop - start, lam);
    };
    for (std::size_t index = 1; index < threads; ++index) {
        try {
            workers.emplace_back(part, index);
        } catch (const std::system_error&) {  // no more threads to be had: do its part here
            part(index);
        }
    }
    part(0);
    for (std::thread& worker : workers) worker.join();
    return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok != 0; });
}

bool two_of_four(std::uintptr_t z, std::uintptr_t out, std::size_t groups, double lam, bool wide,
                 std::size_t threads, const std::string& name) {
    const InstructionSet& set = halve::find_row(instruction_sets(), name);
    nanobind::gil_scoped_release unlocked;
    if (wide)
        return run(set.f64, reinterpret_cast<const double*>(z), reinterpret_cast<double*>(out), groups, lam, threads);
    return run(set.f32, reinterpret_cast<const float*>(z), reinterpret_cast<float*>(out), groups, lam, threads);
}

nanobind::tuple names() { return halve::names_of(instruction_sets()); }

}  // namespace

NB_MODULE(_native, module) {
    module.def("instruction_sets", &names);
    module.def("two_of_four", &two_of_four, nanobind::arg("z"), nanobind::arg("out"), nanobind::arg("groups"),
               nanobind::arg("lam"), nanobind::arg("wide"), nanobind::arg("threads"),
               nanobind::arg("instruction_set"));
}
