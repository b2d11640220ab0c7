// Runs the packed kernels with every array ending exactly where the format says it ends, for the sanitizers to watch:
//
//     make sanitize
//
// Results are held to a plain loop in double; the Python tests hold the same kernels to PyTorch.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../src/native/packed/crew.hpp"
#include "../../src/native/packed/decoder.hpp"
#include "../../src/native/packed/packing.hpp"
#include "../../src/native/packed/quantised.hpp"
#include "../../src/native/packed/sparse_linear.hpp"

namespace {

using namespace halve;

std::mt19937 random_bits(0);

// Memory that ends where its last element does, at an address that is a multiple of an element and of nothing more.
struct Exact {
    std::unique_ptr<char[]> memory;
    char* data;
    explicit Exact(std::size_t bytes, std::size_t element) : memory(new char[bytes + element]), data(memory.get() + element) {
        std::memset(data, 0, bytes);
    }
};

double widened(Values held, const void* at) {
    if (held == Values::fp32) return *static_cast<const float*>(at);
    std::uint16_t bits;
    std::memcpy(&bits, at, 2);
    if (held == Values::bf16) {
        const std::uint32_t wide = std::uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    return std::ldexp((bits & 1023) + 1024, (bits >> 10 & 31) - 25) * (bits & 0x8000 ? -1 : 1);  // normal ones
}

void put(Values held, void* at, int value) {  // value / 4, |value| < 128 and not 0: exact in all three
    const float wide = float(value) / 4;
    std::uint32_t bits;
    std::memcpy(&bits, &wide, 4);
    const auto upper = std::uint16_t(bits >> 16);
    const auto half = std::uint16_t((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13);
    if (held == Values::fp32) std::memcpy(at, &wide, 4);
    if (held == Values::bf16) std::memcpy(at, &upper, 2);
    if (held == Values::fp16) std::memcpy(at, &half, 2);
}

int number() { return int(random_bits() % 31 + 1) * (random_bits() % 2 ? 1 : -1); }

bool run(const char* name, const Kernels& kernels, Values held, std::size_t d_out, std::size_t d_in, bool half, bool wild,
         std::size_t batch) {
    const std::size_t element = held == Values::fp32 ? 4 : 2, row_bytes = words(d_in) * 8;
    const std::size_t kept = half ? d_in / 2 : (d_in + 2) / 3;
    Exact mask(d_out * row_bytes, 1), values((d_out * kept + OVERREAD) * element, element);
    Exact x(batch * d_in * element, element), bias(d_out * element, element), y(batch * d_out * element, element);
    Exact rows(d_out * d_in * element, element);
    std::vector<double> dense(d_out * d_in, 0.0);
    char* value = values.data;
    for (std::size_t row = 0; row < d_out; ++row)
        for (std::size_t column = 0, used = 0; column < d_in; ++column) {
            const std::size_t group = column / 4 * 2, left = d_in - column;
            bool keep = half ? used < group + 2 && (random_bits() % 2 || group + 2 - used == 4 - column % 4)
                             : used < kept && random_bits() % left < kept - used;
            if (!keep) continue;
            ++used;
            mask.data[row * row_bytes + column / 8] |= char(1 << column % 8);
            put(held, value, number());
            dense[row * d_in + column] = widened(held, value);
            value += element;
        }
    if (wild) std::memset(mask.data, 0xff, d_out * row_bytes);
    for (std::size_t i = 0; i < batch * d_in; ++i) put(held, x.data + i * element, number());
    for (std::size_t i = 0; i < d_out; ++i) put(held, bias.data + i * element, number());
    const Matrix w{reinterpret_cast<std::uint8_t*>(mask.data), values.data, d_out, d_in, kept, half};
    const std::size_t bytes = kernels.arranged(batch, d_in);
    std::unique_ptr<void, void (*)(void*)> arranged(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
    kernels.arrange(x.data, batch, d_in, arranged.get());
    share_work(d_out, 4, 3, [&](std::size_t first, std::size_t last) {
        kernels.multiply(w, arranged.get(), batch, bias.data, y.data, first, last);
        kernels.expand(w, first, last, rows.data + first * d_in * element);
    });
    if (wild) return true;
    for (std::size_t row = 0; row < d_out; ++row)
        for (std::size_t n = 0; n < batch; ++n) {
            double sum = widened(held, bias.data + row * element);
            for (std::size_t i = 0; i < d_in; ++i) sum += dense[row * d_in + i] * widened(held, x.data + (n * d_in + i) * element);
            const double got = widened(held, y.data + (n * d_out + row) * element);
            if (sum != 0 && std::fabs(got - sum) > std::fabs(sum) / 256 + 1e-3) {
                std::printf("%s: %g instead of %g\n", name, got, sum);
                return false;
            }
        }
    for (std::size_t i = 0; i < d_out * d_in; ++i)
        if (dense[i] != 0 && widened(held, rows.data + i * element) != dense[i]) return false;
    return true;
}

bool all(const char* name, Kernels (*kernels_of)(Values)) {
    bool right = true;
    for (const Values held : {Values::bf16, Values::fp16, Values::fp32})
        for (const std::size_t d_in : {4, 8, 60, 64, 68, 128, 252})
            for (const std::size_t d_out : {1, 3, 13})
                for (const std::size_t batch : {1, 2, 3, 4, 7, 16})
                    for (const bool half : {false, true})
                        for (const bool wild : {false, true})
                            right &= run(name, kernels_of(held), held, d_out, d_in, half, wild, batch);
    std::printf("%s: %s\n", name, right ? "right" : "WRONG");
    return right;
}

// A quantised matrix, at 2:4 or dense, of random integers and scales of 1/64.
bool run_quantised(const char* name, const QuantisedKernels& kernels, int bits, std::size_t d_out, std::size_t d_in,
                   bool dense, bool wild, std::size_t batch) {
    const std::size_t strips = (d_in + STRIP - 1) / STRIP, kept = dense ? STRIP : KEPT;
    Exact places(d_out * strips * STRIP_PLACES, 1), codes(d_out * strips * kept * bits / 8, 1);
    Exact scales((2 * d_out * strips + OVERREAD) * 2, 2);
    Exact x(batch * d_in * 4, 4), y(batch * d_out * 4, 4), rows(d_out * d_in * 4, 4);
    std::vector<double> matrix(d_out * d_in, 0.0);
    for (std::size_t i = 0; i < 2 * d_out * strips; ++i) std::memcpy(scales.data + 2 * i, "\x00\x24", 2);  // 1/64
    for (std::size_t row = 0; row < d_out; ++row)
        for (std::size_t i = 0; i < strips * kept; ++i) {
            const std::size_t strip = i / kept, in_strip = i % kept, per = dense ? WORD : KEPT;
            const int first = int(random_bits() % 3);
            if (!dense && i % 2 == 0)
                for (std::size_t k = in_strip, place = first; k < in_strip + 2; ++k, place = first + 1 + random_bits() % (3 - first))
                    places.data[(row * strips + strip) * STRIP_PLACES + k % 16] |= char(place << k / 16 * 2);
            std::size_t column = i;
            if (!dense)
                column = i / 2 * 4 + (places.data[(row * strips + strip) * STRIP_PLACES + in_strip % 16] >> in_strip / 16 * 2 & 3);
            const int value = column < d_in ? int(random_bits() % 15) - 7 : 0;
            const std::size_t at = (row * strips + strip) * kept * bits / 8 + in_strip / per * per * bits / 8, k = in_strip % per;
            if (bits == 8)
                codes.data[at + k] = char(value);
            else
                codes.data[at + k % (per / 2)] |= char((value + 8) << (k < per / 2 ? 0 : 4));
            if (column < d_in) matrix[row * d_in + column] = value / 64.0;
        }
    if (wild) {
        std::memset(places.data, 0xff, d_out * strips * STRIP_PLACES);
        std::memset(codes.data, 0xff, d_out * strips * kept * bits / 8);
    }
    for (std::size_t n = 0; n < batch; ++n)
        for (std::size_t i = 0; i < d_in; i += 1 + random_bits() % 40) {
            const float value = float(number()) / 8;
            std::memcpy(x.data + (n * d_in + i) * 4, &value, 4);
        }
    const QuantisedMatrix w{dense ? nullptr : reinterpret_cast<std::uint8_t*>(places.data),
                            reinterpret_cast<std::uint8_t*>(codes.data), reinterpret_cast<std::uint16_t*>(scales.data), d_out,
                            d_in, bits};
    const std::size_t bytes = kernels.arranged(w, batch);
    std::unique_ptr<void, void (*)(void*)> arranged(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
    kernels.arrange(w, Values::fp32, x.data, batch, arranged.get());
    share_work(d_out, 4, 3, [&](std::size_t first, std::size_t last) {
        kernels.multiply(w, arranged.get(), batch, Values::fp32, nullptr, y.data, first, last);
        kernels.expand(w, Values::fp32, first, last, rows.data + first * d_in * 4);
    });
    if (wild) return true;
    for (std::size_t i = 0; i < d_out * d_in; ++i)
        if (widened(Values::fp32, rows.data + i * 4) != matrix[i]) return false;
    for (std::size_t row = 0; row < d_out; ++row)
        for (std::size_t n = 0; n < batch; ++n) {
            double sum = 0, size = 0;
            for (std::size_t i = 0; i < d_in; ++i) {
                sum += matrix[row * d_in + i] * widened(Values::fp32, x.data + (n * d_in + i) * 4);
                size += std::fabs(matrix[row * d_in + i]);
            }
            const double got = widened(Values::fp32, y.data + (n * d_out + row) * 4);
            if (std::fabs(got - sum) > size * (31.0 / 8 / 254) + 1e-5) {  // half a step of the largest x there may be
                std::printf("%s, %d bits: %g instead of %g\n", name, bits, got, sum);
                return false;
            }
        }
    return true;
}

bool all_quantised(const char* name, const QuantisedKernels& kernels) {
    bool right = true;
    for (const int bits : {8, 4})
        for (const std::size_t d_in : {4, 60, 64, 128, 132, 384, 1156})
            for (const std::size_t d_out : {1, 3, 13})
                for (const std::size_t batch : {1, 2, 3, 4, 7, 16})
                    for (const bool dense : {false, true})
                        for (const bool wild : {false, true})
                            right &= run_quantised(name, kernels, bits, d_out, d_in, dense, wild, batch);
    std::printf("%s, quantised: %s\n", name, right ? "right" : "WRONG");
    return right;
}

bool callers() {  // several at once, some of which find the waiting threads taken
    std::vector<std::thread> threads;
    std::vector<int> counts(4 * 1000, 0);
    for (int caller = 0; caller < 4; ++caller)
        threads.emplace_back([&counts, caller] {
            for (int call = 0; call < 50; ++call)
                share_work(1000, 7, 3, [&](std::size_t first, std::size_t last) {
                    for (; first < last; ++first) ++counts[caller * 1000 + first];
                });
        });
    for (std::thread& thread : threads) thread.join();
    bool right = true;
    for (const int count : counts) right &= count == 50;
    std::printf("callers at once: %s\n", right ? "right" : "WRONG");
    return right;
}

// Callers that are done before their helpers, and so wait for them at the same time: each has to be woken. Were the
// threads to serve them all at once, some would sleep for ever.
bool waiting_callers() {
    for (int round = 0; round < 100; ++round) {
        std::atomic<int> calls{0};
        std::vector<std::thread> threads;
        for (int caller = 0; caller < 4; ++caller)
            threads.emplace_back([&calls] {
                const auto self = std::this_thread::get_id();
                share_work(3, 1, 3, [&](std::size_t, std::size_t) {
                    ++calls;
                    if (std::this_thread::get_id() != self) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                });
            });
        for (std::thread& thread : threads) thread.join();
        if (calls != 4 * 3) return false;
    }
    std::puts("callers that wait: right");
    return true;
}

// Packing keeps two of every four, the zeros of a group with fewer non-zeros among them, and refuses a third.
template <typename Bits>
bool packs() {
    constexpr std::size_t D_OUT = 5, D_IN = 68, ROW = words(D_IN) * 8;
    Exact weight(D_OUT * D_IN * sizeof(Bits), sizeof(Bits)), mask(D_OUT * ROW, 1);
    Exact values(D_OUT * D_IN / 2 * sizeof(Bits), sizeof(Bits));
    std::vector<Bits> dense(D_OUT * D_IN, 0);
    for (std::size_t group = 0; group < dense.size(); group += 4)
        for (std::size_t i = group + random_bits() % 3; i < group + 4; i += 2) dense[i] = Bits(random_bits());
    std::memcpy(weight.data, dense.data(), dense.size() * sizeof(Bits));
    const Packing job{weight.data, D_OUT, D_IN, 2, 4, reinterpret_cast<std::uint8_t*>(mask.data), values.data};
    if (!pack_rows(job, sizeof(Bits) == 4, 0, 3) || !pack_rows(job, sizeof(Bits) == 4, 3, D_OUT)) return false;
    std::size_t used = 0;
    for (std::size_t i = 0; i < dense.size(); ++i) {
        Bits value = 0;
        if (mask.data[i / D_IN * ROW + i % D_IN / 8] >> i % D_IN % 8 & 1)
            std::memcpy(&value, values.data + used++ * sizeof(Bits), sizeof(Bits));
        if (value != dense[i]) return false;
    }
    std::memset(weight.data, 1, 4 * sizeof(Bits));
    return used == dense.size() / 2 && !pack_rows(job, sizeof(Bits) == 4, 0, 1);
}

// Blocks in which matrices of all forms lie side by side, on three threads and on one: the same bits, and numbers. Keys
// and values lie in memory that ends with the last token that there is room for.
bool decodes(const char* name, Values held, const Kernels& plain, const QuantisedKernels& integers,
             const BetweenKernels& between) {
    constexpr std::size_t HIDDEN = 64, HEADS = 2, KEY_HEADS = 1, WIDTH = 32, INNER = 64, BATCH = 2, BLOCKS = 2, LENGTH = 20;
    const std::size_t element = held == Values::fp32 ? 4 : 2;
    std::vector<std::unique_ptr<Exact>> arrays;
    const auto numbers = [&](std::size_t count) {
        arrays.push_back(std::make_unique<Exact>(count * element, element));
        for (std::size_t i = 0; i < count; ++i)
            put(held, arrays.back()->data + i * element, 1 + int(random_bits() % 3));
        return arrays.back()->data;
    };
    const auto dense = [&](std::size_t d_out, std::size_t d_in) {
        return Weight{false, {nullptr, numbers(d_out * d_in), d_out, d_in, d_in, false}, {}, numbers(d_out)};
    };
    const auto quantised = [&](std::size_t d_out, std::size_t d_in) {
        const std::size_t strips = (d_in + STRIP - 1) / STRIP;
        arrays.push_back(std::make_unique<Exact>(d_out * strips * STRIP, 1));
        char* const codes = arrays.back()->data;
        for (std::size_t row = 0; row < d_out; ++row)
            for (std::size_t i = 0; i < d_in; ++i) codes[row * strips * STRIP + i] = char(random_bits() % 9 - 4);
        arrays.push_back(std::make_unique<Exact>((2 * d_out * strips + OVERREAD) * 2, 2));
        auto* const scales = reinterpret_cast<std::uint16_t*>(arrays.back()->data);
        for (std::size_t i = 0; i < 2 * d_out * strips; ++i) scales[i] = 0x2400;  // 1/64
        return Weight{true, {}, {nullptr, reinterpret_cast<std::uint8_t*>(codes), scales, d_out, d_in, 8}, nullptr};
    };
    const auto packed = [&](std::size_t d_out, std::size_t d_in) {  // the first and the third of every four columns
        arrays.push_back(std::make_unique<Exact>(d_out * words(d_in) * 8, 1));
        auto* const mask = reinterpret_cast<std::uint8_t*>(arrays.back()->data);
        std::memset(mask, 0x55, d_out * words(d_in) * 8);
        const char* const values = numbers(d_out * d_in / 2 + OVERREAD);
        return Weight{false, {mask, values, d_out, d_in, d_in / 2, true}, {}, nullptr};
    };
    const auto quartered = [&](std::size_t d_out, std::size_t d_in) {  // 4 bits at 2:4, the first two of every four
        const std::size_t strips = (d_in + STRIP - 1) / STRIP;
        arrays.push_back(std::make_unique<Exact>(d_out * strips * STRIP_PLACES, 1));
        char* const places = arrays.back()->data;
        for (std::size_t i = 0; i < d_out * strips * STRIP_PLACES; ++i) places[i] = i % 2 ? 0x55 : 0;
        arrays.push_back(std::make_unique<Exact>(d_out * strips * KEPT / 2, 1));
        char* const codes = arrays.back()->data;
        for (std::size_t i = 0; i < d_out * strips * KEPT / 2; ++i) codes[i] = char(0x80 | random_bits() % 16);
        arrays.push_back(std::make_unique<Exact>((2 * d_out * strips + OVERREAD) * 2, 2));
        auto* const scales = reinterpret_cast<std::uint16_t*>(arrays.back()->data);
        for (std::size_t i = 0; i < 2 * d_out * strips; ++i) scales[i] = 0x2400;  // 1/64
        return Weight{true, {}, {reinterpret_cast<std::uint8_t*>(places), reinterpret_cast<std::uint8_t*>(codes), scales,
                                 d_out, d_in, 4}, nullptr};
    };
    const void* const last_norm = numbers(HIDDEN);
    Decoder decoder(held, plain, integers, between, {HIDDEN, HEADS, KEY_HEADS, WIDTH, INNER, 1e-5f, 0.2f}, last_norm);
    for (std::size_t i = 0; i < BLOCKS; ++i)
        decoder.add({numbers(HIDDEN), numbers(HIDDEN), i ? numbers(WIDTH) : nullptr, i ? numbers(WIDTH) : nullptr,
                     dense(HEADS * WIDTH, HIDDEN), quantised(KEY_HEADS * WIDTH, HIDDEN), packed(KEY_HEADS * WIDTH, HIDDEN),
                     packed(HIDDEN, HEADS * WIDTH), quartered(INNER, HIDDEN), dense(INNER, HIDDEN),
                     quantised(HIDDEN, INNER)});
    const std::size_t bytes = BATCH * HIDDEN * element;
    const char* const embedded = numbers(BATCH * HIDDEN);
    std::vector<std::uint8_t> shown(BATCH * (LENGTH + 1), 1);
    shown[0] = shown[1] = 0;
    Step step{BATCH, nullptr, numbers(BATCH * WIDTH), numbers(BATCH * WIDTH), {}, LENGTH, LENGTH + 1, shown.data(), 1};
    for (std::size_t i = 0; i < BLOCKS; ++i)
        step.tokens.push_back({numbers(BATCH * KEY_HEADS * (LENGTH + 1) * WIDTH),
                               numbers(BATCH * KEY_HEADS * (LENGTH + 1) * WIDTH)});
    std::vector<std::vector<char>> found;
    for (const std::size_t threads : {1, 3}) {
        Exact x(bytes, element);
        std::memcpy(x.data, embedded, bytes);
        step.x = x.data;
        step.threads = threads;
        decoder.run(step);
        found.emplace_back(x.data, x.data + bytes);
    }
    bool right = found[0] == found[1];
    for (std::size_t i = 0; i < BATCH * HIDDEN; ++i) {
        const double value = widened(held, found[0].data() + i * element);
        right &= value == value && std::fabs(value) < 1e4;
    }
    std::printf("%s, next token, kind %d: %s\n", name, int(held), right ? "right" : "WRONG");
    return right;
}

bool all_decode(const char* name, Kernels (*plain)(Values), const QuantisedKernels& integers,
                BetweenKernels (*between)(Values)) {
    bool right = true;
    for (const Values held : {Values::bf16, Values::fp16, Values::fp32})
        right &= decodes(name, held, plain(held), integers, between(held));
    return right;
}

}  // namespace

int main() {
    alarm(120);  // ends what is never woken
    bool right = callers() && waiting_callers() && packs<std::uint16_t>() && packs<std::uint32_t>();
    alarm(0);
    right &= all("portable", halve::portable::sparse_linear_kernels);
    right &= all_quantised("portable", halve::portable::quantised_kernels());
    right &= all_decode("portable", halve::portable::sparse_linear_kernels, halve::portable::quantised_kernels(),
                        halve::portable::between_kernels);
#ifdef HALVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        right &= all("avx2", halve::avx2::sparse_linear_kernels) & all_quantised("avx2", halve::avx2::quantised_kernels()) &
                 all_decode("avx2", halve::avx2::sparse_linear_kernels, halve::avx2::quantised_kernels(),
                            halve::avx2::between_kernels);
    else
        std::puts("avx2: not on this processor");
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16"))
        right &= all("avx512", halve::avx512::sparse_linear_kernels) &
                 all_decode("avx512", halve::avx512::sparse_linear_kernels, halve::portable::quantised_kernels(),
                            halve::avx512::between_kernels);
    else
        std::puts("avx512: not on this processor");
    if (__builtin_cpu_supports("avxvnni"))
        right &= all_quantised("avxvnni", halve::avxvnni::quantised_kernels());
    else
        std::puts("avxvnni: not on this processor");
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni"))
        right &= all_quantised("avx512", halve::avx512::quantised_kernels());
    else
        std::puts("avx512, quantised: not on this processor");
#endif
    return right ? 0 : 1;
}
