// Products of bfloat16, a pair of them in each of sixteen lanes.
//
// A processor with avx512_bf16 multiplies pairs as they lie, and adds both products. For one without, numbers are widened
// to float32, and of each pair first the one and then the other is multiplied (HALF): in a lane, one is the upper bits of a
// float32, and the other becomes that by a shift. What all lanes are multiplied by, a row's numbers, is widened once,
// before (Numbers): a load spreads one then, and the multipliers have all the time to themselves.
#pragma once
#include "simd.hpp"

namespace shoal {

#ifdef __AVX512BF16__

constexpr int HALVES = 1;
using Number = bf16;     // of a row
using Factor = __m512bh;

template <int HALF>
inline Factor factor_of(__m512i pairs) { return (__m512bh)pairs; }

template <int HALF>
inline Factor spread_pair(const bf16* pair) { return (__m512bh)spread(pair); }

inline __m512 add_products(__m512 sums, Factor one, Factor other) { return _mm512_dpbf16_ps(sums, one, other); }

#else

constexpr int HALVES = 2;
using Number = float;
using Factor = __m512;

template <int HALF>
inline Factor factor_of(__m512i pairs) {
    return _mm512_castsi512_ps(HALF ? _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000))
                                    : _mm512_slli_epi32(pairs, 16));
}

template <int HALF>
inline Factor spread_pair(const float* pair) { return _mm512_set1_ps(pair[HALF]); }

inline __m512 add_products(__m512 sums, Factor one, Factor other) { return _mm512_fmadd_ps(one, other, sums); }

#endif

// Calls `work` for each half, as a template.
template <class Work>
inline __attribute__((always_inline)) void each_half(const Work& work) {
    work.template operator()<0>();
    if constexpr (HALVES == 2) work.template operator()<1>();
}

// Rows of bfloat16, `row` numbers from one to the next, as pairs are spread of them.
struct Numbers {
    const Number* numbers;
    int64_t row;

    const Number* operator[](int64_t index) const { return numbers + index * row; }
    Numbers from(int64_t index) const { return {numbers + index * row, row}; }
};

// sums[j] += the pair, in all lanes, times others[j]. Clang would spread the pairs of all rows ahead, for which there are no
// registers: it's told to multiply by what lies in memory.
template <int HALF, int N>
inline void add_spread(__m512 (&sums)[N], const Number* pair, const Factor (&others)[N]) {
#ifdef __clang__
#pragma unroll
    for (int j = 0; j < N; j++) {
#ifdef __AVX512BF16__
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sums[j]) : "v"(others[j]), "m"(*(const Number (*)[2])pair));
#else
        asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sums[j]) : "v"(others[j]), "m"(pair[HALF]));
#endif
    }
#else
    const Factor own = spread_pair<HALF>(pair);
    for (int j = 0; j < N; j++) sums[j] = add_products(sums[j], own, others[j]);
#endif
}

// That widening takes of a room, for each number.
constexpr int64_t ROOM_OF_A_NUMBER = HALVES - 1;

// `size` is a multiple of 16; what is widened goes to `room` [num_rows, size].
inline Numbers spreadable(const bf16* from, int64_t row, int64_t num_rows, int64_t size, Number* room) {
#ifdef __AVX512BF16__
    return {from, row};
#else
    for (int64_t n = 0; n < num_rows; n++)
        for (int64_t j = 0; j < size; j += 16) _mm512_storeu_ps(room + n * size + j, load(from + n * row + j));
    return {room, size};
#endif
}

}  // namespace shoal
