#include "decoder.hpp"

#include <algorithm>

#include "crew.hpp"
#include "sharing.hpp"

namespace halve {
namespace {

char* at(void* place, std::size_t bytes) { return static_cast<char*>(place) + bytes; }

const char* at(const void* place, std::size_t bytes) { return static_cast<const char*>(place) + bytes; }

constexpr std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

// Whether two matrices want their input arranged alike; that they have the same one is the caller's business.
bool Decoder::alike(const Weight& one, const Weight& other) const {
    if (one.quantised != other.quantised) return false;
    return !one.quantised ||
           (one.integers.bits == other.integers.bits && !one.integers.places == !other.integers.places);
}

std::size_t Decoder::arranged(const Weight& weight, std::size_t batch) const {
    return whole_lines(weight.quantised ? quantised_.arranged(weight.integers, batch)
                                        : plain_.arranged(batch, weight.d_in()));
}

void Decoder::arrange(const Weight& weight, const void* x, std::size_t batch, void* to) const {
    if (weight.quantised)
        quantised_.arrange(weight.integers, held_, x, batch, to);
    else
        plain_.arrange(x, batch, weight.d_in(), to);
}

void Decoder::multiply(const Weight& weight, const void* x, std::size_t batch, void* y, std::size_t first,
                       std::size_t last) const {
    if (weight.quantised)
        quantised_.multiply(weight.integers, x, batch, held_, weight.bias, y, first, last);
    else
        plain_.multiply(weight.plain, x, batch, weight.bias, y, first, last);
}

// Several products of one input, (batch, d_in), which the threads go through together.
void Decoder::products(const void* x, const std::vector<Product>& wanted, const Step& step) const {
    std::size_t size = 0, rows = 0, bytes = 0;
    for (const Product& each : wanted) {
        const Weight& weight = *each.weight;
        size += arranged(weight, step.batch);
        rows += weight.d_out();
        bytes += weight.d_out() * (weight.quantised ? row_bytes(weight.integers) : row_bytes(weight.plain, held_));
    }
    thread_local Workspace workspace;
    void* free = workspace.get(size);
    std::vector<const void*> inputs;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        const Weight& weight = *wanted[i].weight;
        std::size_t same = 0;
        while (!alike(*wanted[same].weight, weight)) ++same;
        if (same == i) arrange(weight, x, step.batch, free);
        inputs.push_back(same == i ? free : inputs[same]);
        if (same == i) free = at(free, arranged(weight, step.batch));
    }
    const std::size_t part = rows_of_part(rows, std::max<std::size_t>(1, bytes / rows), step.threads);
    share_work(rows, part, step.threads, [&](std::size_t begin, std::size_t end) {
        std::size_t start = 0;  // of a matrix, among the rows of all
        for (std::size_t i = 0; i < wanted.size() && start < end; ++i) {
            const Weight& weight = *wanted[i].weight;
            const std::size_t stop = start + weight.d_out();
            if (begin < stop)
                multiply(weight, inputs[i], step.batch, wanted[i].y, std::max(begin, start) - start,
                         std::min(end, stop) - start);
            start = stop;
        }
    });
}

// The queries, (batch, heads, width), attend to all tokens, this one among them.
void Decoder::attend(const Tokens& tokens, const void* queries, void* out, const Step& step) const {
    const std::size_t number = value_bytes(held_), shared = shape_.heads / shape_.key_heads;
    const std::size_t heads_of_keys = step.batch * shape_.key_heads, length = step.length + 1;
    // Queries that share keys go together, but where that would leave threads without work.
    const bool together = heads_of_keys % step.threads == 0 || heads_of_keys >= 4 * step.threads;
    const std::size_t count = together ? shared : 1, units = heads_of_keys * shared / count;
    const std::size_t work = count * (length + shape_.width) + shape_.width;
    thread_local Workspace workspace;  // taken here, where there is somebody to tell that there is no memory
    auto* const works = static_cast<float*>(workspace.get(sizeof(float) * units * work));
    share_work(units, 1, step.threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t unit = begin; unit < end; ++unit) {
            const std::size_t key_head = unit * count / shared, row = key_head / shape_.key_heads;
            const std::size_t start = key_head * step.capacity * shape_.width * number;
            const std::size_t place = unit * count * shape_.width * number;
            between_.attend({at(queries, place), at(tokens.keys, start), at(tokens.values, start),
                             step.shown ? step.shown + row * length : nullptr, count, shape_.width, length, shape_.scale,
                             works + unit * work, at(out, place)});
        }
    });
}

void Decoder::run(const Step& step) const {
    const std::size_t number = value_bytes(held_), batch = step.batch, width = shape_.width;
    const std::size_t all_heads = shape_.heads * width, all_keys = shape_.key_heads * width;
    const std::size_t row = shape_.hidden * number, head = width * number;
    const std::size_t sizes[] = {shape_.hidden, all_heads, all_keys, all_keys, all_heads, shape_.inner, shape_.inner};
    thread_local Workspace workspace;
    std::size_t size = 0;
    for (const std::size_t each : sizes) size += whole_lines(batch * each * number);
    void *free = workspace.get(size), *places[7];
    for (int i = 0; i < 7; ++i) {
        places[i] = free;
        free = at(free, whole_lines(batch * sizes[i] * number));
    }
    const auto [normed, queries, keys, values, attended, gate, up] = places;
    const auto norm = [&](const void* x, const void* weight, void* out) {
        for (std::size_t n = 0; n < batch; ++n)
            between_.norm(at(x, n * row), weight, shape_.eps, shape_.hidden, at(out, n * row));
    };
    // Norm and position of heads, (batch, count, width).
    const auto place = [&](void* heads, std::size_t count, const void* weight) {
        for (std::size_t i = 0; weight && i < batch * count; ++i)
            between_.norm(at(heads, i * head), weight, shape_.eps, width, at(heads, i * head));
        for (std::size_t n = 0; n < batch; ++n)
            between_.rotate(at(heads, n * count * head), at(step.cosines, n * head), at(step.sines, n * head), count,
                            width);
    };
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
        const Block& block = blocks_[i];
        norm(step.x, block.attention_norm, normed);
        products(normed, {{&block.query, queries}, {&block.key, keys}, {&block.value, values}}, step);
        place(queries, shape_.heads, block.query_norm);
        place(keys, shape_.key_heads, block.key_norm);
        for (std::size_t h = 0; h < batch * shape_.key_heads; ++h) {
            const std::size_t to = (h * step.capacity + step.length) * head;
            std::copy_n(at(keys, h * head), head, at(step.tokens[i].keys, to));
            std::copy_n(at(values, h * head), head, at(step.tokens[i].values, to));
        }
        attend(step.tokens[i], queries, attended, step);
        products(attended, {{&block.output, normed}}, step);
        between_.add(normed, batch * shape_.hidden, step.x);
        norm(step.x, block.mlp_norm, normed);
        products(normed, {{&block.gate, gate}, {&block.up, up}}, step);
        between_.gate(gate, up, batch * shape_.inner);
        products(gate, {{&block.down, normed}}, step);
        between_.add(normed, batch * shape_.hidden, step.x);
    }
    if (last_norm_) norm(step.x, last_norm_, step.x);
}

}  // namespace halve
