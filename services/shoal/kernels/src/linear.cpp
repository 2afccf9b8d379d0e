// Matrix products of few rows, as decoding has them: the time goes into reading the weights, each once.
//
// Both operands lie as torch has them, numbers of a row side by side, so sums run along the registers and are added
// across at the end. A tile of weights' rows times inputs' rows shares its loads.
#include <algorithm>

#include "crew.hpp"
#include "simd.hpp"

namespace shoal {
namespace {

constexpr int64_t PIECE = 64;  // weights' rows a thread takes at a time

struct Operands {
    const bf16 *inputs, *weights, *bias;
    int64_t num_rows, num_outputs, size;
    bf16* out;
};

// Sixteen outputs of M rows, four weights' rows at a time.
template <int M>
inline void sixteen(const Operands& of, int64_t row, int64_t output) {
    __m512 found[M][16];
    for (int part = 0; part < 16; part += 4) {
        const bf16* const weights = of.weights + (output + part) * of.size;
        __m512 acc[M][4];
        for (int m = 0; m < M; m++)
            for (int n = 0; n < 4; n++) acc[m][n] = _mm512_setzero_ps();
        for (int64_t k = 0; k < of.size; k += 32) {
            __m512bh shared[4];
            for (int n = 0; n < 4; n++) shared[n] = (__m512bh)_mm512_loadu_si512(weights + n * of.size + k);
            for (int m = 0; m < M; m++) {
                const __m512bh own = (__m512bh)_mm512_loadu_si512(of.inputs + (row + m) * of.size + k);
                for (int n = 0; n < 4; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], shared[n], own);
            }
        }
        for (int m = 0; m < M; m++)
            for (int n = 0; n < 4; n++) found[m][part + n] = acc[m][n];
    }
    const __m512 bias = of.bias ? load(of.bias + output) : _mm512_setzero_ps();
    for (int m = 0; m < M; m++)
        store(of.out + (row + m) * of.num_outputs + output, _mm512_add_ps(sums(found[m]), bias));
}

inline void few(const Operands& of, int64_t row, int n, int64_t output) {
    switch (n) {
        case 1: return sixteen<1>(of, row, output);
        case 2: return sixteen<2>(of, row, output);
        case 3: return sixteen<3>(of, row, output);
        case 4: return sixteen<4>(of, row, output);
        case 5: return sixteen<5>(of, row, output);
        default: return sixteen<6>(of, row, output);
    }
}

}  // namespace
}  // namespace shoal

// out [num_rows, num_outputs] = inputs [num_rows, size] times weights [num_outputs, size] transposed, plus bias
// [num_outputs], if given. Returns 0, or 1 if size isn't a multiple of 32, or num_outputs of 16.
extern "C" int shoal_linear(const void* inputs, const void* weights, const void* bias, int64_t num_rows,
                            int64_t num_outputs, int64_t size, void* out, int num_threads) {
    using namespace shoal;
    if (size % 32 || num_outputs % 16) return 1;
    const Operands of = {static_cast<const bf16*>(inputs), static_cast<const bf16*>(weights),
                         static_cast<const bf16*>(bias), num_rows, num_outputs, size, static_cast<bf16*>(out)};
    share_ranges(num_outputs, PIECE, Team(num_threads, num_rows), [&](int64_t begin, int64_t end) {
        for (int64_t row = 0; row < num_rows; row += 6)
            for (int64_t output = begin; output < end; output += 16)
                few(of, row, (int)std::min<int64_t>(6, num_rows - row), output);
    });
    return 0;
}
