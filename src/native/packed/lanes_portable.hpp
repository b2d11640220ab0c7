// Plain C++, with the compiler's own vectors.
#pragma once

#include "lanes.hpp"
#include "places.hpp"

namespace halve::HALVE_ISA {
namespace {

constexpr int ROWS_FOR_ONE = 2, ROWS_FOR_MORE = 1;  // rows of W at a time, for one row of x and for several
constexpr int CHAINS_FOR_ONE = 1;                   // sums of an element, where x is one row
constexpr int UNROLLED = 1;                         // steps of a word

typedef float Eight __attribute__((vector_size(32)));

struct Places {
    std::int8_t of[256][COLUMNS_OF_BYTE];
};

constexpr Places make_places() {
    Places places{};
    for (int byte = 0; byte < 256; ++byte)
        for (int column = 0; column < COLUMNS_OF_BYTE; ++column)
            places.of[byte][column] = std::int8_t(place_of(byte, column));
    return places;
}

constexpr Places PLACES = make_places();

template <Values V>
struct Lanes {
    using Stored = typename Number<V>::Stored;
    using Input = float;
    using Weights = Eight;
    using Sum = Eight;
    using Bits = std::uint8_t;
    static constexpr int COLUMNS = 8;

    static int count(Bits bits) { return __builtin_popcount(bits); }

    static Weights expand(const Stored* values, Bits bits) {
        Weights weights;
        for (int i = 0; i < COLUMNS; ++i) {
            const int place = PLACES.of[bits][i];
            weights[i] = place < 0 ? 0.0f : Number<V>::widen(values[place < 0 ? 0 : place]);
        }
        return weights;
    }

    static void place(const Stored* values, Bits bits, Stored* out) {
        for (int i = 0; i < COLUMNS; ++i) {
            const int place = PLACES.of[bits][i];
            out[i] = place < 0 ? Stored(0) : values[place];
        }
    }

    static Weights load(const Stored* values) {
        Weights weights;
        for (int i = 0; i < COLUMNS; ++i) weights[i] = Number<V>::widen(values[i]);
        return weights;
    }

    static void add(Sum& sum, const Weights& weights, const Input* x) {
        Eight inputs;
        std::memcpy(&inputs, x, sizeof(inputs));
        sum += weights * inputs;
    }

    static float total(const Sum& s) { return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])); }

    static Input input(Stored x) { return Number<V>::widen(x); }
};

}  // namespace
}  // namespace halve::HALVE_ISA
