// Rows of inputs as whole numbers of 16 bits, by one scale a row, as two bytes each: x = scale * (256 high + low).
//
// What is rounded is 1/65278 of a row's largest number at most. Over a row of some thousand numbers this adds up to less
// than what bfloat16 has rounded it by.
#pragma once
#include "bytes.hpp"

namespace shoal {

constexpr float LARGEST = 32639;   // 256 * 127 + 127

// Of each row, for each block a register of high bytes and one of low, then what the sums of each begin with, and one for
// its scale.
struct Whole {
    __m512i* registers;
    int64_t num_rows, num_blocks;

    static int64_t row_size(int64_t num_blocks) { return 2 * num_blocks + 3; }
    int64_t row_size() const { return row_size(num_blocks); }
    __m512i* row(int64_t index) const { return registers + index * row_size(); }
    float& scale(int64_t index) const { return *reinterpret_cast<float*>(row(index) + 2 * num_blocks + 2); }
};

// One row of inputs.
inline void make_whole(const bf16* from, int64_t size, const Whole& to, int64_t row) {
    Largest largest;
    for (int64_t j = 0; j < size; j += 16) largest.see(load_some(from + j, size - j));
    const Steps steps(largest, LARGEST);
    to.scale(row) = steps.scale;
    const __m512i flipped = _mm512_set1_epi8(-128);  // 128, without a sign
    __m512i* const blocks = to.row(row);
    __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
    for (int64_t block = 0; block < to.num_blocks; block++) {
        alignas(64) int8_t high[BLOCK], low[BLOCK];
        for (int64_t j = 0; j < BLOCK; j += 16) {
            const __m512 numbers = load_some(from + block * BLOCK + j, size - block * BLOCK - j);
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, steps.factor));
            const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            const __m512i below = _mm512_sub_epi32(whole, _mm512_slli_epi32(above, 8));
            _mm_store_si128(reinterpret_cast<__m128i*>(high + j), _mm512_cvtepi32_epi8(above));
            _mm_store_si128(reinterpret_cast<__m128i*>(low + j), _mm512_cvtepi32_epi8(below));
        }
        blocks[2 * block] = _mm512_load_si512(high);
        blocks[2 * block + 1] = _mm512_load_si512(low);
        add_bytes(high_sum, flipped, blocks[2 * block]);
        add_bytes(low_sum, flipped, blocks[2 * block + 1]);
    }
    blocks[2 * to.num_blocks] = _mm512_sub_epi32(_mm512_setzero_si512(), high_sum);
    blocks[2 * to.num_blocks + 1] = _mm512_sub_epi32(_mm512_setzero_si512(), low_sum);
}

}  // namespace shoal
