// See packing.hpp.
#include "packing.hpp"

#include <cstring>

#include "sparse_linear.hpp"

namespace halve {
namespace {

template <typename Bits>
struct Row {
    const Bits* weight;
    std::uint8_t* mask;
    Bits* values;

    static constexpr Bits SIGN = Bits(1) << (8 * sizeof(Bits) - 1);

    // Keep the columns [begin, begin + group): every non-zero, and as many zeros as there is room for.
    bool pack(std::size_t begin, std::size_t group, std::size_t keep) {
        std::size_t nonzeros = 0, negative = 0;
        for (std::size_t i = begin; i < begin + group; ++i) {
            nonzeros += (weight[i] & Bits(~SIGN)) != 0;
            negative += weight[i] == SIGN;
        }
        if (nonzeros > keep) return false;
        std::size_t zeros = keep - nonzeros;
        std::size_t negatives = negative < zeros ? negative : zeros;
        zeros -= negatives;
        for (std::size_t i = begin; i < begin + group; ++i) {
            const Bits w = weight[i];
            if (w == 0) {
                if (zeros == 0) continue;
                --zeros;
            } else if (w == SIGN) {
                if (negatives == 0) continue;
                --negatives;
            }
            mask[i / 8] |= std::uint8_t(1u << (i % 8));
            *values++ = w;
        }
        return true;
    }
};

template <typename Bits>
bool pack_rows(const Packing& job, std::size_t first, std::size_t last) {
    const std::size_t mask_row = words(job.d_in) * (WORD / 8), kept = job.d_in / job.group * job.keep;
    for (std::size_t r = first; r < last; ++r) {
        Row<Bits> row{static_cast<const Bits*>(job.weight) + r * job.d_in, job.mask + r * mask_row,
                      static_cast<Bits*>(job.values) + r * kept};
        std::memset(row.mask, 0, mask_row);
        for (std::size_t begin = 0; begin < job.d_in; begin += job.group)
            if (!row.pack(begin, job.group, job.keep)) return false;
    }
    return true;
}

}  // namespace

bool pack_rows(const Packing& job, bool wide, std::size_t first, std::size_t last) {
    return wide ? pack_rows<std::uint32_t>(job, first, last) : pack_rows<std::uint16_t>(job, first, last);
}

}  // namespace halve
