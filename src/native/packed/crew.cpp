#include "crew.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace halve {
namespace {

using Clock = std::chrono::steady_clock;
// How long a thread looks for work before it sleeps: the time between two layers, which waking up would double.
constexpr auto PATIENCE = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Look until `ready` or for as long as PATIENCE; returns whether it is ready.
template <typename Ready>
bool look_for(Ready ready) {
    const auto until = Clock::now() + PATIENCE;
    for (int look = 1; !ready(); ++look) {
        if (look % 64 == 0 && Clock::now() > until) return false;
        pause();
    }
    return true;
}

// The threads, and the one task they have at a time. Everything but the hints is guarded by `mutex_`.
class Crew {
    std::mutex taken_, mutex_;
    std::condition_variable work_, done_;
    const std::function<void()>* task_ = nullptr;
    std::size_t threads_ = 0, wanted_ = 0, active_ = 0;
    std::atomic<bool> work_hint_{false}, busy_hint_{false};

    void live() {
        for (;;) {
            look_for([&] { return work_hint_.load(std::memory_order_relaxed); });
            std::unique_lock<std::mutex> lock(mutex_);
            work_.wait(lock, [&] { return wanted_ > 0; });
            if (--wanted_ == 0) work_hint_ = false;
            ++active_;
            const std::function<void()>& task = *task_;
            lock.unlock();
            task();
            lock.lock();
            if (--active_ == 0) {
                busy_hint_ = false;
                done_.notify_one();
            }
        }
    }

    void grow(std::size_t helpers) {
        for (; threads_ < helpers; ++threads_) {
            try {
                std::thread([this] { live(); }).detach();
            } catch (const std::system_error&) {  // no more threads to be had: those there are do it
                return;
            }
        }
    }

   public:
    // Have `helpers` threads call `task` while the caller does. Those that have not begun when the caller is done are
    // not waited for: the task is one that whoever calls it finishes.
    void help(std::size_t helpers, const std::function<void()>& task) {
        std::unique_lock<std::mutex> alone(taken_, std::try_to_lock);
        if (!alone) return task();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(helpers);
            task_ = &task;
            wanted_ = helpers < threads_ ? helpers : threads_;
            work_hint_ = busy_hint_ = wanted_ > 0;
        }
        work_.notify_all();
        task();
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;
        work_hint_ = false;
        if (active_ == 0) return;
        lock.unlock();
        look_for([&] { return !busy_hint_.load(std::memory_order_relaxed); });
        lock.lock();
        done_.wait(lock, [&] { return active_ == 0; });
    }
};

// Never destroyed: its threads wait in it until the process is gone.
std::atomic<Crew*> crew{nullptr};

// The OpenMP that PyTorch was linked with, if it is loaded and has one.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> parallel{[] {
    void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel")) : nullptr;  // also its dependencies'
}()};

// A child has no threads but the one that forked, and locks that nobody will release: it forgets them all.
void forget() {
    crew = nullptr;
    parallel = nullptr;
}

Crew& the_crew() {
    Crew* found = crew;
    if (found) return *found;
    auto* fresh = new Crew;
    if (!crew.compare_exchange_strong(found, fresh)) {
        delete fresh;
        return *found;
    }
    return *fresh;
}

// Where this cannot be arranged, nobody waits for work.
const bool SAFE = pthread_atfork(nullptr, nullptr, forget) == 0;

}  // namespace

void share_work(std::size_t count, std::size_t part, std::size_t threads,
                const std::function<void(std::size_t, std::size_t)>& work) {
    const std::size_t parts = (count + part - 1) / part;
    if (threads <= 1 || parts <= 1 || !SAFE) {
        if (count) work(0, count);
        return;
    }
    // Everyone goes through a stretch of their own, in which one part's end prefetches the next one's beginning, and then
    // helps with the others'.
    const std::size_t callers = threads < parts ? threads : parts;
    std::vector<std::atomic<std::size_t>> next(callers);
    for (std::size_t stretch = 0; stretch < callers; ++stretch) next[stretch] = stretch * parts / callers;
    std::atomic<std::size_t> joined{0};
    const std::function<void()> task = [&] {
        const std::size_t own = joined.fetch_add(1, std::memory_order_relaxed);
        for (std::size_t turn = 0; turn < callers; ++turn) {
            const std::size_t stretch = (own + turn) % callers, end = (stretch + 1) * parts / callers;
            for (std::size_t i; (i = next[stretch].fetch_add(1, std::memory_order_relaxed)) < end;)
                work(i * part, count - i * part < part ? count : (i + 1) * part);
        }
    };
    if (const Parallel torch_threads = parallel)
        torch_threads([](void* task) { (*static_cast<const std::function<void()>*>(task))(); },
                      const_cast<std::function<void()>*>(&task), unsigned(callers), 0);
    else
        the_crew().help(callers - 1, task);
}

}  // namespace halve
