// The blocks of a model of Llama's kind, run for the next token of a few sequences in one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "between.hpp"
#include "quantised.hpp"
#include "sparse_linear.hpp"

namespace halve {

// A matrix in one of the forms that the kernels multiply: quantised, packed, or dense.
struct Weight {
    bool quantised;
    Matrix plain;
    QuantisedMatrix integers;
    const void* bias;  // (d_out,), null if there is none

    std::size_t d_out() const { return quantised ? integers.d_out : plain.d_out; }
    std::size_t d_in() const { return quantised ? integers.d_in : plain.d_in; }
};

struct Block {
    const void *attention_norm, *mlp_norm;  // (hidden,)
    const void *query_norm, *key_norm;      // (width,), null if there are none
    Weight query, key, value, output, gate, up, down;
};

struct Shape {
    std::size_t hidden, heads, key_heads, width, inner;  // width is that of a head, inner that of the MLP
    float eps, scale;                                    // of the norms; of the products of queries and keys
};

// Where the keys and values of a block's tokens lie, (batch, key_heads, capacity, width) each; this token's are written.
struct Tokens {
    void *keys, *values;
};

struct Step {
    std::size_t batch;
    void* x;                                     // (batch, hidden): what the blocks get, and then what they give
    const void *cosines, *sines;                 // (batch, width)
    std::vector<Tokens> tokens;                  // one a block
    std::size_t length, capacity;                // tokens before this one, and those that there is memory for
    const std::uint8_t* shown;                   // (batch, length + 1), 0 where a token is padding; null if none is
    std::size_t threads;
};

class Decoder {
    const Values held_;
    const Kernels plain_;
    const QuantisedKernels quantised_;
    const BetweenKernels between_;
    const Shape shape_;
    const void* const last_norm_;  // of what the last block gives; null if that is wanted as it is
    std::vector<Block> blocks_;

    struct Product {
        const Weight* weight;
        void* y;
    };

    bool alike(const Weight& one, const Weight& other) const;
    std::size_t arranged(const Weight& weight, std::size_t batch) const;
    void arrange(const Weight& weight, const void* x, std::size_t batch, void* to) const;
    void multiply(const Weight& weight, const void* x, std::size_t batch, void* y, std::size_t first,
                  std::size_t last) const;
    void products(const void* x, const std::vector<Product>& wanted, const Step& step) const;
    void attend(const Tokens& tokens, const void* queries, void* out, const Step& step) const;

   public:
    Decoder(Values held, Kernels plain, QuantisedKernels quantised, BetweenKernels between, Shape shape,
            const void* last_norm)
        : held_(held), plain_(plain), quantised_(quantised), between_(between), shape_(shape), last_norm_(last_norm) {}

    void add(const Block& block) { blocks_.push_back(block); }
    std::size_t blocks() const { return blocks_.size(); }
    void run(const Step& step) const;
};

}  // namespace halve
