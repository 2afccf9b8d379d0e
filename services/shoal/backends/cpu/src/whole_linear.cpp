// Products of few rows with weights of int8 that lie as the shortlist has them (model/shortlist.py), rows of inputs: who
// wants to know how far they can be from those of the weights themselves, wants inputs hardly rounded.
//
// Nothing is widened on the way. Inputs are two bytes each (whole.hpp): weights are multiplied by either one, 64 at a time,
// and summed as whole numbers, so all that is rounded are inputs.
#include <algorithm>

#include "apart.hpp"
#include "crew.hpp"
#include "kernels.hpp"
#include "room.hpp"
#include "simd.hpp"
#include "whole.hpp"

namespace shoal {
namespace {

constexpr int64_t PIECE = 64;          // weights' rows a thread takes at a time
constexpr int64_t MAX_ROWS = 3;        // of inputs
constexpr int64_t MAX_SIZE = 1 << 17;  // so many times 128 * 127 is in int32

struct Operands {
    const bf16* inputs;
    const int8_t* weights;
    const float* scales;
    int64_t num_rows, num_outputs, size;
    Output out;
};

inline __m512 joined(__m512i high, __m512i low) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
}

// Of M rows and N outputs, by bytes of the inputs.
template <int M, int N>
struct Sums {
    __m512i high[M][N], low[M][N];

    // `weights` is a block of each output's, `blocks` the inputs' of the first row, `row_size` from one to the next.
    inline __attribute__((always_inline)) void add(const __m512i (&weights)[N], const __m512i* blocks,
                                                   int64_t row_size) {
        __m512i flipped[N];
        for (int n = 0; n < N; n++) flipped[n] = _mm512_xor_si512(weights[n], _mm512_set1_epi8(-128));
        for (int m = 0; m < M; m++) {
            const __m512i above = blocks[m * row_size], below = blocks[m * row_size + 1];
            for (int n = 0; n < N; n++) {
                add_bytes(high[m][n], flipped[n], above);
                add_bytes(low[m][n], flipped[n], below);
            }
        }
    }
};

// N outputs of all M rows, from `output` on; those beyond the last one repeat it.
template <int M, int N>
inline void several(const Operands& of, const Whole& inputs, int64_t output, int part, ints (&high)[M][16],
                    ints (&low)[M][16]) {
    const int64_t row_size = inputs.row_size(), num_full = of.size / BLOCK;
    const int8_t* weights[N];
    for (int n = 0; n < N; n++) weights[n] = of.weights + std::min(output + n, of.num_outputs - 1) * of.size;
    const __m512i *const blocks = inputs.row(0), *const begin = blocks + 2 * inputs.num_blocks;
    Sums<M, N> sums;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            sums.high[m][n] = begin[m * row_size];
            sums.low[m][n] = begin[m * row_size + 1];
        }
    __m512i own[N];
    for (int64_t block = 0; block < num_full; block++) {
        for (int n = 0; n < N; n++) {
            const int8_t* const from = weights[n] + block * BLOCK;
            own[n] = _mm512_loadu_si512(from);
            // The next N outputs'. Of one after the other, the processor sees by itself what comes.
            if (N > 1) fetch(from + N * of.size);
        }
        sums.add(own, blocks + 2 * block, row_size);
    }
    if (num_full < inputs.num_blocks) {
        const __mmask64 mask = lanes(of.size % BLOCK, BLOCK);  // inputs are 0 beyond
        for (int n = 0; n < N; n++) own[n] = _mm512_maskz_loadu_epi8(mask, weights[n] + num_full * BLOCK);
        sums.add(own, blocks + 2 * num_full, row_size);
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            high[m][part + n] = (ints)sums.high[m][n];
            low[m][part + n] = (ints)sums.low[m][n];
        }
}

template <int M, int N>
inline void sixteen(const Operands& of, const Whole& inputs, int64_t output) {
    ints high[M][16], low[M][16];
    for (int part = 0; part < 16; part += N) several<M, N>(of, inputs, output + part, part, high, low);
    const int64_t left = of.num_outputs - output;
    const __mmask16 mask = (__mmask16)lanes(left, 16);
    const __m512 scales = _mm512_maskz_loadu_ps(mask, of.scales + output);
    for (int m = 0; m < M; m++) {
        const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(inputs.scale(m)));
        const __m512 result = _mm512_mul_ps(joined((__m512i)sums(high[m]), (__m512i)sums(low[m])), scale);
        _mm256_mask_storeu_epi16(of.out.numbers + m * of.out.row + output, mask, narrowed(result));
    }
}

inline void sixteen(const Operands& of, const Whole& inputs, int64_t output) {
    // One or two rows wait for memory alone: weights' rows one after the other, as they lie.
    switch (of.num_rows) {
        case 1: return sixteen<1, 1>(of, inputs, output);
        case 2: return sixteen<2, 1>(of, inputs, output);
        default: return sixteen<MAX_ROWS, 4>(of, inputs, output);
    }
}

}  // namespace

int64_t kept_by_whole(int64_t num_rows, int64_t size) {
    return num_rows * Whole::row_size((size + BLOCK - 1) / BLOCK) * (int64_t)sizeof(__m512i);
}

int whole_linear(const void* inputs, const void* weights, const void* scales, int64_t num_rows, int64_t num_outputs,
                 int64_t size, void* out, int num_threads, char* kept) {
    if (num_rows > MAX_ROWS || size > MAX_SIZE) return 1;
    const Operands of = {static_cast<const bf16*>(inputs),
                         static_cast<const int8_t*>(weights),
                         static_cast<const float*>(scales),
                         num_rows,
                         num_outputs,
                         size,
                         {static_cast<bf16*>(out), num_outputs}};
    const Whole whole = {reinterpret_cast<__m512i*>(kept), num_rows, (size + BLOCK - 1) / BLOCK};
    share_ranges(num_rows, MAX_ROWS, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) make_whole(of.inputs + row * size, size, whole, row);
    });
    share_ranges(num_outputs, PIECE, num_threads, [&](int64_t begin, int64_t end, Claim& claim) {
        make_part(of.out, {0, num_rows, begin, end}, claim, [&](const Output& out) {
            Operands to = of;
            to.out = out;
            for (int64_t output = begin; output < end; output += 16) sixteen(to, whole, output);
        });
    });
    return 0;
}

}  // namespace shoal

// out [num_rows, num_outputs] = inputs [num_rows, size] times weights [num_outputs, size] transposed times scales
// [num_outputs]. inputs and out are bfloat16, weights int8, scales float32. Returns 0, or 1 if size is above MAX_SIZE, or
// rows are more than MAX_ROWS.
extern "C" int shoal_whole_linear(const void* inputs, const void* weights, const void* scales, int64_t num_rows,
                                  int64_t num_outputs, int64_t size, void* out, int num_threads) {
    using namespace shoal;
    static thread_local Room<char> room;
    return whole_linear(inputs, weights, scales, num_rows, num_outputs, size, out, num_threads,
                        room.of(kept_by_whole(num_rows, size)));
}
