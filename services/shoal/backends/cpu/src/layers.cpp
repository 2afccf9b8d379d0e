// Whole layers in one call: with few rows, what lies between two kernels would take as long as some of them. Where all
// rows are single ones of their sequences, the threads go through the layers together.
#include <algorithm>

#include "crew.hpp"
#include "heads.hpp"
#include "kernels.hpp"
#include "layers.hpp"
#include "linear.hpp"
#include "room.hpp"
#include "row_blocks.hpp"
#include "simd.hpp"

namespace shoal {
namespace {

// With more, gates are made as they are multiplied; of fewer, weights are read quicker from end to end.
constexpr int64_t FEW_ROWS = 16;
// With more, a piece takes so long that one that's done twice would be felt, and threads are seldom waited for.
constexpr int64_t TOGETHER = 64;
static_assert(TOGETHER <= MANY_ROWS);  // of more rows, each thread would take all pieces of a product, and claim none

// What passes between the kernels of a layer, and what some of them keep.
struct Scratch {
    Room<bf16> normed, heads, mixed, both, gated, added;
    Room<float> parts;
    Room<char> bytes;
};

class Runner {
   public:
    Runner(const Shape& shape, const Step& step, Scratch& scratch, int num_threads)
        : shape_(shape), step_(step), scratch_(scratch), num_threads_(num_threads) {}

    // Room for all that the layers pass on: nobody makes any on the way. It's kept: the next step is as large.
    void fit(const Layer* layers, int64_t num_layers) {
        const int64_t rows = step_.num_rows, mixed = shape_.num_heads * shape_.head_dim;
        scratch_.normed.of(rows * shape_.hidden_size);
        scratch_.added.of(rows * shape_.hidden_size);
        scratch_.heads.of(rows * heads_size());
        scratch_.mixed.of(rows * mixed);
        scratch_.gated.of(rows * shape_.intermediate_size);
        const int64_t widest = std::max(shape_.hidden_size, mixed);
        int64_t both = 0, parts = 0, bytes = step_.head ? kept_by(step_.head->by, widest) : 0;
        for (const Layer* layer = layers; layer < layers + num_layers; layer++) {
            if (!gates_at_once()) both = rows * 2 * shape_.intermediate_size;
            for (const Matrix* by : {&layer->qkv, &layer->out, &layer->gate_up, &layer->down})
                bytes = std::max(bytes, kept_by(*by, std::max(widest, shape_.intermediate_size)));
            const Reads& reads = step_.reads[layer->reads];
            for (const Group* of = reads.groups; of < reads.groups + reads.num_groups; of++)
                parts = std::max(parts, kept_by_attention(of->batch, of->longest, (int)shape_.num_heads,
                                                          (int)shape_.head_dim, num_threads_));
        }
        scratch_.both.of(both);
        scratch_.parts.of(parts);
        scratch_.bytes.of(bytes);
    }

    // Whether all rows are single ones, and few.
    bool can_go_together(const Layer* layers, int64_t num_layers) const {
        return step_.num_rows <= TOGETHER && std::all_of(layers, layers + num_layers, [&](const Layer& layer) {
            return !step_.reads[layer.reads].num_prompts;
        });
    }
    // At most, of a layer.
    int64_t num_shares(const Layer& layer) const {
        // Five norms, rotation, gate, four products, and attention's parts, which are then joined.
        return 7 + num_shares(layer.qkv) + num_shares(layer.out) + num_shares(layer.gate_up) + num_shares(layer.down) +
               2 * step_.reads[layer.reads].num_groups;
    }
    int64_t num_claims(const Layer& layer) const {
        int64_t number = num_claims(heads_size()) + num_claims(2 * shape_.intermediate_size) +
                         2 * num_claims(shape_.hidden_size);
        const Reads& reads = step_.reads[layer.reads];
        for (const Group* of = reads.groups; of < reads.groups + reads.num_groups; of++)
            number += 4 * num_threads_ + of->batch;
        return number;
    }
    // Of a product: of int8 inputs become bytes first.
    static int64_t num_shares(const Matrix& by) { return by.scales ? 2 : 1; }
    static int64_t num_claims(int64_t num_outputs) { return num_outputs / PANEL + 1; }

    // Where it isn't by blocks of rows, a layer's MLP is added to the states by the next one's first norm.
    bool run(const Layer* layers, int64_t num_layers) {
        if (!step_.head && std::all_of(layers, layers + num_layers, [&](const Layer& layer) {
                return goes_by_blocks(shape_, layer, step_.num_rows, num_threads_);
            }))
            return std::all_of(layers, layers + num_layers, [&](const Layer& layer) { return run_by_blocks(layer); });
        for (int64_t i = 0; i < num_layers; i++) {
            const void* const added = i ? scratch_.added.numbers() : nullptr;
            if (!(add_norm(added, layers[i].input_norm) && attention(layers[i]) &&
                  add_norm(scratch_.added.numbers(), layers[i].mlp_norm) && mlp(layers[i])))
                return false;
        }
        const bf16* const added = scratch_.added.numbers();
        if (const Head* const head = step_.head)
            return add_norm(added, head->norm) && multiply(head->by, scratch_.normed.numbers(), shape_.hidden_size,
                                                           head->num_outputs, static_cast<bf16*>(head->logits));
        return !shoal_add_norm(step_.hidden, added, nullptr, step_.num_rows, shape_.hidden_size, shape_.eps, step_.hidden,
                               nullptr, num_threads_);
    }

