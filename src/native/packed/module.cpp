// The Python module of the packed products: picks the instruction set at run time and spreads rows over threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../choosing.hpp"
#include "crew.hpp"
#include "packing.hpp"
#include "quantised.hpp"
#include "sparse_linear.hpp"

namespace {

using halve::Kernels;
using halve::Matrix;
using halve::QuantisedKernels;
using halve::QuantisedMatrix;
using halve::Values;

constexpr std::size_t PART_BYTES = 1 << 17;  // of weights: what a thread takes at a time
constexpr std::size_t PART_ROWS = 12;        // parts are multiples of this, so that kernels of 2 to 4 rows leave none over

struct InstructionSet {
    const char* name;
    Kernels (*kernels)(Values held);
};

struct QuantisedInstructionSet {
    const char* name;
    QuantisedKernels (*kernels)();
};

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
        rows.push_back({"avx512", halve::avx512::sparse_linear_kernels});
#endif
    if (has_avx2()) rows.push_back({"avx2", halve::avx2::sparse_linear_kernels});
#endif
    rows.push_back({"portable", halve::portable::sparse_linear_kernels});
    return rows;
}

std::vector<QuantisedInstructionSet> supported_quantised() {
    std::vector<QuantisedInstructionSet> rows;
#ifdef HALVE_X86
#ifdef HALVE_VNNI
    if (has_avx512() && __builtin_cpu_supports("avx512vnni"))
        rows.push_back({"avx512", halve::avx512::quantised_kernels});
#endif
#ifdef HALVE_AVXVNNI
    if (has_avx2() && __builtin_cpu_supports("avxvnni")) rows.push_back({"avxvnni", halve::avxvnni::quantised_kernels});
#endif
    if (has_avx2()) rows.push_back({"avx2", halve::avx2::quantised_kernels});
#endif
    rows.push_back({"portable", halve::portable::quantised_kernels});
    return rows;
}

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> rows = supported();
    return rows;
}

const std::vector<QuantisedInstructionSet>& quantised_instruction_sets() {
    static const std::vector<QuantisedInstructionSet> rows = supported_quantised();
    return rows;
}

void check_held(int held) {
    if (held < 0 || held > int(Values::fp32)) throw std::invalid_argument("no such kind of values");
}

Kernels find(const std::string& name, int held) {
    check_held(held);
    return halve::find_row(instruction_sets(), name).kernels(Values(held));
}

// Memory that a thread keeps from call to call, for what its calls need while they run.
class Workspace {
    void* memory_ = nullptr;
    std::size_t size_ = 0;

    void release() { ::operator delete(memory_, std::align_val_t(64)); }

   public:
    ~Workspace() { release(); }

    void* get(std::size_t size) {
        if (size <= size_) return memory_;
        release();
        memory_ = nullptr;
        size_ = 0;
        memory_ = ::operator new(size, std::align_val_t(64));
        size_ = size;
        return memory_;
    }
};

std::size_t rows_of_part(std::size_t row_bytes) {
    return std::max<std::size_t>(1, PART_BYTES / row_bytes / PART_ROWS) * PART_ROWS;
}

std::size_t rows_of_part(const Matrix& w, std::size_t value_bytes) {
    return rows_of_part(w.kept * value_bytes + (w.mask ? halve::words(w.d_in) * 8 : 0));
}

std::size_t rows_of_part(const QuantisedMatrix& w) {
    return rows_of_part(w.strips() * (w.strip_codes() + (w.places ? halve::STRIP_PLACES : 0) + 4));
}

Matrix matrix(std::uintptr_t mask, std::uintptr_t values, std::size_t d_out, std::size_t d_in, std::size_t kept,
              bool half) {
    return {reinterpret_cast<const std::uint8_t*>(mask), reinterpret_cast<const void*>(values), d_out, d_in, kept, half};
}

std::size_t bytes_of(int held) { return Values(held) == Values::fp32 ? 4 : 2; }

void multiply(const std::string& name, int held, std::uintptr_t mask, std::uintptr_t values, std::size_t d_out,
              std::size_t d_in, std::size_t kept, bool half, std::uintptr_t x, std::size_t batch, std::uintptr_t bias,
              std::uintptr_t y, std::size_t threads) {
    const Kernels kernels = find(name, held);
    const Matrix w = matrix(mask, values, d_out, d_in, kept, half);
    nanobind::gil_scoped_release unlocked;
    thread_local Workspace workspace;
    void* const arranged = workspace.get(kernels.arranged(batch, d_in));
    kernels.arrange(reinterpret_cast<const void*>(x), batch, d_in, arranged);
    halve::share_work(d_out, rows_of_part(w, bytes_of(held)), threads, [&](std::size_t first, std::size_t last) {
        kernels.multiply(w, arranged, batch, reinterpret_cast<const void*>(bias), reinterpret_cast<void*>(y), first,
                         last);
    });
}

