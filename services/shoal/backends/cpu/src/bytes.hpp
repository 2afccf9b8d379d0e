// Products of bytes, four of them in each of sixteen lanes.
//
// Rows of inputs become bytes in blocks of 64, each by a scale of its own: x = scale * byte. A row's largest numbers are far
// from all others, and take the steps of their block alone. Of a block, sums of products are whole numbers, and exact.
//
// The instruction wants one factor without a sign: weights have 128 added to them (model/int8.py), and what sums of a block
// begin with, takes 128 times its inputs off again.
#pragma once
#include <bit>
#include <cmath>

#include "simd.hpp"

namespace shoal {

constexpr int64_t BLOCK = 64;      // inputs, which have a scale; a register holds them
constexpr float NOTHING = 1e-30f;  // above it a scale's inverse is finite

// The first of `size` lanes, all or none.
inline uint64_t lanes(int64_t left, int size) {
    if (left >= size) return size == 64 ? ~0ull : (1ull << size) - 1;
    return left <= 0 ? 0 : (1ull << left) - 1;
}

inline __m512 load_some(const bf16* from, int64_t left) {
    const __m256i halves = _mm256_maskz_loadu_epi16((__mmask16)lanes(left, 16), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Adds to `sum` the products of bytes, four to a lane.
inline void add_bytes(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
#ifdef __AVX512VNNI__
    // In assembler: with the intrinsic, GCC 12 keeps a copy of each sum in memory, which takes twice as long.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
#else
    // Two at a time, as numbers of 16 bits: of bytes the instruction would bound its sums.
    const auto add = [&](__m512i one, __m512i other) { sum = _mm512_add_epi32(sum, _mm512_madd_epi16(one, other)); };
    add(_mm512_and_si512(unsigned_bytes, _mm512_set1_epi16(0xff)),
        _mm512_srai_epi16(_mm512_slli_epi16(signed_bytes, 8), 8));
    add(_mm512_srli_epi16(unsigned_bytes, 8), _mm512_srai_epi16(signed_bytes, 8));
#endif
}

// sums[j] += the four bytes, in all lanes, times others[j], which have no sign. As in pairs.hpp, Clang is told to multiply by
// what lies in memory.
template <int N>
inline __attribute__((always_inline)) void add_four(__m512i (&sums)[N], const int8_t* four, const __m512i (&others)[N]) {
#if defined(__clang__) && defined(__AVX512VNNI__)
#pragma unroll
    for (int j = 0; j < N; j++)
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums[j]) : "v"(others[j]), "m"(*(const int8_t (*)[4])four));
#else
    const __m512i own = spread(four);
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) add_bytes(sums[j], others[j], own);
#endif
}

// The largest of absolute values, as bits: those of what isn't finite are above all numbers'.
struct Largest {
    __m512i bits = _mm512_setzero_si512();

    void see(__m512 numbers) { bits = _mm512_max_epu32(bits, _mm512_castps_si512(_mm512_abs_ps(numbers))); }
    float value() const { return std::bit_cast<float>(_mm512_reduce_max_epu32(bits)); }
};

// Numbers times `factor` are of so many steps at most, and a step is `scale`. Where a number isn't finite, that is NaN, and
// so is all that comes of them.
struct Steps {
    float scale;
    __m512 factor;

    Steps(const Largest& of, float most) {
        const float largest = of.value();
        const bool is_finite = std::isfinite(largest), is_nothing = largest < NOTHING;
        scale = !is_finite ? NAN : is_nothing ? 0 : largest / most;
        factor = _mm512_set1_ps(!is_finite || is_nothing ? 0 : most / largest);
    }
};

// Rows of `size` inputs: of each its bytes, zeros up to a whole block, then what each block's sums begin with, and its scale.
struct Bytes {
    char* rows;
    int64_t size;

    static int64_t num_blocks(int64_t size) { return (size + BLOCK - 1) / BLOCK; }
    static int64_t row_bytes(int64_t size) { return (num_blocks(size) * (BLOCK + 8) + 63) / 64 * 64; }
    int64_t num_blocks() const { return num_blocks(size); }

    Bytes from(int64_t row) const { return {rows + row * row_bytes(size), size}; }
    const int8_t* bytes(int64_t row) const { return reinterpret_cast<const int8_t*>(from(row).rows); }
    const int32_t* begins(int64_t row) const {
        return reinterpret_cast<const int32_t*>(from(row).rows + num_blocks() * BLOCK);
    }
    const float* scales(int64_t row) const { return reinterpret_cast<const float*>(begins(row) + num_blocks()); }

    void make(int64_t row, const bf16* numbers) const {
        char* const to = from(row).rows;
        int32_t* const begins = reinterpret_cast<int32_t*>(to + num_blocks() * BLOCK);
        float* const scales = reinterpret_cast<float*>(begins + num_blocks());
        for (int64_t block = 0; block < num_blocks(); block++) {
            __m512 own[4];
            Largest largest;
            for (int i = 0; i < 4; i++) {
                const int64_t at = block * BLOCK + 16 * i;
                own[i] = load_some(numbers + at, size - at);
                largest.see(own[i]);
            }
            const Steps steps(largest, 127);
            scales[block] = steps.scale;
            char* const bytes = to + block * BLOCK;
            for (int i = 0; i < 4; i++) {
                const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(own[i], steps.factor));
                _mm_store_si128(reinterpret_cast<__m128i*>(bytes + 16 * i), _mm512_cvtepi32_epi8(whole));
            }
            __m512i sums = _mm512_setzero_si512();
            add_bytes(sums, _mm512_set1_epi8(-128), _mm512_load_si512(bytes));
            begins[block] = -_mm512_reduce_add_epi32(sums);
        }
    }
};

}  // namespace shoal
