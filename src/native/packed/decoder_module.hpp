#pragma once

#include <nanobind/nanobind.h>

namespace halve {

void define_decoder(nanobind::module_& module);

}  // namespace halve
