// Whole layers in one call, where each row is the newest token of a sequence: with few rows, what lies between two
// kernels would take as long as some of them.
#include <vector>

#include "kernels.hpp"
#include "simd.hpp"

namespace shoal {
namespace {

// The structures are those of kernels/layers.py.

struct Shape {
    int64_t hidden_size, intermediate_size, num_heads, kv_heads, head_dim;
    float eps, attention_scale;
    int32_t activation;
};

// bfloat16, or with `scales` int8; without a bias none.
struct Matrix {
    const void *weights, *scales, *bias;
};

// Norms that a family doesn't have are none. `rope` and `reads` say which of a step's are this layer's.
struct Layer {
    const void* input_norm;
    Matrix qkv;
    const void *q_norm, *k_norm;
    Matrix out;
    const void *attention_post_norm, *mlp_norm;
    Matrix gate_up, down;
    const void* mlp_post_norm;
    void* pool;
    int64_t rope, reads;
};

// Of shoal_attend_decode.
struct Group {
    const int64_t *rows, *slots;
    int64_t first_slot, longest;
    const int64_t* lengths;
    int64_t batch;
};

struct Reads {
    const Group* groups;
    int64_t num_groups;
};

struct Rope {
    const void *cos, *sin;
};

struct Step {
    int64_t num_rows;
    void* hidden;
    const int64_t* slots;
    const Rope* ropes;
    const Reads* reads;
};

// What passes between the kernels of a layer.
struct Scratch {
    std::vector<bf16> normed, heads, mixed, both, gated, added;

    void fit(const Shape& shape, int64_t rows) {
        normed.resize(rows * shape.hidden_size);
        added.resize(rows * shape.hidden_size);
        heads.resize(rows * (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim);
        mixed.resize(rows * shape.num_heads * shape.head_dim);
        both.resize(rows * 2 * shape.intermediate_size);
        gated.resize(rows * shape.intermediate_size);
    }
};

class Runner {
   public:
    Runner(const Shape& shape, const Step& step, Scratch& scratch, int num_threads)
        : shape_(shape), step_(step), scratch_(scratch), num_threads_(num_threads) {
        scratch_.fit(shape, step.num_rows);
    }

    // A layer's MLP is added to the states by the next one's first norm.
    bool run(const Layer* layers, int64_t num_layers) {
        for (int64_t i = 0; i < num_layers; i++) {
            const void* const added = i ? scratch_.added.data() : nullptr;
            if (!(add_norm(added, layers[i].input_norm) && attention(layers[i]) &&
                  add_norm(scratch_.added.data(), layers[i].mlp_norm) && mlp(layers[i])))
                return false;
        }
        add(scratch_.added.data());
        return true;
    }

   private:
    bool attention(const Layer& layer) {
        const int64_t size = (shape_.num_heads + 2 * shape_.kv_heads) * shape_.head_dim;
        const Rope& rope = step_.ropes[layer.rope];
        bf16* const heads = scratch_.heads.data();
        if (!multiply(layer.qkv, scratch_.normed.data(), shape_.hidden_size, size, heads)) return false;
        for (int64_t row = 0; row < step_.num_rows; row++) {
            bf16* const queries = heads + row * size;
            if (!(norm(layer.q_norm, queries, shape_.num_heads, shape_.head_dim, 1) &&
                  norm(layer.k_norm, queries + shape_.num_heads * shape_.head_dim, shape_.kv_heads, shape_.head_dim, 1)))
                return false;
        }
        if (shoal_rotate_store(heads, size, rope.cos, rope.sin, step_.num_rows, (int)shape_.num_heads,
                               (int)shape_.kv_heads, (int)shape_.head_dim, layer.pool, step_.slots, num_threads_))
            return false;
        const Reads& reads = step_.reads[layer.reads];
        for (int64_t i = 0; i < reads.num_groups; i++) {
            const Group& of = reads.groups[i];
            if (shoal_attend_decode(heads, size, of.rows, layer.pool, of.slots, of.first_slot, of.longest, of.lengths,
                                    of.batch, (int)shape_.num_heads, (int)shape_.kv_heads, (int)shape_.head_dim,
                                    shape_.attention_scale, scratch_.mixed.data(), num_threads_))
                return false;
        }
        return multiply(layer.out, scratch_.mixed.data(), shape_.num_heads * shape_.head_dim, shape_.hidden_size,
                        scratch_.added.data()) &&
               norm(layer.attention_post_norm, scratch_.added.data(), step_.num_rows, shape_.hidden_size, num_threads_);
    }

    bool mlp(const Layer& layer) {
        const int64_t size = shape_.intermediate_size;
        return multiply(layer.gate_up, scratch_.normed.data(), shape_.hidden_size, 2 * size, scratch_.both.data()) &&
               !shoal_gate(scratch_.both.data(), shape_.activation, step_.num_rows, size, scratch_.gated.data(),
                           num_threads_) &&
               multiply(layer.down, scratch_.gated.data(), size, shape_.hidden_size, scratch_.added.data()) &&
               norm(layer.mlp_post_norm, scratch_.added.data(), step_.num_rows, shape_.hidden_size, num_threads_);
    }

    bool multiply(const Matrix& by, const bf16* inputs, int64_t size, int64_t num_outputs, bf16* out) {
        if (by.scales)
            return !shoal_int8_linear(inputs, by.weights, by.scales, by.bias, step_.num_rows, num_outputs, size, out,
                                      num_threads_);
        return !shoal_linear(inputs, by.weights, by.bias, step_.num_rows, num_outputs, size, out, num_threads_);
    }

    // In place; nothing without a weight.
    bool norm(const void* weight, bf16* rows, int64_t num_rows, int64_t size, int num_threads) {
        return !weight ||
               !shoal_add_norm(rows, nullptr, weight, num_rows, size, shape_.eps, nullptr, rows, num_threads);
    }

    // The states, with `added` to them, if any; normed beside.
    bool add_norm(const void* added, const void* weight) {
        return !shoal_add_norm(step_.hidden, added, weight, step_.num_rows, shape_.hidden_size, shape_.eps,
                               step_.hidden, scratch_.normed.data(), num_threads_);
    }

    void add(const bf16* added) {
        bf16* const to = static_cast<bf16*>(step_.hidden);
        for (int64_t i = 0; i < step_.num_rows * shape_.hidden_size; i += 16)
            store(to + i, _mm512_add_ps(load(to + i), load(added + i)));
    }

    const Shape& shape_;
    const Step& step_;
    Scratch& scratch_;
    const int num_threads_;
};

}  // namespace
}  // namespace shoal

// The states `hidden` [num_rows, hidden_size] of a step go through the layers, in place; K/V of its rows are in each
// layer's pool afterwards. Returns 0, or 1 if one of the kernels can't.
extern "C" int shoal_layers(const void* shape, const void* layers, int64_t num_layers, const void* step,
                            int num_threads) {
    using namespace shoal;
    static thread_local Scratch scratch;
    Runner runner(*static_cast<const Shape*>(shape), *static_cast<const Step*>(step), scratch, num_threads);
    return runner.run(static_cast<const Layer*>(layers), num_layers) ? 0 : 1;
}
