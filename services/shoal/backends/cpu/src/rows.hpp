// One row between two matrix products.
#pragma once
#include <cmath>

#include "apart.hpp"
#include "simd.hpp"

namespace shoal {

// To `sum` goes hidden + added, rounded, where something is added; to the row of `out`, if there is one, its RMS norm times
// `weight`, if any. float32 inside.
inline void add_norm_row(const bf16* hidden, const bf16* added, const bf16* weight, int64_t size, float eps, bf16* sum,
                         const Output& out, int64_t row) {
    if (added) {
        for (int64_t j = 0; j < size; j += 16) store(sum + j, _mm512_add_ps(load(hidden + j), load(added + j)));
        hidden = sum;
    }
    if (!out.numbers) return;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t j = 0; j < size; j += 16) squares = _mm512_fmadd_ps(load(hidden + j), load(hidden + j), squares);
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / (float)size + eps));
    for (int64_t j = 0; j < size; j += 16) {
        const __m512 normed = _mm512_mul_ps(load(hidden + j), scale);
        store(out.at(row, j), weight ? _mm512_mul_ps(normed, load(weight + j)) : normed);
    }
}

}  // namespace shoal
