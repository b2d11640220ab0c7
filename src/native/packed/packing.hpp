// Packing a dense matrix that has its pattern already; the format and its rules are those of halve/runtime/packed_matrix.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halve {

struct Packing {
    const void* weight;            // (d_out, d_in), row-major
    std::size_t d_out, d_in;
    std::size_t keep, group;       // so many of every group are kept; d_in is a multiple of group
    std::uint8_t* mask;            // (d_out, mask_bytes(d_in))
    void* values;                  // (d_out * d_in / group * keep), of the weight's width
};

// Pack the rows [first, last); of groups with fewer non-zeros the leftmost zeros are kept, -0.0 before +0.0. Returns
// false, having written nothing of use, if a group has more non-zeros than are kept. `wide` is whether numbers have 32
// bits instead of 16.
bool pack_rows(const Packing& job, bool wide, std::size_t first, std::size_t last);

}  // namespace halve
