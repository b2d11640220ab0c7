// Which of the values that follow one another goes to which of eight columns, for every byte of mask.
#pragma once

#include <cstdint>

namespace halve::HALVE_ISA {
namespace {

constexpr int COLUMNS_OF_BYTE = 8;

// For each column whose bit is set the number of set bits before it, else -1.
constexpr int place_of(int byte, int column) {
    if (!(byte >> column & 1)) return -1;
    int before = 0;
    for (int i = 0; i < column; ++i) before += byte >> i & 1;
    return before;
}

}  // namespace
}  // namespace halve::HALVE_ISA
