// `Decoder` for Python, which holds the tensors that the numbers here are addresses of, and has checked their shapes.
#include "decoder_module.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../choosing.hpp"
#include "decoder.hpp"
#include "instruction_sets.hpp"

namespace halve {
namespace {

using Address = std::uintptr_t;

const void* at(Address address) { return reinterpret_cast<const void*>(address); }

const void* there(Address address) {
    if (!address) throw std::invalid_argument("a tensor without memory");
    return at(address);
}

// (bits, places, codes, scales, d_out, d_in, bias) of a quantised matrix, (0, mask, values, half, kept, d_out, d_in,
// bias) of another one; a dense one has no mask.
Weight weight(const std::vector<std::size_t>& of) {
    if (of.size() == 7 && (of[0] == 8 || of[0] == 4)) {
        const QuantisedMatrix matrix{static_cast<const std::uint8_t*>(at(of[1])),
                                     static_cast<const std::uint8_t*>(there(of[2])),
                                     static_cast<const std::uint16_t*>(there(of[3])), of[4], of[5], int(of[0])};
        return {true, {}, matrix, at(of[6])};
    }
    if (of.size() == 8 && of[0] == 0) {
        const Matrix matrix{static_cast<const std::uint8_t*>(at(of[1])), there(of[2]), of[5], of[6], of[4], of[3] != 0};
        return {false, matrix, {}, at(of[7])};
    }
    throw std::invalid_argument("these are no parts of a matrix");
}

void make(Decoder* self, const std::string& plain, const std::string& quantised, int held, std::size_t hidden,
          std::size_t heads, std::size_t key_heads, std::size_t width, std::size_t inner, float eps, float scale,
          Address last_norm) {
    if (held < 0 || held > int(Values::fp32)) throw std::invalid_argument("no such kind of values");
    const InstructionSet& row = find_row(instruction_sets(), plain);
    const QuantisedKernels integers = find_row(quantised_instruction_sets(), quantised).kernels();
    const Shape shape{hidden, heads, key_heads, width, inner, eps, scale};
    new (self) Decoder(Values(held), row.kernels(Values(held)), integers, row.between(Values(held)), shape, at(last_norm));
}

// Norms: of the attention, of the MLP, of queries and of keys. Weights: query, key, value, output, gate, up and down.
void add(Decoder& self, const std::vector<Address>& norms, const std::vector<std::vector<std::size_t>>& weights) {
    if (norms.size() != 4 || weights.size() != 7) throw std::invalid_argument("a block has 4 norms and 7 matrices");
    self.add({there(norms[0]), there(norms[1]), at(norms[2]), at(norms[3]), weight(weights[0]), weight(weights[1]),
              weight(weights[2]), weight(weights[3]), weight(weights[4]), weight(weights[5]), weight(weights[6])});
}

void run(const Decoder& self, std::size_t batch, Address x, Address cosines, Address sines, Address keys,
         Address values, std::size_t block_bytes, std::size_t length, std::size_t capacity, Address shown,
         std::size_t threads) {
    Step step{batch,  reinterpret_cast<void*>(x), at(cosines), at(sines), {}, length, capacity,
              static_cast<const std::uint8_t*>(at(shown)), threads};
    for (std::size_t i = 0; i < self.blocks(); ++i)
        step.tokens.push_back({reinterpret_cast<void*>(keys + i * block_bytes),
                               reinterpret_cast<void*>(values + i * block_bytes)});
    nanobind::gil_scoped_release unlocked;
    self.run(step);
}

}  // namespace

void define_decoder(nanobind::module_& module) {
    nanobind::class_<Decoder>(module, "Decoder").def("__init__", &make).def("add", &add).def("run", &run);
}

}  // namespace halve
