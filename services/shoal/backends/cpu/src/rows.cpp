// What happens to each row between the matrix products: one pass over the memory each, float32 inside, one rounding.
#include "rows.hpp"

#include "activations.hpp"
#include "crew.hpp"

namespace shoal {
namespace {

constexpr int64_t PIECE = 8;  // rows; fewer are done before a second thread has begun

void gate(Activation activation, const bf16* both, int64_t num_rows, int64_t size, bf16* out, int num_threads) {
    share_ranges(num_rows, PIECE, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const bf16 *const gates = both + row * 2 * size, *const ups = gates + size;
            for (int64_t j = 0; j < size; j += 16)
                store(out + row * size + j, _mm512_mul_ps(activate(activation, load(gates + j)), load(ups + j)));
        }
    });
}

}  // namespace
}  // namespace shoal

// out = (hidden + added) / sqrt(mean((hidden + added)^2) + eps) * weight; the sum itself, rounded, goes to `sum`. All
// are [num_rows, size]; without `added` there's no sum, and without `out` nothing else; `weight` is [size], or none for
// ones. Returns 0, or 1 if size isn't a multiple of 16.
extern "C" int shoal_add_norm(const void* hidden, const void* added, const void* weight, int64_t num_rows, int64_t size,
                              float eps, void* sum, void* out, int num_threads) {
    using namespace shoal;
    if (size % 16) return 1;
    const Output to = {static_cast<bf16*>(out), size};
    share_ranges(num_rows, PIECE, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            add_norm_row(static_cast<const bf16*>(hidden) + row * size,
                         added ? static_cast<const bf16*>(added) + row * size : nullptr,
                         static_cast<const bf16*>(weight), size, eps, static_cast<bf16*>(sum) + row * size, to, row);
    });
    return 0;
}

// heads [num_rows, num_heads + 2 kv_heads, D], heads_row numbers between rows: queries are rotated in place, keys on their
// way to the pool, where values go as they are; both at `slots` [num_rows], or without them one after the other. cos,
// sin: [num_rows, D / 2]. Returns 0, or 1 if D isn't a multiple of 32.
extern "C" int shoal_rotate_store(void* heads, int64_t heads_row, const void* cos, const void* sin, int64_t num_rows,
                                  int num_heads, int kv_heads, int head_dim, void* pool, const int64_t* slots,
                                  int num_threads) {
    using namespace shoal;
    if (head_dim % 32) return 1;
    const int half = head_dim / 2;
    share_ranges(num_rows, PIECE, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            bf16* const own = static_cast<bf16*>(heads) + row * heads_row;
            bf16* const slot = static_cast<bf16*>(pool) + (slots ? slots[row] : row) * 2 * kv_heads * head_dim;
            for (int head = 0; head < num_heads + kv_heads; head++) {
                const bf16* const from = own + (int64_t)head * head_dim;
                bf16* const to = head < num_heads ? own + (int64_t)head * head_dim : slot + (head - num_heads) * head_dim;
                for (int j = 0; j < half; j += 16) {
                    const __m512 a = load(from + j), b = load(from + half + j);
                    const __m512 c = load(static_cast<const bf16*>(cos) + row * half + j);
                    const __m512 s = load(static_cast<const bf16*>(sin) + row * half + j);
                    store(to + j, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
                    store(to + half + j, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
                }
            }
            std::memcpy(slot + kv_heads * head_dim, own + (int64_t)(num_heads + kv_heads) * head_dim,
                        sizeof(bf16) * kv_heads * head_dim);
        }
    });
    return 0;
}

// out [num_rows, size] = activation(both[:, :size]) * both[:, size:]; activation 0 is SiLU, 1 GELU (tanh). Returns 0, or
// 1 if size isn't a multiple of 16.
extern "C" int shoal_gate(const void* both, int activation, int64_t num_rows, int64_t size, void* out, int num_threads) {
    using namespace shoal;
    if (size % 16) return 1;
    gate(activation == 0 ? Activation::SILU : Activation::GELU, static_cast<const bf16*>(both), num_rows, size,
         static_cast<bf16*>(out), num_threads);
    return 0;
}

// out [num_rows, size]: rows of a matrix of num_outputs that lies in panels of 32 (model/packed.py), at `index` [num_rows].
// Returns 0, or 1 if there is no such row.
extern "C" int shoal_packed_rows(const void* panels, int64_t num_outputs, const int64_t* index, int64_t num_rows,
                                 int64_t size, void* out) {
    constexpr int64_t PANEL = 32;
    for (int64_t row = 0; row < num_rows; row++) {
        if (index[row] < 0 || index[row] >= num_outputs) return 1;
        const uint32_t* const from =
            static_cast<const uint32_t*>(panels) + index[row] / PANEL * PANEL * (size / 2) + index[row] % PANEL;
        uint32_t* const to = static_cast<uint32_t*>(out) + row * (size / 2);
        for (int64_t pair = 0; pair < size / 2; pair++) to[pair] = from[pair * PANEL];
    }
    return 0;
}
