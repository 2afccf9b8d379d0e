// What whole layers are made of: the structures of backends/cpu/layers.py.
#pragma once
#include <cstdint>

namespace shoal {

struct Shape {
    int64_t hidden_size, intermediate_size, num_heads, kv_heads, head_dim;
    float eps, attention_scale;
    int32_t activation;
};

// bfloat16 in panels, or with `scales` int8: in panels, too, or as the shortlist has it, by rows. Without a bias none.
struct Matrix {
    const void *weights, *scales, *bias;
    int64_t is_by_rows;
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

// Of shoal_attend_prompt: rows from `first_row` on.
struct Prompt {
    int64_t first_row, num_rows;
    const int64_t* slots;
    int64_t first_slot, num_context, window;
};

struct Reads {
    const Group* groups;
    int64_t num_groups;
    const Prompt* prompts;
    int64_t num_prompts;
};

struct Rope {
    const void *cos, *sin;
};

// What turns the states of all rows to logits.
struct Head {
    const void* norm;
    Matrix by;
    int64_t num_outputs;
    void* logits;
};

// Without a head there are no logits.
struct Step {
    int64_t num_rows;
    void* hidden;
    const int64_t* slots;
    const Rope* ropes;
    const Reads* reads;
    const Head* head;
};

}  // namespace shoal

extern "C" int shoal_layers(const void* shape, const void* layers, int64_t num_layers, const void* step,
                            int num_threads);
