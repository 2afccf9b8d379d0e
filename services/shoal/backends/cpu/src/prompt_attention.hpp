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

// 2^x for x <= 126; what is below 2^-125 becomes that. The exponent is where it can be shifted into place.
inline __m512 probability(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-125.0f), x);  // of a number and a NaN it gives the second: NaN must stay
    const __m512 whole = _mm512_add_ps(x, _mm512_set1_ps(ONES));
    const __m512 sum = power_of_rest(_mm512_sub_ps(x, _mm512_sub_ps(whole, _mm512_set1_ps(ONES))));
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(sum), _mm512_slli_epi32(_mm512_castps_si512(whole), 23)));
}

}  // namespace shoal
