// What lies between the products when a block of Llama's kind computes one token: norms, rotary positions, attention to
// the keys and values of the tokens before, the gate, and sums. Numbers are read and written as a model holds them and
// rounded where transformers rounds them; what lies between two roundings is float32. The same source is compiled once
// for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparse_linear.hpp"

namespace halve {

constexpr std::size_t LANE = 16;  // numbers that are worked on at a time: lengths of vectors are multiples of it

// The queries that share one head of keys and values, and what they attend to.
struct Attention {
    const void* queries;        // (count, width), count after count
    const void *keys, *values;  // (length, width)
    const std::uint8_t* shown;  // (length), 0 where a token is padding; null if none is
    std::size_t count, width, length;
    float scale;  // of the products of queries and keys
    float* work;  // count · (length + width) + width numbers
    void* out;    // (count, width)
};

struct BetweenKernels {
    // x, (n,), divided by its root mean square and multiplied by the weight: RMSNorm.
    void (*norm)(const void* x, const void* weight, float eps, std::size_t n, void* out);
    // Rotate heads, (count, width), in place by cosines and sines, (width,); width is a multiple of 2 LANE.
    void (*rotate)(void* heads, const void* cosines, const void* sines, std::size_t count, std::size_t width);
    void (*attend)(const Attention& job);
    // silu(gate) · up, into gate; (n,).
    void (*gate)(void* gate, const void* up, std::size_t n);
    // x, (n,), added to a sum.
    void (*add)(const void* x, std::size_t n, void* sum);
};

#define HALVE_DECLARE(isa)                       \
    namespace isa {                              \
    BetweenKernels between_kernels(Values held); \
    }

HALVE_DECLARE(portable)
HALVE_DECLARE(avx2)
HALVE_DECLARE(avx512)

#undef HALVE_DECLARE

}  // namespace halve
