// Threads that wait for work, so that a product of a millisecond need not start any.
#pragma once

#include <cstddef>
#include <functional>

namespace halve {

// Call `work(begin, end)` for parts of [0, count) that together are all of it, each at most `part` long, on at most
// `threads` threads of which the caller is one; return when everything is done. The parts begin at multiples of `part`.
//
// The waiting threads serve one caller at a time; who comes meanwhile works alone. A forked child gets its own.
void share_work(std::size_t count, std::size_t part, std::size_t threads,
                const std::function<void(std::size_t, std::size_t)>& work);

}  // namespace halve