   private:
    int64_t heads_size() const { return (shape_.num_heads + 2 * shape_.kv_heads) * shape_.head_dim; }
    bool gates_at_once() const { return step_.num_rows > FEW_ROWS && shape_.intermediate_size % PANEL == 0; }
    bool rotates_as_it_multiplies(const Layer& layer) const {
        return !layer.qkv.scales && !layer.q_norm && !layer.k_norm && rotates_at_once(step_.num_rows, shape_.head_dim);
    }
    int64_t kept_by(const Matrix& by, int64_t size) const {
        if (!by.scales) return 0;
        return by.is_by_rows ? kept_by_whole(step_.num_rows, size) : kept_by_int8(step_.num_rows, size);
    }

    bool attention(const Layer& layer) {
        const int64_t size = heads_size();
        const Store store = store_of(layer);
        bf16* const heads = scratch_.heads.numbers();
        if (rotates_as_it_multiplies(layer)) {
            if (rotated_linear(scratch_.normed.numbers(), layer.qkv.weights, layer.qkv.bias, step_.num_rows, size,
                               shape_.hidden_size, heads_of(store), num_threads_))
                return false;
        } else if (!(multiply(layer.qkv, scratch_.normed.numbers(), shape_.hidden_size, size, heads) &&
                     norm_heads(layer, heads, size) &&
                     !shoal_rotate_store(heads, size, store.cos, store.sin, step_.num_rows, (int)shape_.num_heads,
                                         (int)shape_.kv_heads, (int)shape_.head_dim, layer.pool, step_.slots,
                                         num_threads_))) {
            return false;
        }
        return attend(layer) &&
               multiply(layer.out, scratch_.mixed.numbers(), shape_.num_heads * shape_.head_dim, shape_.hidden_size,
                        scratch_.added.numbers()) &&
               norm(layer.attention_post_norm, scratch_.added.numbers(), step_.num_rows, shape_.hidden_size, num_threads_);
    }

    // Of all rows' queries, to `mixed`.
    bool attend(const Layer& layer) {
        const int64_t size = heads_size();
        const Reads& reads = step_.reads[layer.reads];
        bf16 *const heads = scratch_.heads.numbers(), *const mixed = scratch_.mixed.numbers();
        for (int64_t i = 0; i < reads.num_prompts; i++) {
            const Prompt& of = reads.prompts[i];
            if (shoal_attend_prompt(heads + of.first_row * size, size, layer.pool, of.slots, of.first_slot, of.num_context,
                                    of.num_rows, (int)shape_.num_heads, (int)shape_.kv_heads, (int)shape_.head_dim,
                                    of.window, shape_.attention_scale,
                                    mixed + of.first_row * shape_.num_heads * shape_.head_dim, num_threads_))
                return false;
        }
        for (int64_t i = 0; i < reads.num_groups; i++) {
            const Group& of = reads.groups[i];
            if (attend_decode(heads, size, of.rows, layer.pool, of.slots, of.first_slot, of.longest, of.lengths, of.batch,
                              (int)shape_.num_heads, (int)shape_.kv_heads, (int)shape_.head_dim, shape_.attention_scale,
                              mixed, num_threads_, scratch_.parts.numbers()))
                return false;
        }
        return true;
    }

    bool run_by_blocks(const Layer& layer) {
        bf16* const hidden = static_cast<bf16*>(step_.hidden);
        const Store store = store_of(layer);
        heads_by_blocks(shape_, layer, hidden, step_.num_rows, heads_of(store), num_threads_);
        if (!attend(layer)) return false;
        mlp_by_blocks(shape_, layer, scratch_.mixed.numbers(), hidden, step_.num_rows, num_threads_);
        return true;
    }

    Store store_of(const Layer& layer) const {
        const Rope& rope = step_.ropes[layer.rope];
        return {static_cast<bf16*>(layer.pool), static_cast<const bf16*>(rope.cos), static_cast<const bf16*>(rope.sin)};
    }
    Heads heads_of(const Store& store) {
        const Output queries = {scratch_.heads.numbers(), heads_size()};
        return {&store, queries, step_.slots, shape_.num_heads, shape_.kv_heads, shape_.head_dim};
    }

