// Matrix products of few rows, as decoding has them: the weights are read once, as torch has them, and what is next is
// fetched while what is there is multiplied.
//
//   one or two rows  memory is all that takes time: one weights' row after the other, as they lie. The processor sees by
//                    itself what comes next, and asking for it only gets in the way. Sums are added across at the end
//   up to 64         a lane or two hold a row: inputs are turned once, each weight goes to all rows, and hardly anything is
//                    added across, which would take a sixth of the time
//   by tiles         inputs are turned, and the weights as they lie are the other side: where there
//                    are tiles, 16 rows take hardly longer than one, and 64 twice as long
#include <algorithm>
#include <vector>

#include "crew.hpp"
#include "simd.hpp"
#include "tiles.hpp"

namespace shoal {
namespace {

constexpr int64_t PIECE = 128;         // weights' rows a thread takes at a time: with fewer, more of them aren't fetched
constexpr int64_t SMALL_PIECE = 64;    // the same where else there were too few for the threads
constexpr int64_t TILED_OUTPUTS = 64;  // the same by tiles, which fetch nothing
constexpr int64_t MAX_ROWS_IN_ORDER = 2;
constexpr int AT_ONCE = 4;  // sums of an output in order: a product would wait for the one before

struct Operands {
    const bf16 *inputs, *weights, *bias;
    int64_t num_rows, num_outputs, size;
    bf16* out;

