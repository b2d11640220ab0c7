// Threads that wait for work, so that a product of a millisecond need not start any: PyTorch's own where it computes
// with OpenMP, since its threads keep looking for work for milliseconds after each operation and would leave others no
// processor. Elsewhere, and in a forked child, for which OpenMP has no threads, they are ours.
#pragma once

#include <cstddef>
#include <functional>

namespace halve {

// Call `work(begin, end)` for parts of [0, count) that together are all of it, each at most `part` long, on at most
// `threads` threads of which the caller is one; return when everything is done. The parts begin at multiples of `part`.
//
// Our threads serve one caller at a time; who comes meanwhile works alone. A forked child gets its own.
void share_work(std::size_t count, std::size_t part, std::size_t threads,
                const std::function<void(std::size_t, std::size_t)>& work);

}  // namespace halve