    // Where a family norms queries and keys. Each row by itself: they lie apart.
    bool norm_heads(const Layer& layer, bf16* heads, int64_t row_size) {
        constexpr int64_t PIECE = 8;
        if (!layer.q_norm && !layer.k_norm) return true;
        if (shape_.head_dim % 16) return false;
        share_ranges(step_.num_rows, PIECE, num_threads_, [&](int64_t begin, int64_t end) {
            for (bf16* row = heads + begin * row_size; row < heads + end * row_size; row += row_size) {
                norm(layer.q_norm, row, shape_.num_heads, shape_.head_dim, 1);
                norm(layer.k_norm, row + shape_.num_heads * shape_.head_dim, shape_.kv_heads, shape_.head_dim, 1);
            }
        });
        return true;
    }

    bool mlp(const Layer& layer) {
        const int64_t size = shape_.intermediate_size;
        return gate(layer.gate_up, size, scratch_.gated.numbers()) &&
               multiply(layer.down, scratch_.gated.numbers(), size, shape_.hidden_size, scratch_.added.numbers()) &&
               norm(layer.mlp_post_norm, scratch_.added.numbers(), step_.num_rows, shape_.hidden_size, num_threads_);
    }

    bool gate(const Matrix& by, int64_t size, bf16* out) {
        const bf16* const normed = scratch_.normed.numbers();
        if (gates_at_once() && by.scales) return by_int8(by, normed, shape_.hidden_size, 2 * size, shape_.activation, out);
        if (gates_at_once())
            return !shoal_gated_linear(normed, by.weights, by.bias, step_.num_rows, size, shape_.hidden_size,
                                       shape_.activation, out, num_threads_);
        return multiply(by, normed, shape_.hidden_size, 2 * size, scratch_.both.numbers()) &&
               !shoal_gate(scratch_.both.numbers(), shape_.activation, step_.num_rows, size, out, num_threads_);
    }

    bool multiply(const Matrix& by, const bf16* inputs, int64_t size, int64_t num_outputs, bf16* out) {
        if (by.is_by_rows)
            return !whole_linear(inputs, by.weights, by.scales, step_.num_rows, num_outputs, size, out, num_threads_,
                                 scratch_.bytes.numbers());
        if (by.scales) return by_int8(by, inputs, size, num_outputs, -1, out);
        return !shoal_linear(inputs, by.weights, by.bias, step_.num_rows, num_outputs, size, out, num_threads_);
    }

    bool by_int8(const Matrix& by, const bf16* inputs, int64_t size, int64_t num_outputs, int activation, bf16* out) {
        return !int8_linear(inputs, by.weights, by.scales, by.bias, step_.num_rows, num_outputs, size, activation, out,
                            num_threads_, scratch_.bytes.numbers());
    }

    // In place; nothing without a weight.
    bool norm(const void* weight, bf16* rows, int64_t num_rows, int64_t size, int num_threads) {
        return !weight ||
               !shoal_add_norm(rows, nullptr, weight, num_rows, size, shape_.eps, nullptr, rows, num_threads);
    }

    // The states, with `added` to them, if any; normed beside.
    bool add_norm(const void* added, const void* weight) {
        return !shoal_add_norm(step_.hidden, added, weight, step_.num_rows, shape_.hidden_size, shape_.eps,
                               step_.hidden, scratch_.normed.numbers(), num_threads_);
    }

    const Shape& shape_;
    const Step& step_;
    Scratch& scratch_;
    const int num_threads_;
};

}  // namespace
}  // namespace shoal

// The states `hidden` [num_rows, hidden_size] of a step go through the layers, in place; K/V of its rows are in each
// layer's pool afterwards, and with a head `logits` [num_rows, num_outputs] are made of them. Returns 0, or 1 if one of the
// kernels can't.
extern "C" int shoal_layers(const void* shape, const void* layers, int64_t num_layers, const void* step,
                            int num_threads) {
    using namespace shoal;
    static thread_local Scratch scratch;
    Runner runner(*static_cast<const Shape*>(shape), *static_cast<const Step*>(step), scratch, num_threads);
    const Layer* const given = static_cast<const Layer*>(layers);
    runner.fit(given, num_layers);
    if (!runner.can_go_together(given, num_layers)) return runner.run(given, num_layers) ? 0 : 1;
    int64_t num_shares = 1, num_claims = 0;
    if (const Head* const head = static_cast<const Step*>(step)->head) {
        num_shares += runner.num_shares(head->by);
        num_claims += runner.num_claims(head->num_outputs);
    }
    for (int64_t i = 0; i < num_layers; i++) {
        num_shares += runner.num_shares(given[i]);
        num_claims += runner.num_claims(given[i]);
    }
    std::atomic<bool> can{true};
    go_together(num_threads, num_shares, num_claims, [&] {
        if (!runner.run(given, num_layers)) can = false;
    });
    return can ? 0 : 1;
}