    const bf16* weights_of(int64_t output) const { return weights + output * size; }
};

// Sixteen outputs of all M rows, one weights' row after the other. Several sums of each: one alone would be waited for.
template <int M>
inline void sixteen_in_order(const Operands& of, int64_t output) {
    const bf16* const inputs = of.inputs;
    const int64_t size = of.size;
    __m512 found[M][16];
    for (int n = 0; n < 16; n++) {
        const bf16* const weights = of.weights_of(output + n);
        __m512 acc[M][AT_ONCE];
        for (int m = 0; m < M; m++)
            for (int u = 0; u < AT_ONCE; u++) acc[m][u] = _mm512_setzero_ps();
        const auto add = [&](int64_t k, int u) __attribute__((always_inline)) {
            const __m512bh shared = (__m512bh)_mm512_loadu_si512(weights + k);
            for (int m = 0; m < M; m++)
                acc[m][u] = _mm512_dpbf16_ps(acc[m][u], shared, (__m512bh)_mm512_loadu_si512(inputs + m * size + k));
        };
        int64_t k = 0;
        for (; k + 32 * AT_ONCE <= size; k += 32 * AT_ONCE) {
#pragma GCC unroll 4
            for (int u = 0; u < AT_ONCE; u++) add(k + 32 * u, u);
        }
        for (; k < size; k += 32) add(k, 0);
        for (int m = 0; m < M; m++) {
            found[m][n] = acc[m][0];
            for (int u = 1; u < AT_ONCE; u++) found[m][n] = _mm512_add_ps(found[m][n], acc[m][u]);
        }
    }
    const __m512 bias = of.bias ? load(of.bias + output) : _mm512_setzero_ps();
    for (int m = 0; m < M; m++) store(of.out + m * of.num_outputs + output, _mm512_add_ps(sums(found[m]), bias));
}

int64_t piece_of(const Operands& of, int num_threads) {
    return of.num_outputs < 2 * PIECE * num_threads ? SMALL_PIECE : PIECE;
}

void multiply_in_order(const Operands& of, int num_threads) {
    share_ranges(of.num_outputs, piece_of(of, num_threads), Team(num_threads, of.num_rows), [&](int64_t begin, int64_t end) {
        for (int64_t output = begin; output < end; output += 16)
            of.num_rows == 1 ? sixteen_in_order<1>(of, output) : sixteen_in_order<2>(of, output);
    });
}

template <int ROWS>
constexpr int NUMBERS = 32 / ROWS;  // of each row in a register of them

// The inputs of R registers of rows from `first` on, all that a register's rows have, so many numbers at a time: [size /
// numbers][R][row]. Sixteen rows have two numbers each; eight have four, in two lanes, where half of sixteen would hold
// nothing. Where there is no row, there is nothing.
template <int ROWS, int R>
void turn(const Operands& of, int64_t first, __m512i* to) {
    for (int r = 0; r < R; r++)
        for (int64_t k = 0; k < of.size; k += 32) {
            __m512i block[ROWS];
            for (int64_t n = 0; n < ROWS; n++) {
                const int64_t row = first + ROWS * r + n;
                block[n] = row < of.num_rows ? _mm512_loadu_si512(of.inputs + row * of.size + k) : _mm512_setzero_si512();
            }
            transpose(block);
            for (int i = 0; i < ROWS; i++) to[(k / NUMBERS<ROWS> + i) * R + r] = block[i];
        }
}

// Writes sums of sixteen outputs, [output][lane], where they belong, with the bias; those of no row aren't.
template <int ROWS>
inline void put(const Operands& of, __m512i (&found)[16], int64_t row, int64_t output) {
    constexpr int LANES = 16 / ROWS;
    const __m512 bias = of.bias ? load(of.bias + output) : _mm512_setzero_ps();
    transpose(found);
    for (int64_t n = 0; n < std::min<int64_t>(ROWS, of.num_rows - row); n++) {
        __m512 sum = _mm512_castsi512_ps(found[n * LANES]);
        if constexpr (LANES == 2) sum = _mm512_add_ps(sum, _mm512_castsi512_ps(found[n * LANES + 1]));
        store(of.out + (row + n) * of.num_outputs + output, _mm512_add_ps(sum, bias));
    }
}

// Sixteen outputs of R registers of rows, N outputs at a time.
template <int ROWS, int R, int N>
inline void sixteen_by_lanes(const Operands& of, const __m512i* turned, int64_t output) {
    __m512i found[R][16];
    for (int part = 0; part < 16; part += N) {
        const bf16* const weights = of.weights_of(output + part);
        __m512 acc[N][R];
        for (int n = 0; n < N; n++)
            for (int r = 0; r < R; r++) acc[n][r] = _mm512_setzero_ps();
        for (int64_t k = 0; k < of.size; k += 32) {
            for (int n = 0; n < N; n++) fetch(weights + (AHEAD + n) * of.size + k);
#pragma GCC unroll 4
            for (int64_t at = k; at < k + 32; at += NUMBERS<ROWS>) {
                __m512bh own[R];
                for (int r = 0; r < R; r++) own[r] = (__m512bh)turned[at / NUMBERS<ROWS> * R + r];
                for (int n = 0; n < N; n++) {
                    const __m512bh shared = (__m512bh)spread<ROWS>(weights + n * of.size + at);
                    for (int r = 0; r < R; r++) acc[n][r] = _mm512_dpbf16_ps(acc[n][r], own[r], shared);
                }
            }
        }
        for (int n = 0; n < N; n++)
            for (int r = 0; r < R; r++) found[r][part + n] = _mm512_castps_si512(acc[n][r]);
    }
    for (int r = 0; r < R; r++) put<ROWS>(of, found[r], ROWS * r, output);
}

template <int ROWS, int R, int N>
void multiply_by_lanes(const Operands& of, int num_threads) {
    static thread_local std::vector<__m512i> kept;
    kept.resize(of.size / NUMBERS<ROWS> * R);
    turn<ROWS, R>(of, 0, kept.data());
    const __m512i* const turned = kept.data();  // the crew's threads have a `kept` of their own
    share_ranges(of.num_outputs, piece_of(of, num_threads), Team(num_threads, of.num_rows), [&](int64_t begin, int64_t end) {
        for (int64_t output = begin; output < end; output += 16) sixteen_by_lanes<ROWS, R, N>(of, turned, output);
    });
}

void multiply_by_lanes(const Operands& of, int num_threads) {
    switch ((of.num_rows + 7) / 8) {
        case 1: return multiply_by_lanes<8, 1, 8>(of, num_threads);
        case 2: return multiply_by_lanes<8, 2, 8>(of, num_threads);
        case 3: return multiply_by_lanes<8, 3, 8>(of, num_threads);
        case 4: return multiply_by_lanes<16, 2, 8>(of, num_threads);
        case 5: return multiply_by_lanes<8, 5, 4>(of, num_threads);
        case 6: return multiply_by_lanes<16, 3, 8>(of, num_threads);
        default: return multiply_by_lanes<16, 4, 4>(of, num_threads);
    }
}

// 64 outputs of sixteen rows. Nothing is fetched ahead: the processor does that by itself, and a tile's load waits for
// sixteen lines at once.
inline void tiled(const Operands& of, const __m512i* turned, int64_t row, int64_t output) {
    const int64_t size = of.size, weights_row = 2 * size;
    const bf16* const weights = of.weights_of(output);
    alignas(64) float found[TILED_OUTPUTS * TILE];
    Tiles::zero<0>();
    Tiles::zero<1>();
    Tiles::zero<2>();
    Tiles::zero<3>();
    for (int64_t k = 0; k < size; k += TILE_NUMBERS) {
        Tiles::load<4>(turned + k / 2, 64);
        Tiles::load<5>(weights + k, weights_row);
        Tiles::multiply<0, 5, 4>();
        Tiles::load<6>(weights + TILE * size + k, weights_row);
        Tiles::multiply<1, 6, 4>();
        Tiles::load<5>(weights + 2 * TILE * size + k, weights_row);
        Tiles::multiply<2, 5, 4>();
        Tiles::load<6>(weights + 3 * TILE * size + k, weights_row);
        Tiles::multiply<3, 6, 4>();
    }
    Tiles::store<0>(found, 64);
    Tiles::store<1>(found + TILE * TILE, 64);
    Tiles::store<2>(found + 2 * TILE * TILE, 64);
    Tiles::store<3>(found + 3 * TILE * TILE, 64);
    for (int part = 0; part < TILED_OUTPUTS; part += 16) {
        __m512i block[16];
        for (int n = 0; n < 16; n++) block[n] = _mm512_load_si512(found + (part + n) * TILE);
        put<16>(of, block, row, output + part);
    }
}

void multiply_by_tiles(const Operands& of, int num_threads) {
    static thread_local std::vector<__m512i> kept;
    const int64_t turned_size = of.size / 2;
    kept.resize((of.num_rows + TILE - 1) / TILE * turned_size);
    for (int64_t row = 0; row < of.num_rows; row += TILE) turn<16, 1>(of, row, kept.data() + row / TILE * turned_size);
    const __m512i* const turned = kept.data();
    share(of.num_outputs / TILED_OUTPUTS, Team(num_threads, of.num_rows), [&](int64_t piece) {
        const Tiles held;
        for (int64_t row = 0; row < of.num_rows; row += TILE)
            tiled(of, turned + row / TILE * turned_size, row, piece * TILED_OUTPUTS);
    });
}

}  // namespace
}  // namespace shoal

// out [num_rows, num_outputs] = inputs [num_rows, size] times weights [num_outputs, size] transposed, plus bias
// [num_outputs], if given. Returns 0, or 1 if size isn't a multiple of 32, num_outputs of 16, or there are no rows,
// or more than 64.
extern "C" int shoal_linear(const void* inputs, const void* weights, const void* bias, int64_t num_rows,
                            int64_t num_outputs, int64_t size, void* out, int num_threads) {
    using namespace shoal;
    if (size % 32 || num_outputs % 16 || num_rows < 1 || num_rows > FEW_ROWS) return 1;
    const Operands of = {static_cast<const bf16*>(inputs), static_cast<const bf16*>(weights),
                         static_cast<const bf16*>(bias), num_rows, num_outputs, size, static_cast<bf16*>(out)};
    // A single row takes as long as memory does, either way, and dot products need no turning.
    if (num_rows > 1 && num_outputs % TILED_OUTPUTS == 0 && have_tiles()) multiply_by_tiles(of, num_threads);
    else if (num_rows <= MAX_ROWS_IN_ORDER) multiply_in_order(of, num_threads);
    else multiply_by_lanes(of, num_threads);
    return 0;
}
