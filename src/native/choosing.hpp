// Choosing among the instruction sets of a module by name: rows have a `name`, those of the processor are there.
#pragma once

#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace halve {

template <typename Row>
const Row& find_row(const std::vector<Row>& rows, const std::string& name) {
    for (const Row& row : rows)
        if (name == row.name) return row;
    throw std::invalid_argument("this processor has no instruction set called " + name);
}

template <typename Row>
nanobind::tuple names_of(const std::vector<Row>& rows) {
    nanobind::list found;
    for (const Row& row : rows) found.append(row.name);
    return nanobind::tuple(found);
}

}  // namespace halve
