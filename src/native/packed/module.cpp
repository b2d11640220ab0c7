// The Python module of the packed products: picks the instruction set at run time and spreads rows over threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../choosing.hpp"
#include "crew.hpp"
#include "decoder_module.hpp"
#include "instruction_sets.hpp"
#include "packing.hpp"
#include "sharing.hpp"

namespace {

using halve::Kernels;
using halve::Matrix;
using halve::QuantisedKernels;
using halve::QuantisedMatrix;
using halve::Values;

void check_held(int held) {
    if (held < 0 || held > int(Values::fp32)) throw std::invalid_argument("no such kind of values");
}

Kernels find(const std::string& name, int held) {
    check_held(held);
    return halve::find_row(halve::instruction_sets(), name).kernels(Values(held));
}

Matrix matrix(std::uintptr_t mask, std::uintptr_t values, std::size_t d_out, std::size_t d_in, std::size_t kept,
              bool half) {
    return {reinterpret_cast<const std::uint8_t*>(mask), reinterpret_cast<const void*>(values), d_out, d_in, kept, half};
}

void multiply(const std::string& name, int held, std::uintptr_t mask, std::uintptr_t values, std::size_t d_out,
              std::size_t d_in, std::size_t kept, bool half, std::uintptr_t x, std::size_t batch, std::uintptr_t bias,
              std::uintptr_t y, std::size_t threads) {
    const Kernels kernels = find(name, held);
    const Matrix w = matrix(mask, values, d_out, d_in, kept, half);
    nanobind::gil_scoped_release unlocked;
    thread_local halve::Workspace workspace;
    void* const arranged = workspace.get(kernels.arranged(batch, d_in));
    kernels.arrange(reinterpret_cast<const void*>(x), batch, d_in, arranged);
    const std::size_t part = halve::rows_of_part(d_out, halve::row_bytes(w, Values(held)), threads);
    halve::share_work(d_out, part, threads, [&](std::size_t first, std::size_t last) {
        kernels.multiply(w, arranged, batch, reinterpret_cast<const void*>(bias), reinterpret_cast<void*>(y), first,
                         last);
    });
}

void expand(const std::string& name, int held, std::uintptr_t mask, std::uintptr_t values, std::size_t d_out,
            std::size_t d_in, std::size_t kept, bool half, std::size_t first, std::size_t last, std::uintptr_t out,
            std::size_t threads) {
    const Kernels kernels = find(name, held);
    const Matrix w = matrix(mask, values, d_out, d_in, kept, half);
    const std::size_t row_bytes = d_in * halve::value_bytes(Values(held));
    nanobind::gil_scoped_release unlocked;
    const std::size_t part = halve::rows_of_part(last - first, halve::row_bytes(w, Values(held)), threads);
    halve::share_work(last - first, part, threads, [&](std::size_t begin, std::size_t end) {
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
    const QuantisedKernels kernels = halve::find_row(halve::quantised_instruction_sets(), name).kernels();
    const QuantisedMatrix w = quantised(places, codes, scales, d_out, d_in, bits);
    nanobind::gil_scoped_release unlocked;
    thread_local halve::Workspace workspace;
    void* const arranged = workspace.get(kernels.arranged(w, batch));
    kernels.arrange(w, Values(held), reinterpret_cast<const void*>(x), batch, arranged);
    const std::size_t part = halve::rows_of_part(d_out, halve::row_bytes(w), threads);
    halve::share_work(d_out, part, threads, [&](std::size_t first, std::size_t last) {
        kernels.multiply(w, arranged, batch, Values(held), reinterpret_cast<const void*>(bias),
                         reinterpret_cast<void*>(y), first, last);
    });
}

void expand_quantised(const std::string& name, int held, std::uintptr_t places, std::uintptr_t codes,
                      std::uintptr_t scales, std::size_t d_out, std::size_t d_in, int bits, std::size_t first,
                      std::size_t last, std::uintptr_t out, std::size_t threads) {
    check_held(held);
    const QuantisedKernels kernels = halve::find_row(halve::quantised_instruction_sets(), name).kernels();
    const QuantisedMatrix w = quantised(places, codes, scales, d_out, d_in, bits);
    const std::size_t row_bytes = d_in * halve::value_bytes(Values(held));
    nanobind::gil_scoped_release unlocked;
    const std::size_t part = halve::rows_of_part(last - first, halve::row_bytes(w), threads);
    halve::share_work(last - first, part, threads, [&](std::size_t begin, std::size_t end) {
        kernels.expand(w, Values(held), first + begin, first + end, reinterpret_cast<char*>(out) + begin * row_bytes);
    });
}

// Returns whether every group has room for its non-zeros.
bool pack(int held, std::uintptr_t weight, std::size_t d_out, std::size_t d_in, std::size_t keep, std::size_t group,
          std::uintptr_t mask, std::uintptr_t values, std::size_t threads) {
    const halve::Packing job{reinterpret_cast<const void*>(weight), d_out, d_in, keep, group,
                             reinterpret_cast<std::uint8_t*>(mask), reinterpret_cast<void*>(values)};
    const std::size_t width = halve::value_bytes(Values(held));
    const std::size_t part = std::max<std::size_t>(1, halve::PART_BYTES / (d_in * width));
    nanobind::gil_scoped_release unlocked;
    std::atomic<bool> fits{true};
    halve::share_work(d_out, part, threads, [&](std::size_t first, std::size_t last) {
        if (!halve::pack_rows(job, width == 4, first, last)) fits = false;
    });
    return fits;
}

nanobind::tuple names() { return halve::names_of(halve::instruction_sets()); }

nanobind::tuple quantised_names() { return halve::names_of(halve::quantised_instruction_sets()); }

}  // namespace

NB_MODULE(_native, module) {
    module.def("instruction_sets", &names);
    module.def("multiply", &multiply);
    module.def("expand", &expand);
    module.def("pack", &pack);
    module.def("quantised_instruction_sets", &quantised_names);
    module.def("multiply_quantised", &multiply_quantised);
    module.def("expand_quantised", &expand_quantised);
    halve::define_decoder(module);
}