void expand(const std::string& name, int held, std::uintptr_t mask, std::uintptr_t values, std::size_t d_out,
            std::size_t d_in, std::size_t kept, bool half, std::size_t first, std::size_t last, std::uintptr_t out,
            std::size_t threads) {
    const Kernels kernels = find(name, held);
    const Matrix w = matrix(mask, values, d_out, d_in, kept, half);
    const std::size_t row_bytes = d_in * bytes_of(held);
    nanobind::gil_scoped_release unlocked;
    halve::share_work(last - first, rows_of_part(w, bytes_of(held)), threads, [&](std::size_t begin, std::size_t end) {
        kernels.expand(w, first + begin, first + end, reinterpret_cast<char*>(out) + begin * row_bytes);
    });
}

QuantisedMatrix quantised(std::uintptr_t places, std::uintptr_t codes, std::uintptr_t scales, std::size_t d_out,
                          std::size_t d_in, int bits) {
    if (bits != 8 && bits != 4) throw std::invalid_argument("no such number of bits");
    return {reinterpret_cast<const std::uint8_t*>(places), reinterpret_cast<const std::uint8_t*>(codes),
            reinterpret_cast<const std::uint16_t*>(scales), d_out, d_in, bits};
}

void multiply_quantised(const std::string& name, int held, std::uintptr_t places, std::uintptr_t codes,
                        std::uintptr_t scales, std::size_t d_out, std::size_t d_in, int bits, std::uintptr_t x,
                        std::size_t batch, std::uintptr_t bias, std::uintptr_t y, std::size_t threads) {
    check_held(held);
    const QuantisedKernels kernels = halve::find_row(quantised_instruction_sets(), name).kernels();
    const QuantisedMatrix w = quantised(places, codes, scales, d_out, d_in, bits);
    nanobind::gil_scoped_release unlocked;
    thread_local Workspace workspace;
    void* const arranged = workspace.get(kernels.arranged(w, batch));
    kernels.arrange(w, Values(held), reinterpret_cast<const void*>(x), batch, arranged);
    halve::share_work(d_out, rows_of_part(w), threads, [&](std::size_t first, std::size_t last) {
        kernels.multiply(w, arranged, batch, Values(held), reinterpret_cast<const void*>(bias),
                         reinterpret_cast<void*>(y), first, last);
    });
}

void expand_quantised(const std::string& name, int held, std::uintptr_t places, std::uintptr_t codes,
                      std::uintptr_t scales, std::size_t d_out, std::size_t d_in, int bits, std::size_t first,
                      std::size_t last, std::uintptr_t out, std::size_t threads) {
    check_held(held);
    const QuantisedKernels kernels = halve::find_row(quantised_instruction_sets(), name).kernels();
    const QuantisedMatrix w = quantised(places, codes, scales, d_out, d_in, bits);
    const std::size_t row_bytes = d_in * bytes_of(held);
    nanobind::gil_scoped_release unlocked;
    halve::share_work(last - first, rows_of_part(w), threads, [&](std::size_t begin, std::size_t end) {
        kernels.expand(w, Values(held), first + begin, first + end, reinterpret_cast<char*>(out) + begin * row_bytes);
    });
}

// Returns whether every group has room for its non-zeros.
bool pack(int held, std::uintptr_t weight, std::size_t d_out, std::size_t d_in, std::size_t keep, std::size_t group,
          std::uintptr_t mask, std::uintptr_t values, std::size_t threads) {
    const halve::Packing job{reinterpret_cast<const void*>(weight), d_out, d_in, keep, group,
                             reinterpret_cast<std::uint8_t*>(mask), reinterpret_cast<void*>(values)};
    const std::size_t width = bytes_of(held), part = std::max<std::size_t>(1, PART_BYTES / (d_in * width));
    nanobind::gil_scoped_release unlocked;
    std::atomic<bool> fits{true};
    halve::share_work(d_out, part, threads, [&](std::size_t first, std::size_t last) {
        if (!halve::pack_rows(job, width == 4, first, last)) fits = false;
    });
    return fits;
}

nanobind::tuple names() { return halve::names_of(instruction_sets()); }

nanobind::tuple quantised_names() { return halve::names_of(quantised_instruction_sets()); }

}  // namespace

NB_MODULE(_native, module) {
    module.def("instruction_sets", &names);
    module.def("multiply", &multiply);
    module.def("expand", &expand);
    module.def("pack", &pack);
    module.def("quantised_instruction_sets", &quantised_names);
    module.def("multiply_quantised", &multiply_quantised);
    module.def("expand_quantised", &expand_quantised);
}
