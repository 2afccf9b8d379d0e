// Sixteen numbers at a time: bfloat16 in memory, float32 in registers.
#pragma once
#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace shoal {

using bf16 = uint16_t;

constexpr int64_t LINE = 32;  // numbers of a cache line

// Into the second cache: the first one is too small for what is ahead, and has few places for what is asked of memory,
// which loads need: eight rows take half as long.
inline void fetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }

// Into the first one alone, for what is read once, where that has the places: on a Zen 5 weights take 2 to 6 % less.
inline void fetch_once(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_NTA); }

// Whether it has. Asked for once.
inline bool fetches_once() {
    static const bool does = [] {
        unsigned a = 0, b, c, d;
        constexpr unsigned ZEN_5 = 0x1a;
        return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 0xf) + (a >> 20 & 0xff) == ZEN_5;
    }();
    return does;
}

// The four bytes that lie at `from`, in all lanes.
inline __m512i spread(const void* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
}

// As good as minus infinity for a score, without its NaNs.
constexpr float LOWEST = -1e30f;
constexpr float LOG2_E = 1.44269504088896341f;

inline __m512 load(const bf16* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

#ifdef __AVX512BF16__
inline __m256i narrowed(__m512 numbers) { return (__m256i)_mm512_cvtneps_pbh(numbers); }
inline __m512i narrowed(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#else
// The nearest bfloat16 in each lane's upper half, of a tie the even one. A NaN stays one: what makes them sets none of the
// bits that are rounded, neither bfloat16's nor the processor's own.
inline __m512i nearest(__m512 numbers) {
    const __m512i bits = _mm512_castps_si512(numbers);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline __m256i narrowed(__m512 numbers) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest(numbers), 16)); }
inline __m512i narrowed(__m512 low, __m512 high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrowed(low)), narrowed(high), 1);
}
#endif

inline void store(bf16* to, __m512 numbers) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(numbers));
}
inline void store(bf16* to, __m512 low, __m512 high) { _mm512_storeu_si512(to, narrowed(low, high)); }
inline void store(float* to, __m512 numbers) { _mm512_storeu_ps(to, numbers); }
inline void store(float* to, __m512 low, __m512 high) {
    store(to, low);
    store(to + 16, high);
}

// 2^x for x <= 127; what is below 2^-126 becomes that. The relative error is below 1e-6, bfloat16's is 4e-3.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // of a NaN and a number it gives the second: NaN must stay
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);  // in [-1/2, 1/2]: a Taylor series of 2^rest
    __m512 sum = _mm512_set1_ps(1.3333558e-3f);
    for (const float next : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(next));
    return _mm512_scalef_ps(sum, whole);
}

constexpr float ONES = 12582912.0f;  // 1.5 * 2^23: the last bit of a sum with it counts ones, so an addition rounds

// 2^x of x in [-1/2, 1/2]. The relative error is below 8e-5, bfloat16's is 4e-3.
inline __m512 power_of_rest(__m512 x) {
    __m512 sum = _mm512_set1_ps(5.517167e-2f);
    for (const float next : {2.4261112e-1f, 6.9326099e-1f, 9.9992807e-1f})
        sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(next));
    return sum;
}

// 2^x, as near as that, with few multiplications: while tiles are multiplied (tiled_attention.hpp), additions
// take less. From 128 on it's infinite, but of an x of millions not even the sign is right; far below, it's nothing.
inline __m512 near_exp2(__m512 x) {
    // x is a product. Else the compiler would make the additions multiplications of its factors, and of very large ones
    // what is left would be far more than 1/2.
    asm("" : "+v"(x));
    const __m512 ones = _mm512_set1_ps(ONES), whole = _mm512_sub_ps(_mm512_add_ps(x, ones), ones);
    return _mm512_scalef_ps(power_of_rest(_mm512_sub_ps(x, whole)), whole);
}

using ints = int32_t __attribute__((vector_size(64)));

// The sums of sixteen registers of float32 or int32, in order: neighbours are added and interleaved until one is left.
template <class Register>
inline Register sums(const Register (&v)[16]) {
    const auto pick = [](Register a, __m512i which, Register b) __attribute__((always_inline)) {
        return (Register)_mm512_permutex2var_epi32((__m512i)a, which, (__m512i)b);
    };
    Register by2[8], by4[4], by8[2];
    const __m512i even = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    const __m512i odd = _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    for (int i = 0; i < 8; i++) by2[i] = pick(v[2 * i], even, v[2 * i + 1]) + pick(v[2 * i], odd, v[2 * i + 1]);
    const __m512i even2 = _mm512_setr_epi32(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    const __m512i odd2 = _mm512_setr_epi32(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    for (int i = 0; i < 4; i++) by4[i] = pick(by2[2 * i], even2, by2[2 * i + 1]) + pick(by2[2 * i], odd2, by2[2 * i + 1]);
    const auto halves = [](Register a, Register b) __attribute__((always_inline)) {
        return (Register)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0x88) +
               (Register)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0xdd);
    };
    for (int i = 0; i < 2; i++) by8[i] = halves(by4[2 * i], by4[2 * i + 1]);
    return halves(by8[0], by8[1]);
}

// Sixteen rows of sixteen numbers become columns.
inline void transpose(__m512i (&v)[16]) {
    __m512i by2[16], by4[16];
    for (int i = 0; i < 16; i += 2) {
        by2[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        by2[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            by4[i + 2 * j] = _mm512_unpacklo_epi64(by2[i + j], by2[i + j + 2]);
            by4[i + 2 * j + 1] = _mm512_unpackhi_epi64(by2[i + j], by2[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {  // of four registers each a quarter
        const __m512i low = _mm512_shuffle_i32x4(by4[j], by4[4 + j], 0x88);
        const __m512i low2 = _mm512_shuffle_i32x4(by4[8 + j], by4[12 + j], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(by4[j], by4[4 + j], 0xdd);
        const __m512i high2 = _mm512_shuffle_i32x4(by4[8 + j], by4[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        v[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
        v[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

// Where a sequence's tokens lie in a layer of the pool, [slots, 2, kv_heads, D]: at `slots`, or one after the other.
struct Context {
    const bf16* pool;
    const int64_t* slots;
    int64_t first, slot_size;

    const bf16* operator[](int64_t token) const {
        return pool + (slots ? slots[token] : first + token) * slot_size;
    }
};

}  // namespace shoal
