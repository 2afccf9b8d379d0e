// What gates are made of.
#pragma once
#include "simd.hpp"

namespace shoal {

enum class Activation { NONE, SILU, GELU };

// 1 / (1 + 2^-y) with y = x / log 2, right to 2e-4: bfloat16 is to 4e-3. Beyond 80 powers would leave float32, or nearly.
inline __m512 sigmoid(__m512 x) {
    constexpr int SMALLER_WITH_SIGN_OF_FIRST = 2;
    const __m512 bounded = _mm512_range_ps(x, _mm512_set1_ps(80), SMALLER_WITH_SIGN_OF_FIRST);
    const __m512 grown = near_exp2(_mm512_mul_ps(bounded, _mm512_set1_ps(-LOG2_E)));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), grown));
}

inline __m512 silu(__m512 x) { return _mm512_mul_ps(x, sigmoid(x)); }

// x / 2 * (1 + tanh(y)) = x * sigmoid(2 y), y = sqrt(2 / pi) * (x + 0.044715 x^3)
inline __m512 gelu_tanh(__m512 x) {
    const __m512 cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    const __m512 inner = _mm512_fmadd_ps(cubed, _mm512_set1_ps(0.044715f), x);
    return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(inner, _mm512_set1_ps(1.59576912f))));
}

inline __m512 activate(Activation activation, __m512 x) {
    switch (activation) {
        case Activation::SILU: return silu(x);
        case Activation::GELU: return gelu_tanh(x);
        default: return x;
    }
}

}  // namespace shoal
