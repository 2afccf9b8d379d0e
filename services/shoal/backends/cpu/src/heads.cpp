#include "heads.hpp"

#include <new>

#include "kernels.hpp"
#include "room.hpp"
#include "tiles.hpp"

namespace shoal {

void put_heads(const Operands& of, int64_t panel, int64_t row, int64_t num_rows, const float* first, const float* second) {
    const Heads& heads = *of.heads;
    const int64_t half = heads.head_dim / 2, output = panel * PANEL;
    const int64_t head = output / heads.head_dim, at = output % heads.head_dim;
    const Store& store = heads.store(head);
    const bool is_rotated = heads.is_rotated(head);
    const __m512 first_bias[] = {of.bias_of(output), of.bias_of(output + 16)};
    const __m512 second_bias[] = {of.bias_of(output + half), of.bias_of(output + half + 16)};
    for (int64_t n = 0; n < num_rows; n++) {
        __m512 a[2], b[2];
        for (int i = 0; i < 2; i++) {
            a[i] = rounded(_mm512_add_ps(_mm512_load_ps(first + n * PANEL + 16 * i), first_bias[i]));
            b[i] = rounded(_mm512_add_ps(_mm512_load_ps(second + n * PANEL + 16 * i), second_bias[i]));
            if (!is_rotated) continue;
            const __m512 cos = load(store.cos + (row + n) * half + at + 16 * i);
            const __m512 sin = load(store.sin + (row + n) * half + at + 16 * i);
            const __m512 rotated = _mm512_fnmadd_ps(b[i], sin, _mm512_mul_ps(a[i], cos));
            b[i] = _mm512_fmadd_ps(a[i], sin, _mm512_mul_ps(b[i], cos));
            a[i] = rotated;
        }
        bf16* const to = heads.place(head, row + n) + at;
        shoal::store(to, a[0], a[1]);
        shoal::store(to + half, b[0], b[1]);
    }
}

bool rotates_at_once(int64_t num_rows, int64_t head_dim) {
    return have_tiles() && num_rows > MANY_ROWS && head_dim % (2 * PANEL) == 0;
}

int rotated_linear(const void* inputs, const void* weights, const void* bias, int64_t num_rows, int64_t num_outputs,
                   int64_t size, const Heads& heads, int num_threads) {
    if (!rotates_at_once(num_rows, heads.head_dim) || size % 32) return 1;
    multiply_many_by_tiles({static_cast<const bf16*>(inputs), static_cast<const bf16*>(weights),
                            static_cast<const bf16*>(bias), num_rows, num_outputs, size, {}, Activation::NONE, &heads,
                            heads.head_dim / 2 / PANEL},
                           num_threads);
    return 0;
}

}  // namespace shoal

// Keys and values of `num_stores` layers from inputs [num_rows, size], by one matrix in panels as shoal_linear has it, whose
// outputs are each layer's keys and values [2, kv_heads, head_dim]: rotated and stored as shoal_rotate_store does it.
// Returns 0, or 1 where one of the two can't.
extern "C" int shoal_project(const void* inputs, const void* weights, const void* bias, int64_t num_rows, int64_t size,
                             const void* stores, int64_t num_stores, const int64_t* slots, int kv_heads, int head_dim,
                             int num_threads) {
    using namespace shoal;
    const Store* const to = static_cast<const Store*>(stores);
    const int64_t of_a_store = 2 * kv_heads * head_dim, num_outputs = num_stores * of_a_store;
    if (rotates_at_once(num_rows, head_dim))
        return rotated_linear(inputs, weights, bias, num_rows, num_outputs, size,
                              {to, {}, slots, 0, kv_heads, head_dim}, num_threads);
    Room<bf16> room;
    bf16* flat = nullptr;
    try {
        flat = room.of(num_rows * num_outputs);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    if (shoal_linear(inputs, weights, bias, num_rows, num_outputs, size, flat, num_threads)) return 1;
    for (int64_t i = 0; i < num_stores; i++)
        if (shoal_rotate_store(flat + i * of_a_store, num_outputs, to[i].cos, to[i].sin, num_rows, 0, kv_heads, head_dim,
                               to[i].pool, slots, num_threads))
            return 1;
    return 0;
}
