// What both ways of prompt_attention.cpp have in common.
#pragma once
#include "simd.hpp"

namespace shoal {

constexpr int KEYS = 64;  // K and V are packed in so many, the last of them with zeros

struct Range {
    int64_t begin, end;
};

struct Packed {
    const bf16 *keys, *values;
};

constexpr float ONES = 12582912.0f;  // 1.5 * 2^23: the last bit of a sum with it counts ones, so an addition rounds

// 2^x of x in [-1/2, 1/2]. The relative error is below 8e-5, bfloat16's is 4e-3.
inline __m512 power_of_rest(__m512 x) {
    __m512 sum = _mm512_set1_ps(5.517167e-2f);
    for (const float next : {2.4261112e-1f, 6.9326099e-1f, 9.9992807e-1f})
        sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(next));
    return sum;
}

// 2^x for x <= 126; what is below 2^-125 becomes that. The exponent is where it can be shifted into place.
inline __m512 probability(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-125.0f), x);  // of a number and a NaN it gives the second: NaN must stay
    const __m512 whole = _mm512_add_ps(x, _mm512_set1_ps(ONES));
    const __m512 sum = power_of_rest(_mm512_sub_ps(x, _mm512_sub_ps(whole, _mm512_set1_ps(ONES))));
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(sum), _mm512_slli_epi32(_mm512_castps_si512(whole), 23)));
}

}  // namespace shoal
