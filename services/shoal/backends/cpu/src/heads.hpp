// Products whose outputs are queries, keys and values: rotated and put where they belong.
#pragma once
#include "linear.hpp"
#include "simd.hpp"

namespace shoal {

// Where a layer's keys and values go, and by what keys, and queries, are rotated [num_rows, head_dim / 2]: the structure of
// backends/cpu/layers.py.
struct Store {
    bf16* pool;
    const bf16 *cos, *sin;
};

// The outputs of each store are `num_heads` queries, `kv_heads` keys and as many values. Keys and values go to the `slots`
// [num_rows] of its pool, or without them one row after the other; where there are queries, there is one store.
struct Heads {
    const Store* stores;
    Output queries;
    const int64_t* slots;
    int64_t num_heads, kv_heads, head_dim;

    int64_t of_a_store() const { return num_heads + 2 * kv_heads; }
    bool is_rotated(int64_t head) const { return head % of_a_store() < num_heads + kv_heads; }
    const Store& store(int64_t head) const { return stores[head / of_a_store()]; }
    bf16* place(int64_t head, int64_t row) const {
        const int64_t index = head % of_a_store();
        if (index < num_heads) return queries.numbers + row * queries.row + index * head_dim;
        const int64_t slot = slots ? slots[row] : row;
        return store(head).pool + (slot * 2 * kv_heads + index - num_heads) * head_dim;
    }
};

// Whether so many rows' heads are rotated as they are multiplied. Else a pass of its own does that (shoal_rotate_store).
bool rotates_at_once(int64_t num_rows, int64_t head_dim);

// The products of shoal_linear to where `heads` says. Returns 0, or 1 if it can't (rotates_at_once), or where shoal_linear
// can't.
int rotated_linear(const void* inputs, const void* weights, const void* bias, int64_t num_rows, int64_t num_outputs,
                   int64_t size, const Heads& heads, int num_threads);

}  // namespace shoal
