// What gates are made of.
#pragma once
#include "simd.hpp"

namespace shoal {

enum class Activation { NONE, SILU, GELU };

// 1 / x for x from 1 to 2^126: an estimate of 14 binary digits, and by Newton's step twice as many. Divisions wait for one
// another.
inline __m512 reciprocal(__m512 x) {
    const __m512 about = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(about, _mm512_fnmadd_ps(x, about, _mm512_set1_ps(2)));
}

inline __m512 sigmoid(__m512 x) {
    const __m512 bounded = _mm512_max_ps(x, _mm512_set1_ps(-80.0f));
    return reciprocal(_mm512_add_ps(_mm512_set1_ps(1), exp2(_mm512_mul_ps(bounded, _mm512_set1_ps(-LOG2_E)))));
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
